//! Overlays moved onto another base, beside `qemu-img rebase`: the disk stays, byte for byte.

use std::sync::Arc;

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::transfer::{RebaseOptions, Rebased, rebase};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Feature, Image, Mistake, PlainFiles, Result,
};

use crate::common::{self, alone, create_file, open_file, read_all, reading, writing};
use crate::stack::{Folder, Layer, Named, cases, copy, text};

pub(crate) fn options(threads: usize) -> RebaseOptions {
    RebaseOptions {
        gate: Arc::new(PlainFiles::default()),
        threads,
    }
}

pub(crate) fn quietly(_done: u64, _total: u64) {}

fn move_onto(image: Image, layer: Option<&Layer>, threads: usize) -> Result<Rebased> {
    let reference = layer.map(Layer::reference);
    rebase(image, reference.as_ref(), &options(threads), &quietly)
}

fn qemu_rebase(path: &std::path::Path, layer: Option<&Layer>) {
    let mut args = vec!["rebase", "-f", "qcow2"];
    match layer {
        Some(layer) => args.extend(["-b", &layer.name, "-F", layer.format]),
        None => args.extend(["-b", ""]),
    }
    args.push(text(path));
    qemu_img::ok(&args);
}

#[test]
fn a_rebased_disk_reads_the_same_as_qemus_and_as_before() {
    require_qemu!();
    let _alone = alone();
    let wanted = cases(48);
    let (mut moved, mut smaller, mut wrong) = (0, 0, 0);
    for seed in 0..wanted {
        let mut folder = Folder::new(seed);
        let depth = folder.random.within(0..3);
        let old = folder.chain("old", usize::try_from(depth).unwrap());
        let overlay = folder.layer("overlay", old.last()).name;
        let depth = folder.random.within(0..4);
        let new = folder.chain("new", usize::try_from(depth).unwrap());
        let what = format!("stack {seed}: {old:?} {new:?}");
        let before = qemu_img::convert_to_raw(&folder.path(&overlay));
        let ours = copy(&folder, &overlay, "ours");
        let theirs = copy(&folder, &overlay, "theirs");
        let image = open_file(&ours, writing());
        let threads = usize::try_from(1 + seed % 4).unwrap();
        move_onto(image, new.last(), threads).unwrap_or_else(|error| panic!("{what}: {error}"));
        qemu_rebase(&theirs, new.last());
        // The old base is no longer needed.
        for layer in &old {
            std::fs::remove_file(folder.path(&layer.name)).unwrap();
        }
        assert!(qemu_img::convert_to_raw(&ours) == before, "{what}");
        assert!(read_all(&open_file(&ours, reading())) == before, "{what}");
        // QEMU stores no zeros in a version 2 image that has no backing file yet: they show the new one.
        let version_2 = qemu_img::info(&ours)["format-specific"]["data"]["compat"] == "0.10";
        let fooled = version_2 && old.is_empty();
        let right = qemu_img::convert_to_raw(&theirs) == before;
        assert!(right || fooled, "{what}: QEMU");
        wrong += u64::from(!right);
        qemu_img::check(&ours).assert_clean();
        let allocated = |path| qemu_img::check(path).count("allocated-clusters");
        let (mine, qemus) = (allocated(&ours), allocated(&theirs));
        assert!(
            mine <= qemus || fooled,
            "{what}: {mine} clusters, QEMU has {qemus}"
        );
        smaller += u64::from(mine < qemus);
        let info = open_file(&ours, reading()).backing();
        assert_eq!(info, new.last().map(Layer::reference), "{what}");
        moved += 1;
    }
    println!("{moved} overlays moved, {smaller} smaller than QEMU's, {wrong} changed by QEMU");
    assert!(moved >= wanted.min(48));
}

#[test]
fn the_name_alone_changes_as_in_qemu() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for seed in 0..8 {
        let mut folder = Folder::new(1000 + seed);
        let old = folder.chain("old", 1);
        let overlay = folder.layer("overlay", old.last()).name;
        let new = folder.chain("new", 2);
        for target in [Some(&new[1]), Some(&old[0]), None] {
            let ours = copy(&folder, &overlay, "ours");
            let theirs = copy(&folder, &overlay, "theirs");
            let image = open_file(&ours, writing());
            image
                .set_backing(target.map(Layer::reference).as_ref(), below())
                .unwrap();
            match target {
                Some(layer) => qemu_img::rebase_unsafe(&theirs, &layer.name, layer.format),
                None => {
                    let path = text(&theirs);
                    qemu_img::ok(&["rebase", "-u", "-f", "qcow2", "-b", "", path]);
                }
            }
            assert!(qemu_img::compare((&ours, "qcow2"), (&theirs, "qcow2")));
            let seen = read_all(&open_file(&ours, reading()));
            assert!(seen == qemu_img::convert_to_raw(&theirs));
            qemu_img::check(&ours).assert_clean();
            cases += 1;
        }
    }
    println!("{cases} names");
    assert_eq!(cases, 24);
}

fn below() -> tidemark_qcow2::Below {
    tidemark_qcow2::Below::Unknown
}

/// An overlay over `base`, and a further base, in memory.
fn small(version: u32) -> (Vec<u8>, Named) {
    let fill = |byte: u8| vec![byte; 1 << 20];
    let gate = Named::default()
        .with("base", fill(1))
        .with("other", fill(2));
    let storage = tidemark_fixtures::storage::CrashStorage::new(Vec::new());
    let options = CreateOptions {
        version,
        backing: Some(named("base")),
        ..CreateOptions::new(1 << 20)
    };
    let open = tidemark_qcow2::OpenOptions::writing(Arc::new(gate.clone()));
    let image = Image::create(Box::new(storage.clone()), &options, open).unwrap();
    image.write(&[9; 5000], 100_000).unwrap();
    image.close().unwrap();
    (storage.to_bytes(), gate)
}

fn named(name: &str) -> BackingReference {
    BackingReference {
        name: name.as_bytes().to_vec(),
        format: "raw".to_owned(),
    }
}

fn problem(answer: Result<Rebased>) -> String {
    match answer.unwrap_err() {
        Error::Invalid {
            mistake: Mistake::Option { problem, .. },
            ..
        } => problem.to_owned(),
        Error::Unsupported { feature, .. } => match feature {
            Feature::Backing { reason, .. } => reason,
            feature => feature.to_string(),
        },
        error => error.to_string(),
    }
}

#[test]
fn refusals_come_before_the_first_write() {
    let _alone = alone();
    let (bytes, gate) = small(3);
    let gate: Arc<dyn tidemark_qcow2::Gate> = Arc::new(gate);
    let storage = tidemark_fixtures::storage::CrashStorage::new(bytes.clone());
    let options = RebaseOptions {
        gate: Arc::clone(&gate),
        threads: 2,
    };
    let open = || {
        let open = tidemark_qcow2::OpenOptions::writing(Arc::clone(&gate));
        Image::open(Box::new(storage.clone()), open).unwrap()
    };
    let onto =
        |reference: &BackingReference| problem(rebase(open(), Some(reference), &options, &quietly));
    let with = |name: &str, format: &str| BackingReference {
        name: name.as_bytes().to_vec(),
        format: format.to_owned(),
    };
    let mut asked = 0;
    for (reference, words) in [
        (with("missing", "raw"), "no such layer"),
        (with("other", "vmdk"), "not supported"),
        (with("other", ""), "1 to 15 bytes"),
        (with("other", "a name that is too long"), "1 to 15 bytes"),
        (with("", "raw"), "1 to 1023 bytes"),
        (with(&"x".repeat(1024), "raw"), "1 to 1023 bytes"),
        (with("a\0b", "raw"), "NUL"),
    ] {
        let said = onto(&reference);
        assert!(said.contains(words), "{reference:?}: {said}");
        asked += 1;
    }
    let unbacked = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    let said = problem(rebase(unbacked, Some(&named("other")), &options, &quietly));
    assert!(said.contains("without its present"), "{said}");
    let readonly = {
        let open = tidemark_qcow2::OpenOptions::reading(Arc::clone(&gate));
        Image::open(Box::new(storage.clone()), open).unwrap()
    };
    assert!(rebase(readonly, Some(&named("other")), &options, &quietly).is_err());
    assert!(storage.to_bytes() == bytes, "a refusal wrote something");
    open().create_snapshot("s").unwrap();
    let bytes = storage.to_bytes();
    let said = onto(&named("other"));
    assert!(said.contains("snapshots"), "{said}");
    assert!(storage.to_bytes() == bytes, "a refusal wrote something");
    println!("{} refusals", asked + 3);
}

#[test]
fn an_overlay_is_not_moved_onto_what_stands_on_it() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(file("base"), vec![1; 1 << 20]).unwrap();
    let over = |name: &str, below: BackingReference| {
        let options = CreateOptions {
            backing: Some(below),
            ..CreateOptions::new(1 << 20)
        };
        create_file(&file(name), &options).close().unwrap();
    };
    over("middle", named("base"));
    let middle = BackingReference {
        name: b"middle".to_vec(),
        format: "qcow2".to_owned(),
    };
    over("top", middle.clone());
    let top = BackingReference {
        name: b"top".to_vec(),
        ..middle.clone()
    };
    let before = std::fs::read(file("middle")).unwrap();
    for reference in [&top, &middle] {
        // With and without locks in the way.
        for sharing in [
            tidemark_qcow2::Sharing::Exclusive,
            tidemark_qcow2::Sharing::ForceShare,
        ] {
            let options = RebaseOptions {
                gate: Arc::new(PlainFiles {
                    sharing,
                    ..PlainFiles::default()
                }),
                threads: 1,
            };
            let image = common::open_file(&file("middle"), writing());
            let answer = rebase(image, Some(reference), &options, &quietly);
            let said = problem(answer);
            println!("{said}");
        }
    }
    assert!(std::fs::read(file("middle")).unwrap() == before);
}

#[test]
fn version_2_has_no_zero_clusters_and_is_moved_all_the_same() {
    let _alone = alone();
    for (from, onto) in [(Some("base"), Some("other")), (Some("base"), None)] {
        let (bytes, gate) = small(2);
        assert!(from.is_some());
        let gate: Arc<dyn tidemark_qcow2::Gate> = Arc::new(gate.with("zeros", vec![0; 700_000]));
        let storage = tidemark_fixtures::storage::CrashStorage::new(bytes);
        let open = || {
            let open = tidemark_qcow2::OpenOptions::writing(Arc::clone(&gate));
            Image::open(Box::new(storage.clone()), open).unwrap()
        };
        let before = read_all(&open());
        let options = RebaseOptions {
            gate: Arc::clone(&gate),
            threads: 3,
        };
        for name in [onto, Some("zeros"), Some("base"), None] {
            let reference = name.map(named);
            rebase(open(), reference.as_ref(), &options, &quietly).unwrap();
            assert!(read_all(&open()) == before, "{name:?}");
        }
    }
}
