//! Data-file images of QEMU's making and of ours, used in turns by both.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemark_fixtures::corrupt::{get_u64, set_u64};
use tidemark_fixtures::ops::fill;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{FileStorage, Image};

use crate::common::{
    add_bitmap, alone, assert_covers, create_file, open_file, read_all, reading, writing,
};
use crate::{Shape, shape};

const SIZE: u64 = (5 << 20) + 512;

/// A folder with an image and its data file.
struct Desk {
    _folder: TempDir,
    image: PathBuf,
    data: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (image, data) = (
            folder.path().join("disk.qcow2"),
            folder.path().join("disk.raw"),
        );
        Self {
            _folder: folder,
            image,
            data,
        }
    }

    fn made_by_qemu(cluster_size: &str, raw: bool, extended: bool) -> Self {
        let desk = Self::new();
        let name = desk.data.display().to_string();
        let switch = |on| if on { "on" } else { "off" };
        let options = [
            ("data_file", name.as_str()),
            ("data_file_raw", switch(raw)),
            ("extended_l2", switch(extended)),
            ("cluster_size", cluster_size),
        ];
        qemu_img::create(&desk.image, SIZE, &options);
        desk
    }

    fn made_by_us(shape: Shape) -> Self {
        let desk = Self::new();
        // QEMU takes a relative name from where it runs, not from where the image lies.
        let name = desk.data.display().to_string();
        let mut options = shape.options(SIZE);
        if let Some(reference) = &mut options.data_file {
            reference.name = name.into_bytes();
        }
        FileStorage::create(&desk.data).unwrap();
        create_file(&desk.image, &options).close().unwrap();
        desk
    }

    fn is_raw(&self) -> bool {
        open_file(&self.image, reading())
            .header()
            .has_raw_data_file()
    }

    /// Both read `content`, both checks agree and are clean, and a raw file is the disk.
    fn assert_holds(&self, content: &[u8], what: &str) {
        let image = open_file(&self.image, reading());
        assert!(read_all(&image) == content, "{what}: we read other bytes");
        let ours = image.check().unwrap();
        drop(image);
        assert!(qemu_img::convert_to_raw(&self.image) == content, "{what}");
        let theirs = qemu_img::check(&self.image);
        theirs.assert_clean();
        assert!(ours.is_clean(), "{what}: {:?}", ours.findings);
        let counted = [
            ("allocated-clusters", ours.allocated_clusters),
            ("fragmented-clusters", ours.fragmented_clusters),
            ("total-clusters", ours.total_clusters),
            ("image-end-offset", ours.image_end_offset),
        ];
        for (key, value) in counted {
            assert_eq!(value, theirs.count(key), "{what}: {key}");
        }
        if self.is_raw() {
            // QEMU makes the file end with a cluster.
            let file = std::fs::read(&self.data).unwrap();
            let (disk, behind) = file.split_at(content.len());
            let is_disk = disk == content && behind.iter().all(|&byte| byte == 0);
            assert!(is_disk, "{what}: the file is not the disk");
        }
    }
}

/// Our writes, zeros and discards, in every part of the disk.
fn write_as_we_do(image: &Image, content: &mut [u8], round: u64) {
    for (number, (offset, len)) in [
        (0, 512),
        (65_000, 70_000),
        (1 << 20, 4096),
        (SIZE - 700, 700),
        (3 << 20, 300_000),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes = fill(round * 100 + u64::try_from(number).unwrap(), len);
        image.write(&bytes, offset).unwrap();
        let at = usize::try_from(offset).unwrap();
        content[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    image.write_zeroes(3 << 20, 100_000).unwrap();
    content[3 << 20..(3 << 20) + 100_000].fill(0);
    let at = (3 << 20) + 131_072;
    image.discard(at, 131_072).unwrap();
    let place = usize::try_from(at).unwrap();
    image
        .read(&mut content[place..place + 131_072], at)
        .unwrap();
}

fn write_as_qemu_does(path: &Path, content: &mut [u8], byte: u8) {
    let pattern = format!("write -P {byte} 200000 90000");
    let commands = [
        pattern.as_str(),
        "write -z 1M 128k",
        "discard 64k 64k",
        "write -P 9 66000 100",
    ];
    qemu_io::commands(path, &commands);
    content[200_000..290_000].fill(byte);
    content[1 << 20..(1 << 20) + 131_072].fill(0);
    let clusters = open_file(path, reading()).geometry().cluster_bytes();
    if clusters <= 65_536 {
        content[65_536..131_072].fill(0);
    }
    content[66_000..66_100].fill(9);
}

fn take_turns(desk: &Desk, what: &str) {
    let mut content = vec![0; usize::try_from(SIZE).unwrap()];
    desk.assert_holds(&content, what);
    write_as_qemu_does(&desk.image, &mut content, 5);
    desk.assert_holds(&content, what);
    let base = content.clone();
    let image = open_file(&desk.image, writing());
    add_bitmap(&image, "b", 4096);
    write_as_we_do(&image, &mut content, 1);
    image.close().unwrap();
    desk.assert_holds(&content, what);
    write_as_qemu_does(&desk.image, &mut content, 6);
    desk.assert_holds(&content, what);
    let image = open_file(&desk.image, writing());
    write_as_we_do(&image, &mut content, 2);
    let bits = image.load_bitmap("b").unwrap();
    assert_covers(&bits, &base, &content, what);
    image.close().unwrap();
    desk.assert_holds(&content, what);
}

#[test]
fn images_that_qemu_made_are_used_in_turns() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for raw in [false, true] {
        for (cluster_size, extended) in [
            ("512", false),
            ("4k", false),
            ("64k", false),
            ("2M", false),
            ("16k", true),
            ("64k", true),
            ("2M", true),
        ] {
            let desk = Desk::made_by_qemu(cluster_size, raw, extended);
            assert_eq!(desk.is_raw(), raw);
            let what = format!("clusters {cluster_size}, raw {raw}, extended {extended}");
            take_turns(&desk, &what);
            assert_eq!(desk.is_raw(), raw, "the raw bit is kept");
            cases += 1;
        }
    }
    println!("{cases} images by QEMU");
}

#[test]
fn images_that_we_made_are_used_in_turns() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for raw in [false, true] {
        for (cluster_bits, extended) in [
            (9, false),
            (12, false),
            (16, false),
            (21, false),
            (14, true),
            (16, true),
            (21, true),
        ] {
            let shape = shape(cluster_bits, raw, extended);
            let desk = Desk::made_by_us(shape);
            take_turns(&desk, &format!("{shape:?}"));
            assert_eq!(desk.is_raw(), raw, "the raw bit is kept");
            cases += 1;
        }
    }
    println!("{cases} images by us");
}

#[test]
fn a_relative_name_starts_at_the_image() {
    let desk = Desk::new();
    let mut options = crate::options(SIZE, true);
    options.data_file.as_mut().unwrap().name = b"disk.raw".to_vec();
    FileStorage::create(&desk.data).unwrap();
    let image = create_file(&desk.image, &options);
    image.write(&[7; 1000], 300).unwrap();
    image.close().unwrap();
    let content = read_all(&open_file(&desk.image, reading()));
    assert_eq!(content[300..1300], [7; 1000]);
    assert!(std::fs::read(&desk.data).unwrap() == content);
}

/// First L2 table of an image.
fn first_l2(bytes: &[u8]) -> u64 {
    get_u64(bytes, get_u64(bytes, 40)) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn damage_is_counted_as_qemu_counts_it() {
    require_qemu!();
    const COPIED: u64 = 1 << 63;
    let _alone = alone();
    let desk = Desk::made_by_qemu("4k", false, false);
    qemu_io::commands(&desk.image, &["write -P 1 0 40k"]);
    let healthy = std::fs::read(&desk.image).unwrap();
    let l2 = first_l2(&healthy);
    // Guest cluster, its entry, and what QEMU does not count.
    let cases = [
        ("not COPIED", 1, 4096, 0),
        ("compressed", 2, 1 << 62 | 4096, 0),
        ("compressed and COPIED", 2, 1 << 62 | COPIED | 4096, 0),
        ("zero, and kept", 3, COPIED | 12_288 | 1, 0),
        ("zero, and nothing", 3, 1, 0),
        ("nothing", 0, 0, 0),
        ("nothing, but COPIED", 0, COPIED, 0),
        ("another place", 4, COPIED | 8192, 1),
        ("a place far away", 4, COPIED | 1 << 40, 1),
        ("cluster 0 in the place of another", 5, COPIED, 1),
        ("unaligned", 6, COPIED | 512, 1),
    ];
    for (name, cluster, entry, uncounted) in cases {
        let mut bytes = healthy.clone();
        set_u64(&mut bytes, l2 + cluster * 8, entry);
        std::fs::write(&desk.image, &bytes).unwrap();
        let image = open_file(&desk.image, reading());
        let ours = image.check().unwrap();
        let theirs = qemu_img::check(&desk.image);
        let findings = &ours.findings;
        assert_eq!(
            (ours.corruptions, ours.leaks, ours.allocated_clusters),
            (
                theirs.count("corruptions") + uncounted,
                theirs.count("leaks"),
                theirs.count("allocated-clusters")
            ),
            "{name}: {findings:?}"
        );
        let read = image.read(&mut [0; 512], cluster * 4096);
        assert_eq!(
            read.is_err(),
            uncounted == 1 || name.starts_with("compressed")
        );
    }
    println!("{} damages", cases.len());
}
