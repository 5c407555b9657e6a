//! What other programs can do to the bitmaps of a chain: one test for each row of the table in
//! docs/bitmaps.md. What nothing in the format tells is here too, so that the document stays honest.

use std::path::Path;

use serde_json::json;
use tidemark_fixtures::corrupt::set_u64;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Health, Identity, Proof, Reading};
use tidemark_qcow2::{CreateOptions, Error, Image, proof};

use super::common::{assert_covers, create_file, granularity, read_all};
use super::sessions::begin_chain;
use super::{Desk, to_u64, to_usize};

const SIZE: u64 = 8 << 20;
const GRANULE: u64 = 4096;
/// Where the frozen bitmap `f` and the recording one, `r`, have changes.
const IN_F: u64 = 1 << 20;
const IN_R: u64 = 3 << 20;
const LEN: u64 = 300_000;

/// An image whose chain has a frozen bitmap `f` and a recording one, `r`, and what it held at each.
struct Chained {
    desk: Desk,
    at_f: Vec<u8>,
    at_r: Vec<u8>,
    frozen: tidemark_qcow2::Bitmap,
}

impl Chained {
    fn new() -> Self {
        let desk = Desk::new();
        let image = create_file(&desk.path, &CreateOptions::new(SIZE));
        image.write(&[7; 100_000], 0).unwrap();
        let at_f = read_all(&image);
        begin_chain(&image, "f", GRANULE);
        image.write(&vec![8; to_usize(LEN)], IN_F).unwrap();
        let at_r = read_all(&image);
        image.update::<_, Error>(freeze_f_and_begin_r).unwrap();
        image.write(&vec![9; to_usize(LEN)], IN_R).unwrap();
        image.close().unwrap();
        let frozen = desk.look(|image| image.load_bitmap("f").unwrap());
        let chained = Self {
            desk,
            at_f,
            at_r,
            frozen,
        };
        chained.expect(Health::Ok, Health::Ok, "at the start");
        chained
    }

    fn path(&self) -> &Path {
        &self.desk.path
    }

    /// Judges both, and holds what is trusted against the bytes.
    fn expect(&self, f: Health, r: Health, what: &str) {
        self.desk.look(|image| {
            assert_eq!(health(image, "f"), f, "{what}: the frozen bitmap");
            assert_eq!(health(image, "r"), r, "{what}: the recording bitmap");
            if f == Health::Ok {
                assert!(image.load_bitmap("f").unwrap() == self.frozen, "{what}");
            }
            if r == Health::Ok && image.size() == SIZE {
                let bits = image.load_bitmap("r").unwrap();
                assert_covers(&bits, &self.at_r, &read_all(image), what);
            }
        });
    }

    /// What is said now is said for good: writes of ours and of QEMU heal nothing.
    fn expect_sticks(&self, f: Health, r: Health, what: &str) {
        self.expect(f, r, what);
        self.desk
            .session(|image| image.write(&vec![1; to_usize(image.size())], 0).unwrap());
        self.expect(f, r, &format!("{what}, and our writes"));
        qemu_io::commands(self.path(), &["write -P 3 0 4M"]);
        self.expect(f, r, &format!("{what}, and QEMU's writes"));
        qemu_img::check(self.path()).assert_at_worst_leaks();
    }

    fn qemu(&self, args: &[&str]) {
        let path = self.path().to_str().unwrap();
        let args: Vec<&str> = args
            .iter()
            .map(|arg| if *arg == "IMAGE" { path } else { arg })
            .collect();
        qemu_img::ok(&args);
    }

    /// Runs a backup job of QEMU with a bitmap, to its end.
    fn job(&self, bitmap: &str, sync: &str, mode: &str) {
        let target = self.desk.beside("target.qcow2");
        qemu_img::create(&target, SIZE, &[]);
        let mut daemon = QemuStorageDaemon::spawn();
        let (node, to) = (daemon.open_image(self.path()), daemon.open_image(&target));
        let extra = json!({ "sync": sync, "bitmap": bitmap, "bitmap-mode": mode });
        daemon.backup(&node, &to, extra).unwrap();
        daemon.close(&node);
        daemon.close(&to);
        daemon.quit();
    }

    fn record(&self) -> ChainRecord {
        match self.desk.look(Image::chain) {
            Reading::Current(record) => record,
            other => panic!("{other:?}"),
        }
    }
}

fn freeze_f_and_begin_r(update: &mut tidemark_qcow2::Update<'_>) -> Result<(), Error> {
    let old = update.load("f")?;
    let mut record = update.record().cloned().unwrap();
    record.checkpoints[0].proof = Proof::Frozen(proof::frozen(&old));
    update.put("f", old, false)?;
    let mut bits = update.blank(granularity(GRANULE))?;
    let planted = proof::plant(update.image(), &mut bits)?;
    let identity = Identity::random().unwrap();
    let entry = CheckpointEntry {
        identity,
        name: "r".to_owned(),
        parent: Some(record.checkpoints[0].identity),
        proof: Proof::Recording(planted),
        ..record.checkpoints[0].clone()
    };
    record.checkpoints.push(entry);
    record.current = Some(identity);
    update.set_record(Some(record));
    update.put("r", bits, true)
}

fn health(image: &Image, name: &str) -> Health {
    let Reading::Current(record) = image.chain() else {
        panic!("no record: {:?}", image.chain());
    };
    image.judge(record.checkpoint_named(name).unwrap()).unwrap()
}

#[test]
fn writes_of_qemu_are_recorded_and_leave_the_frozen_alone() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    for command in ["write -P 5 5M 70k", "write -z 2M 1M", "discard 0 64k"] {
        qemu_io::commands(chained.path(), &[command]);
        chained.expect(Health::Ok, Health::Ok, command);
    }
    chained.qemu(&["bench", "-w", "-c", "20", "-f", "qcow2", "IMAGE"]);
    chained.expect(Health::Ok, Health::Ok, "bench");
    chained.qemu(&["check", "-r", "all", "IMAGE"]);
    chained.expect(Health::Ok, Health::Ok, "repair");
    chained.desk.assert_clean();
}

#[test]
fn a_killed_qemu_leaves_all_bitmaps_inconsistent() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let mut daemon = QemuStorageDaemon::spawn();
    daemon.open_image(chained.path());
    daemon.kill_dash_nine();
    chained.expect_sticks(Health::Inconsistent, Health::Inconsistent, "killed");
}

#[test]
fn removed_bitmaps_are_missing() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    chained.qemu(&["bitmap", "--remove", "IMAGE", "r"]);
    chained.expect_sticks(Health::Ok, Health::Missing, "r removed");
    let chained = Chained::new();
    chained.qemu(&["bitmap", "--remove", "IMAGE", "f"]);
    chained.expect_sticks(Health::Missing, Health::Ok, "f removed");
    let chained = Chained::new();
    chained.qemu(&["bitmap", "--remove", "IMAGE", "f"]);
    chained.qemu(&["bitmap", "--remove", "IMAGE", "r"]);
    chained.expect_sticks(Health::Missing, Health::Missing, "both removed");
}

#[test]
fn a_recording_bitmap_that_lost_bits_is_reset() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    type Harm = fn(&Chained);
    let harms: [(&str, Harm); 6] = [
        ("cleared", |c| c.qemu(&["bitmap", "--clear", "IMAGE", "r"])),
        ("removed and added", |c| {
            c.qemu(&["bitmap", "--remove", "--add", "-g", "4096", "IMAGE", "r"]);
        }),
        ("added with another granularity", |c| {
            c.qemu(&["bitmap", "--remove", "--add", "-g", "512", "IMAGE", "r"]);
        }),
        ("used by an incremental job", |c| {
            c.job("r", "incremental", "on-success")
        }),
        ("used by a bitmap job, always", |c| {
            c.job("r", "bitmap", "always")
        }),
        ("cleared by a full job", |c| {
            c.job("r", "full", "on-success")
        }),
    ];
    for (what, harm) in harms {
        let chained = Chained::new();
        harm(&chained);
        chained.expect_sticks(Health::Ok, Health::Reset, what);
    }
    let chained = Chained::new();
    chained.job("r", "bitmap", "never");
    chained.expect(Health::Ok, Health::Ok, "a job that uses up nothing");
    println!("{} ways to reset it", harms.len());
}

#[test]
fn a_disabled_recording_bitmap_is_not_recording() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    chained.qemu(&["bitmap", "--disable", "IMAGE", "r"]);
    chained.expect_sticks(Health::Ok, Health::NotRecording, "disabled");
    // Seen once while it was off, it is not healed by being on again.
    chained.qemu(&["bitmap", "--enable", "IMAGE", "r"]);
    chained.expect(Health::Ok, Health::NotRecording, "enabled again");
}

#[test]
fn a_frozen_bitmap_whose_bits_are_others_is_changed() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    type Harm = fn(&Chained);
    let harms: [(&str, Harm); 5] = [
        ("cleared", |c| c.qemu(&["bitmap", "--clear", "IMAGE", "f"])),
        ("merged into", |c| {
            c.qemu(&["bitmap", "--merge", "r", "IMAGE", "f"])
        }),
        ("enabled and written", |c| {
            c.qemu(&["bitmap", "--enable", "IMAGE", "f"]);
            qemu_io::commands(c.path(), &["write -P 4 6M 4k"]);
        }),
        ("used up by a job", |c| c.job("f", "bitmap", "on-success")),
        ("removed and added", |c| {
            c.qemu(&[
                "bitmap",
                "--remove",
                "--add",
                "--disable",
                "-g",
                "4096",
                "IMAGE",
                "f",
            ]);
        }),
    ];
    for (what, harm) in harms {
        let chained = Chained::new();
        harm(&chained);
        chained.expect_sticks(Health::Changed, Health::Ok, what);
    }
    let chained = Chained::new();
    chained.qemu(&["bitmap", "--enable", "--disable", "IMAGE", "f"]);
    chained.expect(Health::Ok, Health::Ok, "on and off without a write");
    println!("{} ways to change it", harms.len());
}

#[test]
fn a_writer_without_bitmaps_takes_them_away() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let mut bytes = chained.desk.bytes();
    set_u64(&mut bytes, 88, 0);
    std::fs::write(chained.path(), bytes).unwrap();
    chained.expect(Health::Missing, Health::Missing, "autoclear bit gone");
    chained
        .desk
        .look(|image| assert!(image.load_bitmap("f").is_err() && image.load_bitmap("r").is_err()));
    chained.expect_sticks(Health::Missing, Health::Missing, "autoclear bit gone");
}

/// QEMU leaves the extension behind in an image of version 2, where it means nothing.
#[test]
fn an_image_made_version_2_has_lost_its_bitmaps() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    chained.qemu(&["amend", "-o", "compat=0.10", "IMAGE"]);
    chained.desk.look(|image| {
        assert_eq!(image.geometry().version, 2);
        assert_eq!(image.bitmaps().unwrap(), []);
        if let Reading::Current(_) = image.chain() {
            assert_eq!(health(image, "f"), Health::Missing);
            assert_eq!(health(image, "r"), Health::Missing);
        }
    });
    chained.qemu(&["amend", "-o", "compat=1.1", "IMAGE"]);
    chained.desk.look(|image| {
        assert_eq!(image.bitmaps().unwrap(), []);
        if let Reading::Current(_) = image.chain() {
            assert_eq!(health(image, "r"), Health::Missing, "and back");
        }
    });
}

#[test]
fn a_disk_that_qemu_resized_has_a_dirty_new_part_and_cut_bits() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let grown = Chained::new();
    qemu_img::resize(grown.path(), SIZE + (1 << 20));
    grown.expect(Health::SizeDiffers, Health::SizeDiffers, "grown");
    // Bits of the frozen one are planted anywhere: cut, they are other bits.
    let shrunk = Chained::new();
    let last = shrunk.frozen.dirty_ranges().last().unwrap().end;
    qemu_img::resize(shrunk.path(), 4 << 20);
    let expected = if last > 4 << 20 {
        Health::Changed
    } else {
        Health::SizeDiffers
    };
    shrunk.desk.look(|image| {
        assert_eq!(health(image, "f"), expected, "cut");
        assert!(matches!(
            health(image, "r"),
            Health::SizeDiffers | Health::Reset
        ));
    });
    for chained in [grown, shrunk] {
        chained.desk.assert_clean();
    }
}

#[test]
fn a_copy_and_a_refused_snapshot_leave_the_chain_as_it_is() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let copy = Desk::new();
    qemu_img::convert(chained.path(), "qcow2", &copy.path, "qcow2", &["--bitmaps"]);
    copy.look(|image| assert_eq!(image.chain(), Reading::Absent, "a copy is another image"));
    let path = chained.path().to_str().unwrap();
    qemu_img::ok(&["snapshot", "-c", "s", path]);
    assert!(!qemu_img::run(&["snapshot", "-a", "s", path]).success());
    qemu_img::ok(&["snapshot", "-d", "s", path]);
    chained.expect(Health::Ok, Health::Ok, "copied, and a snapshot not applied");
    assert!(chained.desk.look(read_all) != chained.at_f);
}

/// Where guest byte `offset` stands in the file.
fn place_of(path: &Path, offset: u64) -> usize {
    let map = qemu_img::map(path);
    let extents = map.as_array().unwrap();
    let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
    let extent = extents
        .iter()
        .find(|extent| {
            (number(extent, "start")..number(extent, "start") + number(extent, "length"))
                .contains(&offset)
        })
        .unwrap();
    to_usize(number(extent, "offset") + offset - number(extent, "start"))
}

/// Shows that nothing is noticed, although a byte changed that `r` does not mark.
fn assert_unseen(chained: &Chained, offset: u64, what: &str) {
    chained.desk.look(|image| {
        assert_eq!(
            health(image, "r"),
            Health::Ok,
            "{what}: it is noticed now; say so in the docs"
        );
        let now = read_all(image);
        let at = to_usize(offset);
        assert!(now[at] != chained.at_r[at], "{what}: nothing changed");
        assert!(
            !image.load_bitmap("r").unwrap().test(offset),
            "{what}: it is marked"
        );
    });
}

#[test]
fn a_writer_that_ignores_the_autoclear_rule_is_not_seen() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let marked = chained.desk.look(|image| image.load_bitmap("r").unwrap());
    let offset = (0..100_000).find(|&at| !marked.test(at)).unwrap();
    let place = place_of(chained.path(), offset);
    let mut bytes = chained.desk.bytes();
    bytes[place] ^= 0xff;
    std::fs::write(chained.path(), bytes).unwrap();
    assert_unseen(&chained, offset, "in place, without a mark");
}

/// Count and witnesses can come back on other bits.
#[test]
fn a_clear_after_which_count_and_witnesses_came_back_is_not_seen() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    chained
        .desk
        .session(|image| image.write(&vec![6; 1 << 20], 5 << 20).unwrap());
    let record = chained.record();
    let Proof::Recording(proof) = &record.checkpoints[1].proof else {
        panic!("r does not record");
    };
    let before = chained.desk.look(|image| image.load_bitmap("r").unwrap());
    chained.qemu(&["bitmap", "--clear", "IMAGE", "r"]);
    let mut marks: Vec<u64> = proof
        .planted
        .iter()
        .chain(&proof.witnesses)
        .copied()
        .collect();
    marks.sort_unstable();
    marks.dedup();
    // As many again, elsewhere.
    let fresh = (0..SIZE / GRANULE)
        .map(|bit| bit * GRANULE)
        .filter(|&at| !before.test(at));
    let missing = proof.count - to_u64(marks.len());
    marks.extend(fresh.take(to_usize(missing)));
    let commands: Vec<String> = marks
        .iter()
        .map(|at| format!("write -P 2 {at} 512"))
        .collect();
    for part in commands.chunks(200) {
        let part: Vec<&str> = part.iter().map(String::as_str).collect();
        qemu_io::commands(chained.path(), &part);
    }
    let now = chained.desk.look(|image| image.load_bitmap("r").unwrap());
    let lost = (5 << 20..6 << 20)
        .step_by(4096)
        .find(|&at| !now.test(at))
        .unwrap();
    assert_unseen(&chained, lost, "cleared and filled");
}

#[test]
fn a_disable_and_enable_around_writes_is_not_seen() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let marked = chained.desk.look(|image| image.load_bitmap("r").unwrap());
    let offset = (5 << 20..6 << 20)
        .step_by(4096)
        .find(|&at| !marked.test(at))
        .unwrap();
    chained.qemu(&["bitmap", "--disable", "IMAGE", "r"]);
    qemu_io::commands(chained.path(), &[&format!("write -P 9 {offset} 4k")]);
    chained.qemu(&["bitmap", "--enable", "IMAGE", "r"]);
    assert_unseen(&chained, offset, "off and on");
}

/// With no bit beyond the smaller size, nothing is missing afterwards; what was there is zeros.
#[test]
fn a_shrink_and_grow_is_only_seen_by_the_bits_that_it_cut() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let chained = Chained::new();
    let marked = chained.desk.look(|image| image.load_bitmap("r").unwrap());
    let cut = marked.dirty_ranges().last().unwrap().end.max(IN_R + LEN);
    // Something was there before `r` began, and nothing of `r` is.
    if cut < SIZE {
        qemu_img::resize(chained.path(), cut);
        qemu_img::resize(chained.path(), SIZE);
        chained
            .desk
            .look(|image| assert_eq!(health(image, "r"), Health::Ok));
    }
    let chained = Chained::new();
    qemu_img::resize(chained.path(), IN_R);
    qemu_img::resize(chained.path(), SIZE);
    chained
        .desk
        .look(|image| assert_eq!(health(image, "r"), Health::Reset, "bits were cut"));
}

/// The table of the document names these tests.
#[test]
fn every_row_of_the_document_names_its_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let document = std::fs::read_to_string(folder.join("docs/bitmaps.md")).unwrap();
    let (_, table) = document
        .split_once("## What foreign programs can do to you")
        .unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let mut sources = String::new();
    for place in ["qcow2/tests/interop", "checkpoint/tests/qemu_crashes"] {
        for file in std::fs::read_dir(folder.join(place)).unwrap() {
            sources += &std::fs::read_to_string(file.unwrap().path()).unwrap();
        }
    }
    let rows: Vec<&str> = table
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1)
        .collect();
    for row in &rows {
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let name = cell.trim().trim_matches('`');
        assert!(
            sources.contains(&format!("fn {name}()")),
            "no test {name:?} for: {row}"
        );
    }
    println!("{} rows", rows.len());
    assert!(rows.len() >= 15);
}
