//! Our crash is invisible to QEMU: what it finds is valid, and recording goes on.

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::{nbd, qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::{CrashOptions, CrashStorage};
use tidemark_qcow2::chain::Health;
use tidemark_qcow2::{Bitmap, CreateOptions, Image};

use super::common::{
    assert_covers, create_file, granularity, open_file, read_all, reading, writing,
};
use super::sessions::{begin_chain, judge_chain};
use super::{Desk, assert_records, extents, operate, qemu_operates, to_u64, to_usize};

const SIZE: u64 = (9 << 20) + 1024;
const GRANULE: u64 = 4096;

/// An image with data, a chain and its recording bitmap `b`; returns its content.
fn chained(desk: &Desk, cluster_bits: u32, random: &mut Random) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(SIZE)
    };
    let image = create_file(&desk.path, &options);
    let mut model = vec![0; to_usize(SIZE)];
    operate(&image, &mut model, random, 10);
    begin_chain(&image, "b", GRANULE);
    image.close().unwrap();
    model
}

/// Writes and goes away without closing, as a killed process does.
fn crash(desk: &Desk, random: &mut Random, model: &mut [u8], flushed: usize, lost: usize) {
    let image = open_file(&desk.path, writing());
    operate(&image, model, random, flushed);
    image.flush().unwrap();
    operate(&image, &mut model.to_vec(), random, lost);
    drop(image);
}

#[test]
fn qemu_opens_after_our_crash_and_the_chain_lives() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for cluster_bits in [12, 16, 21] {
        for (flushed, lost) in [(0, 1), (0, 8), (1, 0), (6, 0), (6, 6), (0, 30), (30, 1)] {
            let what = format!("clusters 2^{cluster_bits}, {flushed} flushed, {lost} not");
            let desk = Desk::new();
            let mut random = Random::stream(11, cases);
            let base = chained(&desk, cluster_bits, &mut random);
            let mut model = base.clone();
            crash(&desk, &mut random, &mut model, flushed, lost);
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            let mut content = qemu_img::convert_to_raw(&desk.path);
            if lost == 0 {
                assert!(content == model, "{what}: flushed data is lost");
            }
            assert_records(&desk, "b", &base, &content, &what);
            let before = desk.look(|image| image.load_bitmap("b").unwrap());
            qemu_operates(&desk.path, &mut content, &mut random, 3);
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            assert_records(&desk, "b", &base, &content, &what);
            desk.look(|image| {
                let after = image.load_bitmap("b").unwrap();
                assert!(after.contains(&before), "{what}: QEMU lost marks");
                assert_eq!(judge_chain(image), Health::Ok, "{what}");
                assert!(read_all(image) == content, "{what}: we read other bytes");
            });
            desk.session(|image| operate(image, &mut content, &mut random, 5));
            assert_records(&desk, "b", &base, &content, &what);
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            cases += 1;
        }
    }
    println!("{cases} crashes");
}

#[test]
fn commit_into_a_crashed_base_is_recorded() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut cases = 0;
    for cluster_bits in [12, 16] {
        for (flushed, lost) in [(0, 4), (5, 0), (5, 5)] {
            let what = format!("clusters 2^{cluster_bits}, {flushed} flushed, {lost} not");
            let desk = Desk::new();
            let mut random = Random::stream(12, cases);
            let base = chained(&desk, cluster_bits, &mut random);
            let mut model = base.clone();
            crash(&desk, &mut random, &mut model, flushed, lost);
            let overlay = desk.beside("overlay.qcow2");
            qemu_img::create_overlay(&overlay, "image.qcow2", "qcow2");
            let mut content = qemu_img::convert_to_raw(&overlay);
            qemu_operates(&overlay, &mut content, &mut random, 6);
            qemu_img::commit(&overlay);
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            assert!(
                qemu_img::convert_to_raw(&desk.path) == content,
                "{what}: commit differs"
            );
            assert_records(&desk, "b", &base, &content, &what);
            assert_eq!(desk.look(judge_chain), Health::Ok, "{what}");
            let ours = desk.look(|image| extents(&image.load_bitmap("b").unwrap()));
            assert_eq!(
                ours,
                nbd::dirty_extents(&desk.path, "b"),
                "{what}: over NBD"
            );
            cases += 1;
        }
    }
    println!("{cases} commits into a crashed base");
}

/// Loads a copy of the file as it is now, by us and by QEMU, and compares with the change.
fn judge_copy(desk: &Desk, number: usize, base: &[u8], flushed: &[u8], live: &Bitmap) {
    let copy = Desk::new();
    std::fs::copy(&desk.path, &copy.path).unwrap();
    let what = format!("copy {number}");
    qemu_img::check(&copy.path).assert_at_worst_leaks();
    let content = qemu_img::convert_to_raw(&copy.path);
    assert!(
        content == flushed,
        "{what}: flushed data is not in the copy"
    );
    assert_records(&copy, "b", base, &content, &what);
    copy.look(|image| {
        let bits = image.load_bitmap("b").unwrap();
        assert!(
            bits.contains(live),
            "{what}: the disk knows less than memory"
        );
        assert_eq!(judge_chain(image), Health::Ok, "{what}");
        assert!(read_all(image) == content);
    });
    // QEMU writes on the copy: its marks join ours.
    qemu_io::commands(&copy.path, &["write -P 0x77 8M 4096"]);
    let mut marked = Bitmap::new(live.shape());
    marked.mark(8 << 20..(8 << 20) + 4096).unwrap();
    let bits = copy.look(|image| image.load_bitmap("b").unwrap());
    assert!(
        bits.contains(live) && bits.contains(&marked),
        "{what}: QEMU does not record"
    );
}

#[test]
fn a_point_in_time_copy_of_a_running_image_has_valid_bitmaps() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut copies = 0;
    for cluster_bits in [12, 16, 21] {
        let desk = Desk::new();
        let mut random = Random::stream(13, cluster_bits.into());
        let base = chained(&desk, cluster_bits, &mut random);
        let mut model = base.clone();
        let image = open_file(&desk.path, writing());
        for _ in 0..4 {
            operate(&image, &mut model, &mut random, 5);
            image.flush().unwrap();
            let live = image.load_bitmap("b").unwrap();
            judge_copy(&desk, copies, &base, &model, &live);
            copies += 1;
        }
        image.close().unwrap();
        desk.assert_clean();
        assert_records(&desk, "b", &base, &model, "after the clean close");
    }
    println!("{copies} copies of a running image");
}

/// Not only at rest: between two flushes too, a copy that holds each write as it was issued.
#[test]
fn a_copy_between_flushes_misses_nothing_that_it_holds() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut copies = 0;
    for cluster_bits in [12, 16] {
        let desk = Desk::new();
        let mut random = Random::stream(14, cluster_bits.into());
        let base = chained(&desk, cluster_bits, &mut random);
        let image = open_file(&desk.path, writing());
        let mut model = base.clone();
        for number in 0..10 {
            operate(&image, &mut model, &mut random, 2);
            let copy = Desk::new();
            std::fs::copy(&desk.path, &copy.path).unwrap();
            let what = format!("clusters 2^{cluster_bits}, copy {number}");
            qemu_img::check(&copy.path).assert_at_worst_leaks();
            let content = qemu_img::convert_to_raw(&copy.path);
            assert_records(&copy, "b", &base, &content, &what);
            copies += 1;
        }
    }
    println!("{copies} copies between flushes");
}

/// A freeze in the middle of a life that ends in a crash: both bitmaps are whole for QEMU.
#[test]
fn a_freeze_before_a_crash_is_whole_for_qemu() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = Desk::new();
    let mut random = Random::new(15);
    let base = chained(&desk, 16, &mut random);
    let mut model = base.clone();
    let image = open_file(&desk.path, writing());
    operate(&image, &mut model, &mut random, 6);
    freeze(&image);
    let frozen = model.clone();
    operate(&image, &mut model, &mut random, 6);
    image.flush().unwrap();
    drop(image);
    qemu_operates(&desk.path, &mut model, &mut random, 3);
    qemu_img::check(&desk.path).assert_at_worst_leaks();
    assert_records(&desk, "c", &frozen, &model, "the new bitmap");
    let image = open_file(&desk.path, reading());
    assert_covers(
        &image.load_bitmap("b").unwrap(),
        &base,
        &frozen,
        "the frozen bitmap",
    );
    let stored = image_bits::bitmap(&desk.bytes(), "b").unwrap().unwrap();
    assert!(!stored.auto && !stored.in_use, "the frozen bitmap records");
    assert_eq!(to_u64(image.bitmaps().unwrap().len()), 2);
}

fn freeze(image: &Image) {
    image
        .update::<_, tidemark_qcow2::Error>(|update| {
            let old = update.load("b")?;
            let new = update.blank(granularity(GRANULE))?;
            update.put("b", old, false)?;
            update.put("c", new, true)
        })
        .unwrap();
}

/// Power cuts too: QEMU writes on images that a crash of the machine could leave.
#[test]
fn qemu_goes_on_recording_after_a_power_cut() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let (mut images, mut points) = (0, 0);
    for cluster_bits in [12, 16] {
        let desk = Desk::new();
        let mut random = Random::stream(16, cluster_bits.into());
        let base = chained(&desk, cluster_bits, &mut random);
        let storage = CrashStorage::new(desk.bytes());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let mut model = base.clone();
        for _ in 0..4 {
            operate(&image, &mut model, &mut random, 6);
            image.flush().unwrap();
        }
        image.close().unwrap();
        let log = storage.log();
        points += log.points();
        let options = CrashOptions::default();
        let step = log.images(options).count() / 24;
        for crash in log.images(options).step_by(step) {
            let desk = Desk::new();
            std::fs::write(&desk.path, &crash.bytes).unwrap();
            let mut content = qemu_img::convert_to_raw(&desk.path);
            qemu_operates(&desk.path, &mut content, &mut random, 2);
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            assert_records(&desk, "b", &base, &content, &crash.description);
            assert_eq!(desk.look(judge_chain), Health::Ok, "{}", crash.description);
            images += 1;
        }
    }
    println!("{images} images of {points} crash points");
}
