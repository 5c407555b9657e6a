//! Locks: neither of us opens what the other is writing.

use std::io::ErrorKind;

use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::{CreateOptions, Feature, FileStorage, Image, Sharing};

use super::Desk;
use super::common::{create_file, open_file, reading, try_open_file, writing};

fn desk() -> Desk {
    let desk = Desk::new();
    create_file(&desk.path, &CreateOptions::new(1 << 20))
        .close()
        .unwrap();
    desk
}

fn refusal(desk: &Desk, write: bool) -> ErrorKind {
    FileStorage::open(&desk.path, write, Sharing::Exclusive)
        .unwrap_err()
        .kind()
}

#[test]
fn an_image_that_qemu_writes_is_not_opened() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = desk();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.path);
    assert_eq!(refusal(&desk, true), ErrorKind::WouldBlock);
    assert_eq!(refusal(&desk, false), ErrorKind::WouldBlock);
    assert_eq!(
        FileStorage::create(&desk.path).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    let storage = FileStorage::open(&desk.path, false, Sharing::ForceShare).unwrap();
    let image = Image::open(Box::new(storage), reading()).unwrap();
    assert_eq!(image.size(), 1 << 20);
    // Our look does not stand in QEMU's way.
    daemon.guest(&node, &["write -P 9 0 64k"]);
    drop(image);
    daemon.close(&node);
    open_file(&desk.path, writing()).close().unwrap();
    daemon.quit();
    assert_eq!(desk.look(super::common::read_all)[..65536], [9; 65536]);
}

#[test]
fn readers_share_an_image_with_qemu() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = desk();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_read_only(&desk.path);
    let image = open_file(&desk.path, reading());
    qemu_img::info(&desk.path);
    qemu_io::read_only(&desk.path, &["read -P 0 0 1M"]);
    drop(image);
    assert_eq!(
        refusal(&desk, true),
        ErrorKind::WouldBlock,
        "a writer beside QEMU's reader"
    );
    daemon.close(&node);
    daemon.quit();
    open_file(&desk.path, writing()).close().unwrap();
}

#[test]
fn qemu_does_not_open_an_image_that_we_write() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = desk();
    let path = desk.path.to_str().unwrap();
    let image = open_file(&desk.path, writing());
    image.write(&[1; 1000], 0).unwrap();
    image.flush().unwrap();
    let refused = qemu_img::run(&["info", "-f", "qcow2", path]);
    assert!(!refused.success(), "qemu-img info ignored our lock");
    assert!(refused.stderr.contains("lock"), "{}", refused.stderr);
    assert!(qemu_img::run(&["info", "-U", "-f", "qcow2", path]).success());
    assert!(qemu_img::run(&["map", "-U", "-f", "qcow2", path]).success());
    for tool in [
        vec!["resize", path, "2M"],
        vec!["bitmap", "--add", path, "b"],
    ] {
        assert!(!qemu_img::run(&tool).success(), "{tool:?} ignored our lock");
    }
    let mut daemon = QemuStorageDaemon::spawn();
    for read_only in [false, true] {
        let error = daemon.open(&desk.path, "qcow2", read_only).unwrap_err();
        assert!(error.to_string().contains("lock"), "{error}");
    }
    image.close().unwrap();
    let node = daemon.open_image(&desk.path);
    daemon.close(&node);
    daemon.quit();
    // A reader of ours lets QEMU read and keeps it from writing.
    let image = open_file(&desk.path, reading());
    qemu_img::info(&desk.path);
    assert!(!qemu_img::run(&["resize", path, "2M"]).success());
    drop(image);
    qemu_img::resize(&desk.path, 2 << 20);
}

/// A layer below is locked too, by whoever reads through it.
#[test]
fn a_backing_file_is_not_written_under_its_reader() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = desk();
    let overlay = desk.beside("overlay.qcow2");
    qemu_img::create_overlay(&overlay, "image.qcow2", "qcow2");
    let path = desk.path.to_str().unwrap();
    let image = open_file(&overlay, writing());
    assert!(
        !qemu_img::run(&["resize", path, "2M"]).success(),
        "QEMU wrote below us"
    );
    assert_eq!(refusal(&desk, true), ErrorKind::WouldBlock);
    image.close().unwrap();
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.path);
    let error = try_open_file(&overlay, writing()).unwrap_err();
    assert!(
        matches!(error.feature(), Some(Feature::Backing { .. })),
        "{error}"
    );
    daemon.close(&node);
    daemon.quit();
    open_file(&overlay, writing()).close().unwrap();
}

#[test]
fn we_keep_one_another_out_as_well() {
    let _turn = super::common::alone();
    let desk = desk();
    let writer = open_file(&desk.path, writing());
    assert_eq!(refusal(&desk, true), ErrorKind::WouldBlock);
    assert_eq!(refusal(&desk, false), ErrorKind::WouldBlock);
    drop(writer);
    let reader = open_file(&desk.path, reading());
    open_file(&desk.path, reading());
    assert_eq!(refusal(&desk, true), ErrorKind::WouldBlock);
    drop(reader);
    open_file(&desk.path, writing());
}
