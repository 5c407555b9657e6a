//! The same backup by QEMU's job and by a loan: the same bits are left.

use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::{Bitmap, BitmapMode, Loan};

use super::common::{alone, granularity, open_file, reading, writing};
use super::{BEFORE, DURING, End, GRANULE, MODES, SIZE, bits_of, expected, write_all};

fn names(mode: BitmapMode) -> &'static str {
    match mode {
        BitmapMode::OnSuccess => "on-success",
        BitmapMode::Never => "never",
        BitmapMode::Always => "always",
    }
}

fn commands(ranges: &[(u64, usize)], value: u8) -> Vec<String> {
    ranges
        .iter()
        .map(|(offset, len)| format!("write -P {value} {offset} {len}"))
        .collect()
}

fn guest(daemon: &QemuStorageDaemon, node: &str, ranges: &[(u64, usize)], value: u8) {
    let commands = commands(ranges, value);
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    let target = format!("nbd+unix:///{node}?socket={}", daemon.socket());
    qemu_io::raw(&target, &commands);
}

/// A job that stands still while the guest writes, and then ends as asked; the bitmap that it left.
fn by_qemu(folder: &Path, mode: BitmapMode, end: End, recording: bool) -> Bitmap {
    let (path, target) = (folder.join("theirs.qcow2"), folder.join("target.qcow2"));
    qemu_img::create(&path, SIZE, &[]);
    qemu_img::create(&target, SIZE, &[]);
    qemu_img::bitmap_add(&path, "b", Some(GRANULE));
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&path);
    // Before the job: its filter lets no new writer in.
    daemon.export(&node, true, &[]);
    guest(&daemon, &node, &BEFORE, 1);
    if !recording {
        daemon.bitmap_disable(&node, "b");
    }
    let to = daemon.open_image(&target);
    let job = json!({
        "job-id": "j", "device": node, "target": to, "sync": "bitmap", "bitmap": "b",
        "bitmap-mode": names(mode), "speed": 1,
    });
    daemon.ok("blockdev-backup", job);
    guest(&daemon, &node, &DURING, 2);
    match end {
        End::Success => daemon.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 })),
        End::Failure | End::Dropped => daemon.ok("block-job-cancel", json!({ "device": "j" })),
    };
    while !daemon
        .ok("query-jobs", json!({}))
        .as_array()
        .unwrap()
        .is_empty()
    {
        thread::sleep(Duration::from_millis(5));
    }
    daemon.unexport(&node);
    daemon.close(&node);
    daemon.close(&to);
    daemon.quit();
    open_file(&path, reading()).load_bitmap("b").unwrap()
}

/// The same with a loan; what QEMU did not copy is taken from what it left.
fn by_us(path: &Path, mode: BitmapMode, end: End, recording: bool, theirs: &Bitmap) -> [Bitmap; 4] {
    qemu_img::create(path, SIZE, &[]);
    qemu_img::bitmap_add(path, "b", Some(GRANULE));
    let image = open_file(path, writing());
    write_all(&image, &BEFORE, 1);
    if !recording {
        image
            .update(|update| update.set_recording("b", false))
            .unwrap();
    }
    let lent = bits_of(&image, &BEFORE);
    let since = bits_of(&image, if recording { &DURING } else { &[] });
    let loan: Loan<'_> = image.lend_bitmap("b", mode).unwrap();
    write_all(&image, &DURING, 2);
    let mut uncopied = lent.clone();
    uncopied.intersect_outward(theirs).unwrap();
    match end {
        End::Success => loan.succeed().unwrap(),
        End::Failure | End::Dropped => loan.fail(&uncopied).unwrap(),
    }
    let ours = image.load_bitmap("b").unwrap();
    image.close().unwrap();
    [ours, lent, since, uncopied]
}

#[test]
fn a_loan_leaves_what_a_job_of_qemu_leaves() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let mut cases = 0;
    for mode in MODES {
        for end in [End::Success, End::Failure] {
            for recording in [true, false] {
                let what = format!("{mode:?}, {end:?}, recording {recording}");
                let folder = tempfile::tempdir().unwrap();
                let theirs = by_qemu(folder.path(), mode, end, recording);
                let path = folder.path().join("ours.qcow2");
                let [ours, lent, since, uncopied] = by_us(&path, mode, end, recording, &theirs);
                assert!(
                    ours == expected(mode, end, &lent, &since, &uncopied),
                    "{what}"
                );
                if mode == BitmapMode::Always && end == End::Failure {
                    // QEMU copies, and remembers, in units of 64 KiB.
                    let mut most = lent.rescale_outward(granularity(65536)).unwrap();
                    most.union_outward(&since).unwrap();
                    assert!(theirs.contains(&ours) && most.contains(&theirs), "{what}");
                } else {
                    assert!(ours == theirs, "{what}: QEMU leaves other bits");
                }
                qemu_img::check(&path).assert_clean();
                cases += 1;
            }
        }
    }
    println!("{cases} jobs");
    assert_eq!(cases, 12);
}
