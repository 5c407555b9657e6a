//! What QEMU's commands do to a chain: the record is kept, and every loss is noticed and sticks.

use std::path::Path;

use tidemark_fixtures::corrupt::set_u64;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::{Health, Reading};
use tidemark_qcow2::{CreateOptions, Image};

use super::common::{create_file, open_file, read_all, writing};
use super::sessions::{begin_chain, judge_chain};
use super::{Desk, sha256};

const SIZE: u64 = 4 << 20;

/// An image with data and a chain whose only bitmap, `b`, records.
fn chained() -> Desk {
    let desk = Desk::new();
    let image = create_file(&desk.path, &CreateOptions::new(SIZE));
    image.write(&[7; 100_000], 0).unwrap();
    begin_chain(&image, "b", 65536);
    image.write(&[8; 100_000], 1 << 20).unwrap();
    image.close().unwrap();
    desk
}

/// Writes everywhere, so that no planted bit is missing afterwards for want of writes.
fn write_everywhere(desk: &Desk) {
    desk.session(|image| {
        let len = usize::try_from(image.size()).unwrap();
        image.write(&vec![9; len], 0).unwrap();
    });
}

/// One way to lose a bitmap.
type Harm = fn(&Path);
/// What QEMU does, and what is said of the bitmap afterwards.
const HARMS: [(&str, Harm, Health); 7] = [
    (
        "clear",
        |path| qemu_img::bitmap_clear(path, "b"),
        Health::Reset,
    ),
    (
        "disable",
        |path| qemu_img::bitmap_disable(path, "b"),
        Health::NotRecording,
    ),
    (
        "remove",
        |path| qemu_img::bitmap_remove(path, "b"),
        Health::Missing,
    ),
    (
        "remove and add",
        |path| {
            qemu_img::bitmap_remove(path, "b");
            qemu_img::bitmap_add(path, "b", Some(65536));
        },
        Health::Reset,
    ),
    (
        "add with another granularity",
        |path| {
            qemu_img::bitmap_remove(path, "b");
            qemu_img::bitmap_add(path, "b", Some(4096));
        },
        Health::Reset,
    ),
    (
        "kill",
        |path| {
            let mut daemon = QemuStorageDaemon::spawn();
            daemon.open_image(path);
            daemon.kill_dash_nine();
        },
        Health::Inconsistent,
    ),
    (
        "a writer without bitmaps",
        |path| {
            let mut bytes = std::fs::read(path).unwrap();
            set_u64(&mut bytes, 88, 0);
            std::fs::write(path, bytes).unwrap();
        },
        Health::Missing,
    ),
];

#[test]
fn a_loss_by_qemu_is_noticed_and_sticks() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for (name, harm, expected) in HARMS {
        let desk = chained();
        assert_eq!(desk.look(judge_chain), Health::Ok);
        harm(&desk.path);
        assert_eq!(desk.look(judge_chain), expected, "{name}");
        write_everywhere(&desk);
        assert_eq!(
            desk.look(judge_chain),
            expected,
            "{name}: healed by our writes"
        );
        qemu_io::commands(&desk.path, &["write -P 3 0 4M"]);
        assert_eq!(
            desk.look(judge_chain),
            expected,
            "{name}: healed by QEMU's writes"
        );
        if expected == Health::NotRecording {
            qemu_img::bitmap_enable(&desk.path, "b");
            assert_eq!(
                desk.look(judge_chain),
                expected,
                "{name}: healed by enabling"
            );
        }
        qemu_img::check(&desk.path).assert_at_worst_leaks();
    }
    println!("{} ways to lose a bitmap", HARMS.len());
}

#[test]
fn resizing_by_qemu_is_no_loss() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for size in [SIZE + (1 << 20), SIZE - 512, SIZE + 512] {
        let desk = chained();
        qemu_img::resize(&desk.path, size);
        assert_eq!(desk.look(judge_chain), Health::SizeDiffers, "{size}");
        desk.session(|image| image.write(&[5; 512], size - 512).unwrap());
        desk.look(|image| {
            assert_eq!(judge_chain(image), Health::SizeDiffers, "{size}");
            assert!(image.load_bitmap("b").unwrap().test(size - 1));
        });
        desk.assert_clean();
    }
}

#[test]
fn every_command_of_qemu_keeps_the_record() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = chained();
    let record = desk.look(Image::chain);
    assert!(matches!(record, Reading::Current(_)));
    let base = desk.beside("base");
    std::fs::write(&base, [0x42; 4096]).unwrap();
    let path = desk.path.to_str().unwrap();
    let commands: [&[&str]; 18] = [
        &["check", "-r", "all", path],
        &["bitmap", "--add", path, "other"],
        &["bitmap", "--merge", "b", path, "other"],
        &["bitmap", "--remove", path, "other"],
        &["amend", "-o", "lazy_refcounts=on", path],
        &["amend", "-o", "refcount_bits=64", path],
        &["amend", "-o", "refcount_bits=1", path],
        &["amend", "-o", "refcount_bits=16", path],
        &["amend", "-o", "lazy_refcounts=off", path],
        &["resize", path, "8M"],
        &["resize", "--shrink", path, "6M"],
        &["rebase", "-u", "-b", "base", "-F", "raw", path],
        &["rebase", "-b", "", path],
        &["bench", "-w", "-c", "20", "-f", "qcow2", path],
        &["snapshot", "-c", "s", path],
        &["snapshot", "-d", "s", path],
        &["resize", path, "7M"],
        &["check", path],
    ];
    let chain = |what: &str| {
        let storage = tidemark_qcow2::FileStorage::open(
            &desk.path,
            false,
            tidemark_qcow2::Sharing::Exclusive,
        );
        let image = Image::open_unbacked(Box::new(storage.unwrap()), false).unwrap();
        assert_eq!(image.chain(), record, "{what}");
    };
    for command in commands {
        qemu_img::ok(command);
        chain(&command.join(" "));
    }
    qemu_io::commands(&desk.path, &["write -P 1 0 7M", "discard 1M 1M", "flush"]);
    chain("guest writes");
    desk.session(|image| image.write(&[1; 5000], 77).unwrap());
    desk.assert_clean();
    println!("{} commands", commands.len() + 1);
}

#[test]
fn a_repair_after_our_crash_keeps_the_chain() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for what in ["leaks", "all"] {
        let desk = chained();
        let image = open_file(&desk.path, writing());
        for step in 0..20 {
            image.write(&[3; 70_000], step * 200_000).unwrap();
        }
        drop(image);
        assert!(matches!(qemu_img::check(&desk.path).exit, 0 | 3));
        assert_eq!(qemu_img::repair(&desk.path, what).exit, 0);
        desk.assert_clean();
        assert_eq!(desk.look(judge_chain), Health::Ok, "{what}");
        write_everywhere(&desk);
        desk.assert_clean();
    }
}

/// Bits, granularity and flags travel; the record does not: a copy is another image.
#[test]
fn convert_copies_our_bitmaps_and_leaves_the_record() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = chained();
    let mut copies = 0;
    for cluster in ["512", "65536", "2097152"] {
        let copy = Desk::new();
        let option = format!("cluster_size={cluster}");
        qemu_img::convert(
            &desk.path,
            "qcow2",
            &copy.path,
            "qcow2",
            &["--bitmaps", "-o", &option],
        );
        let (ours, theirs) = (
            desk.look(|image| image.load_bitmap("b").unwrap()),
            copy.look(|image| image.load_bitmap("b").unwrap()),
        );
        assert_eq!(sha256(&ours), sha256(&theirs), "clusters of {cluster}");
        copy.look(|image| {
            assert_eq!(image.chain(), Reading::Absent);
            assert!(image.bitmaps().unwrap()[0].auto);
            assert!(read_all(image) == desk.look(read_all));
        });
        copies += 1;
    }
    println!("{copies} copies");
}
