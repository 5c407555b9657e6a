//! The corrupt bit: honoured, and set by a write that meets damage, without losing anything.

use tidemark_fixtures::corrupt::{get_u64, set_u64};
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::{CallKind, CrashOptions, CrashStorage, Fault, FaultyStorage};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Damage, Error, FileStorage, Image, Mistake, Sharing,
};

use crate::common::{
    add_bitmap, alone, assert_covers, built, create_file, open_bytes, open_file, read_all, reading,
    try_open_file, writing,
};

const SIZE: u64 = 4 << 20;
/// Disk of one L2 table with clusters of 512 bytes.
const TABLE: u64 = 32 << 10;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

type Patch = fn(&mut Vec<u8>, u64);

/// Damages of the first L2 table that any write meets; each is given the table's place.
const OVERLAPS: &[(&str, Patch)] = &[
    ("data on the refcount table", |bytes, l2| {
        let table = get_u64(bytes, 48);
        set_u64(bytes, l2, 1 << 63 | table);
    }),
    ("data on its own L2 table", |bytes, l2| {
        set_u64(bytes, l2, 1 << 63 | l2);
    }),
];

/// Damages that only a write below that table meets.
const DAMAGES: &[(&str, Patch)] = &[
    ("data behind the end of the file", |bytes, l2| {
        set_u64(bytes, l2, 1 << 63 | 1 << 40);
    }),
    ("data that is not aligned", |bytes, l2| {
        let entry = get_u64(bytes, l2);
        set_u64(bytes, l2, entry + 512);
    }),
];

/// A disk with data everywhere in the first and the fifth L2 table, and a bitmap.
fn healthy(cluster_bits: u32, version: u32) -> Vec<u8> {
    let options = CreateOptions {
        cluster_bits,
        version,
        ..CreateOptions::new(SIZE)
    };
    built(&options, |image| {
        image.write(&vec![0xaa; 20_000], 0).unwrap();
        image.write(&vec![0xbb; 20_000], 4 * TABLE).unwrap();
        if version == 3 {
            add_bitmap(image, "b", 4096);
        }
    })
}

fn damaged(version: u32, damage: Patch) -> Vec<u8> {
    // With clusters of 512 bytes no offset in an entry can be unaligned.
    let mut bytes = healthy(if version == 3 { 10 } else { 9 }, version);
    let l2 = get_u64(&bytes, get_u64(&bytes, 40)) & OFFSET;
    damage(&mut bytes, l2);
    bytes
}

fn is_marked(bytes: &[u8]) -> bool {
    get_u64(bytes, 72) & 2 != 0
}

/// Whether an error says that nothing is changed any more.
fn has_ended(error: &Error) -> bool {
    matches!(error.damage(), Some(Damage::MarkedCorrupt))
}

#[test]
fn a_write_that_meets_damage_marks_the_image_and_ends_all_changes() {
    for (name, damage) in DAMAGES {
        let bytes = damaged(3, *damage);
        let storage = CrashStorage::new(bytes.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let far = 10 * TABLE * 4;
        image.write(&[1; 3000], far).unwrap();
        assert!(!is_marked(&storage.to_bytes()));
        let error = image.write(&[2; 512], 100).unwrap_err();
        assert!(
            error.damage().is_some() && !has_ended(&error),
            "{name}: {error}"
        );
        assert!(is_marked(&storage.to_bytes()), "{name}: not marked");
        assert!(image.is_marked_corrupt());
        for error in [
            image.write(&[3; 512], far).unwrap_err(),
            image.write_zeroes(far, 4096).unwrap_err(),
            image.discard(far, 4096).unwrap_err(),
            image.update(|update| update.remove("b")).unwrap_err(),
        ] {
            assert!(has_ended(&error), "{name}: {error}");
        }
        // What was done before is there, and the bitmap knows it.
        let mut read = vec![0; 3000];
        image.read(&mut read, far).unwrap();
        assert_eq!(read, [1; 3000], "{name}");
        image.flush().unwrap();
        image.close().unwrap();
        let after = storage.to_bytes();
        let error = open_bytes(after.clone(), writing()).unwrap_err();
        assert!(has_ended(&error), "{name}: {error}");
        let image = open_bytes(after, reading()).unwrap();
        image.read(&mut read, far).unwrap();
        assert_eq!(read, [1; 3000], "{name}");
        let bits = image.load_bitmap("b").unwrap();
        assert!(bits.test(far) && bits.test(far + 2999));
    }
    println!("{} damages", DAMAGES.len());
}

#[test]
fn data_on_metadata_marks_the_image_at_the_first_write_anywhere() {
    for (name, damage) in OVERLAPS {
        let bytes = damaged(3, *damage);
        let storage = CrashStorage::new(bytes.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let far = 10 * TABLE * 4;
        let error = image.write(&[1; 3000], far).unwrap_err();
        let overlap = matches!(error.damage(), Some(Damage::Overlap { .. }));
        assert!(overlap, "{name}: {error}");
        assert!(image.is_marked_corrupt(), "{name}: not marked");
        assert!(has_ended(&image.discard(far, 4096).unwrap_err()));
        image.close().unwrap();
        let mut wanted = bytes;
        wanted[79] |= 2;
        assert!(storage.to_bytes() == wanted, "{name}: more than the mark");
    }
}

#[test]
fn reading_damage_and_refusing_to_begin_write_nothing() {
    for (name, damage) in OVERLAPS.iter().chain(DAMAGES) {
        let bytes = damaged(3, *damage);
        let storage = CrashStorage::new(bytes.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        let _ = image.read(&mut [0; 512], 0);
        let _ = image.map(0, SIZE);
        image.close().unwrap();
        assert!(storage.to_bytes() == bytes, "{name}");
    }
}

#[test]
fn version_2_has_no_bit_and_ends_all_the_same() {
    let (_, damage) = DAMAGES[0];
    let bytes = damaged(2, damage);
    let storage = CrashStorage::new(bytes.clone());
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    image.write(&[1; 512], 10 * TABLE).unwrap();
    assert!(image.write(&[2; 512], 0).is_err());
    assert!(has_ended(&image.write(&[3; 512], 10 * TABLE).unwrap_err()));
    image.close().unwrap();
    assert_eq!(storage.to_bytes()[..72], bytes[..72]);
}

#[test]
fn every_crash_while_an_image_is_marked_leaves_what_was_flushed() {
    let (_, damage) = DAMAGES[0];
    let bytes = damaged(3, damage);
    let start = read_all_but_the_first(&open_bytes(bytes.clone(), reading()).unwrap());
    let storage = CrashStorage::new(bytes);
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let far = 40 * TABLE;
    image.write(&[1; 5000], far).unwrap();
    image.flush().unwrap();
    storage.note(1);
    image.write(&[2; 5000], far + 70_000).unwrap();
    assert!(image.write(&[3; 512], 0).is_err());
    image.close().unwrap();
    let log = storage.log();
    let (mut images, mut marked) = (0, 0);
    for crash in log.images(CrashOptions::default()) {
        let image = open_bytes(crash.bytes.clone(), reading()).unwrap();
        let content = read_all_but_the_first(&image);
        let at = usize::try_from(far - TABLE * 4).unwrap();
        let flushed = !log.notes_before(crash.position).is_empty();
        let first = &content[at..at + 5000];
        assert!(!flushed || first == [1; 5000], "{}", crash.description);
        let bits = image.load_bitmap("b").unwrap();
        let step = usize::try_from(bits.shape().granularity().bytes()).unwrap();
        let skipped = usize::try_from(TABLE * 4).unwrap();
        for (number, (old, new)) in start.chunks(step).zip(content.chunks(step)).enumerate() {
            let place = u64::try_from(skipped + number * step).unwrap();
            assert!(old == new || bits.test(place), "{}", crash.description);
        }
        images += 1;
        marked += usize::from(is_marked(&crash.bytes));
    }
    println!(
        "{} points, {images} images, {marked} of them marked",
        log.points()
    );
    assert!(images >= 30 && marked >= 1 && marked < images);
}

/// Content without the damaged table.
fn read_all_but_the_first(image: &Image) -> Vec<u8> {
    let from = TABLE * 4;
    let mut content = vec![0; usize::try_from(image.size() - from).unwrap()];
    image.read(&mut content, from).unwrap();
    content
}

#[test]
fn a_mark_that_cannot_be_written_still_ends_all_changes() {
    let (_, damage) = DAMAGES[0];
    let bytes = damaged(3, damage);
    let mut runs = 0;
    for at in 0.. {
        let below = CrashStorage::new(bytes.clone());
        let storage = FaultyStorage::new(below.clone());
        let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
        image.write(&[1; 512], 40 * TABLE).unwrap();
        image.flush().unwrap();
        storage.arm(Fault::once(CallKind::CHANGES, at));
        assert!(image.write(&[3; 512], 0).is_err());
        let fired = storage.fired() > 0;
        let error = image.write(&[4; 512], 40 * TABLE).unwrap_err();
        let poisoned = matches!(error.mistake(), Some(Mistake::Poisoned));
        assert!(has_ended(&error) || poisoned, "call {at}: {error}");
        drop(image);
        let image = open_bytes(below.to_bytes(), reading()).unwrap();
        let mut read = [0; 512];
        image.read(&mut read, 40 * TABLE).unwrap();
        assert_eq!(read, [1; 512], "call {at}");
        runs += 1;
        if !fired {
            break;
        }
    }
    println!("{runs} runs");
    assert!(runs >= 3);
}

#[test]
fn damage_of_a_backing_file_marks_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    // An unaligned cluster: reading fails.
    let (_, damage) = DAMAGES[1];
    let bytes = damaged(3, damage);
    std::fs::write(&base, &bytes).unwrap();
    let options = CreateOptions {
        backing: Some(BackingReference {
            name: b"base".to_vec(),
            format: "qcow2".to_owned(),
        }),
        ..CreateOptions::new(SIZE)
    };
    create_file(&top, &options).close().unwrap();
    let image = open_file(&top, writing());
    assert!(image.write(&[1; 100], 0).is_err());
    assert!(!image.is_marked_corrupt());
    image.write(&[1; 65_536], 2 << 20).unwrap();
    image.close().unwrap();
    assert!(std::fs::read(&base).unwrap() == bytes);
    assert!(!is_marked(&std::fs::read(&top).unwrap()));
}

#[test]
fn marks_are_understood_in_both_directions() {
    require_qemu!();
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let mut cases = 0;
    for (name, damage) in DAMAGES {
        let bytes = damaged(3, *damage);
        // QEMU marks, we understand. Behind the end of the file it would go on writing there.
        let far = name.contains("behind");
        std::fs::write(&path, &bytes).unwrap();
        if !far {
            qemu_io::run(&["-f", "qcow2"], &["write 0 512"], path.to_str().unwrap());
            assert!(is_marked(&std::fs::read(&path).unwrap()), "{name}");
            let before = std::fs::read(&path).unwrap();
            let error = try_open_file(&path, writing()).unwrap_err();
            assert!(has_ended(&error), "{name}: {error}");
            let image = open_file(&path, reading());
            assert!(image.is_marked_corrupt());
            let mut read = vec![0; 20_000];
            image.read(&mut read, 4 * TABLE).unwrap();
            assert_eq!(read, [0xbb; 20_000]);
            drop(image);
            assert!(std::fs::read(&path).unwrap() == before);
            cases += 1;
        }
        // We mark, QEMU understands.
        std::fs::write(&path, &bytes).unwrap();
        let image = open_file(&path, writing());
        assert!(image.write(&[1; 512], 0).is_err());
        image.close().unwrap();
        let info = qemu_img::info(&path);
        assert_eq!(info["format-specific"]["data"]["corrupt"], true, "{name}");
        let refused = qemu_io::run(&["-f", "qcow2"], &["write 0 512"], path.to_str().unwrap());
        assert!(
            refused.stderr.contains("corrupt"),
            "{name}: {}",
            refused.stderr
        );
        let read = format!("read -P 0xbb {} 20000", 4 * TABLE);
        qemu_io::read_only(&path, &[&read]);
        cases += 1;
    }
    println!("{cases} cases");
    assert_eq!(cases, 2 * DAMAGES.len() - 1);
}

#[test]
fn a_marked_image_is_left_as_it_is() {
    let mut bytes = healthy(16, 3);
    let content = read_all(&open_bytes(bytes.clone(), reading()).unwrap());
    set_u64(&mut bytes, 72, 2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    std::fs::write(&path, &bytes).unwrap();
    let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
    let error = Image::open_unbacked(Box::new(storage), true).unwrap_err();
    assert!(has_ended(&error));
    let image = open_file(&path, reading());
    assert!(read_all(&image) == content);
    assert_covers(&image.load_bitmap("b").unwrap(), &content, &content, "bits");
    drop(image);
    assert!(std::fs::read(&path).unwrap() == bytes);
}
