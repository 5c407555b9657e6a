//! What cannot be is refused before anything is written.

use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{CreateOptions, Image, Mistake, Shrink};

use crate::common::{add_bitmap, built, writing};

#[test]
fn what_cannot_be_is_refused_and_every_byte_stays() {
    let bytes = built(&CreateOptions::new(1 << 20), |image| {
        image.write(&[1; 70_000], 0).unwrap();
        add_bitmap(image, "fine", 512);
    });
    let storage = CrashStorage::new(bytes.clone());
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let option = |size, shrink| match image.resize(size, shrink).unwrap_err().mistake() {
        Some(Mistake::Option { option, problem }) => {
            assert_eq!(*option, "size");
            *problem
        }
        other => panic!("{other:?}"),
    };
    assert!(option(1 << 19, Shrink::Refused).contains("smaller"));
    assert!(option(0, Shrink::Allowed).contains("multiple"));
    assert!(option((1 << 20) + 100, Shrink::Allowed).contains("multiple"));
    assert!(option(1 << 62, Shrink::Allowed).contains("too large"));
    // 512 MiB of bits are the limit: one bit for 512 bytes of a disk of 2 TiB and a little.
    let error = image
        .resize((2 << 40) + (1 << 20), Shrink::Refused)
        .unwrap_err();
    assert!(
        matches!(error.mistake(), Some(Mistake::BitmapTooFine { name, .. }) if name == "fine"),
        "{error}"
    );
    image.resize(1 << 20, Shrink::Refused).unwrap();
    image.close().unwrap();
    assert_eq!(storage.to_bytes(), bytes);
}

#[test]
fn a_bitmap_in_use_keeps_the_disk_as_it_is_and_is_named() {
    tidemark_fixtures::require_qemu!();
    use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
    let _alone = crate::common::alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    crate::common::create_file(&path, &CreateOptions::new(1 << 20))
        .close()
        .unwrap();
    let image = crate::common::open_file(&path, writing());
    add_bitmap(&image, "held", 65_536);
    image.close().unwrap();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&path);
    daemon.guest(&node, &["write 0 64k"]);
    daemon.kill_dash_nine();
    let before = std::fs::read(&path).unwrap();
    let image = crate::common::open_file(&path, writing());
    for size in [1 << 19, 2 << 20] {
        let error = image.resize(size, Shrink::Allowed).unwrap_err();
        let named = Mistake::BitmapInconsistent("held".to_owned());
        assert_eq!(error.mistake(), Some(&named), "{error}");
    }
    image.close().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
