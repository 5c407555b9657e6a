//! A file that changes under an open image, and a second writer.

use std::fs::OpenOptions as Files;
use std::path::Path;

use tidemark_qcow2::{FileStorage, Image, OpenOptions, Sharing};

use crate::chain::image_with_chain;
use crate::probe::guarded;

fn open(path: &Path, writable: bool) -> Image {
    let storage = FileStorage::open(path, writable, Sharing::Exclusive).unwrap();
    let options = OpenOptions {
        writable,
        ..OpenOptions::default()
    };
    Image::open(Box::new(storage), options).unwrap()
}

#[test]
fn a_file_cut_or_grown_while_it_is_open_gives_typed_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    let bytes = image_with_chain();
    let whole = u64::try_from(bytes.len()).unwrap();
    for len in [
        0,
        1,
        512,
        4096,
        4097,
        whole / 2,
        whole - 1,
        whole + 1,
        whole * 2,
        1 << 40,
    ] {
        for writable in [false, true] {
            std::fs::write(&path, &bytes).unwrap();
            let image = open(&path, writable);
            Files::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(len)
                .unwrap();
            guarded(|| {
                let mut buffer = vec![0; 1 << 20];
                let _ = image.read(&mut buffer, 0);
                let _ = image.map(0, image.size());
                let _ = image.load_bitmap("c1");
                let _ = image.load_bitmap("c0");
                let _ = image.write(&[1; 5000], 100);
                let _ = image.check();
                let _ = image.flush();
                let _ = image.close();
            })
            .unwrap_or_else(|text| panic!("{len} bytes, writable {writable}: {text}"));
        }
    }
}

#[test]
fn two_writers_or_a_writer_beside_a_reader_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    std::fs::write(&path, image_with_chain()).unwrap();
    let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
    assert!(FileStorage::open(&path, true, Sharing::Exclusive).is_err());
    assert!(FileStorage::open(&path, false, Sharing::Exclusive).is_err());
    drop(storage);
    let readers = [(); 2].map(|()| FileStorage::open(&path, false, Sharing::Exclusive).unwrap());
    assert!(FileStorage::open(&path, true, Sharing::Exclusive).is_err());
    drop(readers);
}
