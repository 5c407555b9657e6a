//! What we write QEMU reads, and the other way round, by contents.

use std::path::Path;
use std::sync::Arc;

use tidemark_qcow2::{
    CreateOptions, FileStorage, Granularity, Image, OpenOptions, PlainFiles, Sharing,
};

fn gate() -> Arc<PlainFiles> {
    Arc::new(PlainFiles::default())
}

fn create(path: &Path, options: &CreateOptions) -> Image {
    let storage = FileStorage::create(path).unwrap();
    Image::create(Box::new(storage), options, OpenOptions::writing(gate())).unwrap()
}

fn open(path: &Path, writable: bool) -> Image {
    let storage = FileStorage::open(path, writable, Sharing::Exclusive).unwrap();
    let options = if writable {
        OpenOptions::writing(gate())
    } else {
        OpenOptions::reading(gate())
    };
    Image::open(Box::new(storage), options).unwrap()
}

fn qemu_img(args: &[&str]) -> String {
    let out = std::process::Command::new("qemu-img")
        .args(args)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{args:?} {} {}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn smoke() {
    for version in [2, 3] {
        for cluster_bits in [9, 12, 16, 21] {
            for refcount_bits in [1, 16, 64] {
                if version == 2 && refcount_bits != 16 {
                    continue;
                }
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a.qcow2");
                let mut options = CreateOptions::new(8 << 20);
                options.version = version;
                options.cluster_bits = cluster_bits;
                options.refcount_bits = refcount_bits;
                let image = create(&path, &options);
                let mut model = vec![0u8; 8 << 20];
                if version == 3 {
                    image
                        .update::<_, tidemark_qcow2::Error>(|update| {
                            let mut bits = update.blank(Granularity::from_bytes(65536).unwrap())?;
                            bits.mark(0..1).unwrap();
                            update.put("b0", bits, true)
                        })
                        .unwrap();
                }
                let mut write = |offset: usize, len: usize, byte: u8| {
                    model[offset..offset + len].fill(byte);
                    image.write(&vec![byte; len], offset as u64).unwrap();
                };
                write(100, 70000, 1);
                write(1 << 20, 3 << 20, 2);
                write((1 << 20) + 777, 5000, 3);
                write((8 << 20) - 10, 10, 4);
                image.flush().unwrap();
                image.write_zeroes(2 << 20, 300000).unwrap();
                model[2 << 20..(2 << 20) + 300000].fill(0);
                image.discard(3 << 20, 1 << 20).unwrap();
                let mut got = vec![0; 8 << 20];
                image.read(&mut got, 0).unwrap();
                for i in (3 << 20)..(4 << 20) {
                    model[i] = got[i];
                }
                assert!(got == model);
                image.close().unwrap();
                let p = path.to_str().unwrap();
                let check = qemu_img(&["check", p]);
                println!("{version} {cluster_bits} {refcount_bits} {check}");
                let raw = dir.path().join("a.raw");
                qemu_img(&["convert", "-O", "raw", p, raw.to_str().unwrap()]);
                assert!(std::fs::read(&raw).unwrap() == model);
                if version == 3 {
                    println!("{}", qemu_img(&["info", p]));
                    let image = open(&path, false);
                    let bits = image.load_bitmap("b0").unwrap();
                    println!("{:?}", bits.dirty_ranges().collect::<Vec<_>>());
                }
            }
        }
    }
}
