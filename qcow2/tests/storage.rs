//! The storages that ship: file, mapping, memory, and the locks between them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::ErrorKind;

use common::{create_file, open_bytes, read_all, reading};
use tidemark_qcow2::{
    BackingReference, BitmapInfo, CheckReport, CreateOptions, Damage, Error, Extent, Feature,
    FileStorage, Gate, Image, MappedStorage, MemoryStorage, Mistake, NoFiles, OpenOptions,
    PlainFiles, Sharing, Storage,
};

#[test]
fn a_mapped_image_reads_as_the_file_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = create_file(&path, &CreateOptions::new(3 << 20));
    image.write(&[7; 100_000], 1_000_000).unwrap();
    let content = read_all(&image);
    image.close().unwrap();
    // SAFETY: nobody else knows the temporary file, so that nobody cuts it.
    #[expect(unsafe_code, reason = "the test vouches for its own file")]
    let storage = unsafe { MappedStorage::open(&path) }.unwrap();
    assert!(!storage.writable());
    assert_eq!(
        storage.write_at(&[0], 0).unwrap_err().kind(),
        ErrorKind::PermissionDenied
    );
    let image = Image::open(Box::new(storage), reading()).unwrap();
    assert!(read_all(&image) == content);
    let extents: Vec<Extent> = image.map(0, image.size()).unwrap();
    assert_eq!(
        extents.iter().map(|extent| extent.length).sum::<u64>(),
        image.size()
    );
}

#[test]
fn one_writer_or_many_readers_hold_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_file(&path, &CreateOptions::new(1 << 20))
        .close()
        .unwrap();
    let open = |write, sharing| FileStorage::open(&path, write, sharing);
    let first = open(false, Sharing::Exclusive).unwrap();
    let second = open(false, Sharing::Exclusive).unwrap();
    let refused = open(true, Sharing::Exclusive).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WouldBlock);
    drop((first, second));
    let _writer = open(true, Sharing::Exclusive).unwrap();
    assert!(open(false, Sharing::Exclusive).is_err());
    assert!(open(false, Sharing::ForceShare).is_ok());
}

#[test]
fn a_gate_decides_which_named_files_are_opened() {
    let reference = BackingReference {
        name: b"/etc/hostname".to_vec(),
        format: "raw".to_owned(),
    };
    assert!(NoFiles.open(&reference, "disk.qcow2").is_err());
    let narrow = PlainFiles {
        below: vec!["/tmp".into()],
        sharing: Sharing::Exclusive,
    };
    assert!(narrow.open(&reference, "disk.qcow2").is_err());
    let options = CreateOptions {
        backing: Some(reference),
        ..CreateOptions::new(1 << 20)
    };
    let refused = Image::create(
        Box::new(MemoryStorage::new()),
        &options,
        OpenOptions::default(),
    );
    assert!(matches!(
        refused.unwrap_err().feature(),
        Some(Feature::Backing { .. })
    ));
}

#[test]
fn errors_say_whose_fault_it_is() {
    let image = common::built(&CreateOptions::new(1 << 20), |_| {});
    let open = open_bytes(image.clone(), reading()).unwrap();
    let outside: Error = open.read(&mut [0; 10], 1 << 20).unwrap_err();
    assert!(matches!(
        outside.mistake(),
        Some(Mistake::OutOfRange { .. })
    ));
    assert!(matches!(
        open.write(&[0], 0).unwrap_err().mistake(),
        Some(Mistake::ReadOnly)
    ));
    assert_eq!(open.bitmaps().unwrap(), Vec::<BitmapInfo>::new());
    let report: CheckReport = open.check().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    let damaged = open_bytes(image[..80].to_vec(), reading()).unwrap_err();
    assert!(matches!(damaged.damage(), Some(Damage::Truncated { .. })));
    let other = open_bytes(b"PK\x03\x04".to_vec(), reading()).unwrap_err();
    assert!(matches!(other.feature(), Some(Feature::NotQcow2 { .. })));
}
