//! Overlays committed into a layer below, beside `qemu-img commit`.

use std::path::Path;
use std::sync::Arc;

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::transfer::{CommitOptions, Committed, commit};
use tidemark_qcow2::{
    CreateOptions, Error, FileStorage, Image, Mistake, NoFiles, PlainFiles, Result, Sharing,
};

use crate::common::{alone, create_file, open_file, read_all, reading};
use crate::rebase::quietly;
use crate::stack::{Folder, Layer, cases, text};

/// Commits the file `top` into the layer `base` below it.
pub(crate) fn commit_file(top: &Path, base: usize, empty: bool) -> Result<Committed> {
    let options = CommitOptions {
        gate: Arc::new(PlainFiles::default()),
        base,
        empty,
        threads: 3,
    };
    let storage = FileStorage::open(top, empty, Sharing::Exclusive).unwrap();
    commit(Box::new(storage), &options, &quietly)
}

/// The bytes of a layer's disk, seen through its chain.
fn content(folder: &Path, layer: &Layer) -> Vec<u8> {
    match layer.format {
        "raw" => std::fs::read(folder.join(&layer.name)).unwrap(),
        _ => qemu_img::convert_to_raw(&folder.join(&layer.name)),
    }
}

/// What a base shows afterwards: the disk, and behind its end what the base had there.
fn merged(disk: &[u8], old_base: &[u8]) -> Vec<u8> {
    let mut expected = disk.to_vec();
    if old_base.len() > disk.len() {
        expected.extend_from_slice(&old_base[disk.len()..]);
    }
    expected
}

struct Tally {
    commits: u64,
    wrong: u64,
    refused: u64,
}

#[test]
fn a_committed_base_shows_what_the_overlay_showed_and_so_does_qemus() {
    require_qemu!();
    let _alone = alone();
    let wanted = cases(40);
    let mut tally = Tally {
        commits: 0,
        wrong: 0,
        refused: 0,
    };
    for seed in 0..wanted {
        let mut folder = Folder::new(3000 + seed);
        let depth = usize::try_from(folder.random.within(2..5)).unwrap();
        let layers = folder.chain("layer", depth);
        let below = usize::try_from(folder.random.within(1..u64::try_from(depth).unwrap()));
        let below = match folder.random.one_in(2) {
            true => 1,
            false => below.unwrap(),
        };
        let empty = below == 1 && !folder.random.one_in(4);
        one(&folder, &layers, below, empty, &mut tally);
    }
    println!(
        "{} commits, {} of them wrong in QEMU, {} refused by QEMU",
        tally.commits, tally.wrong, tally.refused
    );
    assert!(tally.commits >= wanted.min(40));
    assert!(tally.wrong + tally.refused < tally.commits / 4);
}

fn one(folder: &Folder, layers: &[Layer], below: usize, empty: bool, tally: &mut Tally) {
    let (top, base) = (&layers[layers.len() - 1], &layers[layers.len() - 1 - below]);
    let what = format!("{:?}: {layers:?} into {base:?}, {empty}", folder.path(""));
    let theirs = folder.copy_all();
    let here = folder.folder.path();
    let disk = content(here, top);
    let expected = merged(&disk, &content(here, base));
    let committed = commit_file(&folder.path(&top.name), below, empty)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(committed.base.ends_with(&base.name));
    let shown = content(here, base);
    assert_eq!(shown.len(), expected.len(), "{what}: size of the base");
    assert!(shown == expected, "{what}: the base");
    assert!(
        content(here, top) == disk,
        "{what}: the overlay, read by QEMU"
    );
    assert!(
        read_all(&open_file(&folder.path(&top.name), reading())) == disk,
        "{what}: the overlay"
    );
    for layer in [top, base] {
        if layer.format == "qcow2" {
            qemu_img::check(&folder.path(&layer.name)).assert_clean();
        }
    }
    if empty {
        let check = qemu_img::check(&folder.path(&top.name));
        assert_eq!(check.count("allocated-clusters"), 0, "{what}");
    }
    tally.commits += 1;
    let (their_top, their_base) = (
        theirs.path().join(&top.name),
        theirs.path().join(&base.name),
    );
    let mut args = vec!["commit", "-q", "-f", "qcow2"];
    match (empty, below) {
        (true, _) => {}
        (false, 1) => args.push("-d"),
        (false, _) => args.extend(["-b", text(&their_base)]),
    }
    args.push(text(&their_top));
    let answer = qemu_img::run(&args);
    if !answer.success() {
        println!("{what}: QEMU: {}", answer.stderr);
        tally.refused += 1;
    } else if content(theirs.path(), base) != expected {
        println!("{what}: QEMU's base shows something else");
        tally.wrong += 1;
    }
}

fn problem(answer: Result<Committed>) -> String {
    match answer.unwrap_err() {
        Error::Invalid {
            mistake: Mistake::Option { problem, .. },
            ..
        } => problem.to_owned(),
        error => error.to_string(),
    }
}

#[test]
fn refusals_of_a_commit_come_before_the_first_write() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let over = |name: &str, below: Option<(&str, &str)>| {
        let backing = below.map(|(name, format)| tidemark_qcow2::BackingReference {
            name: name.as_bytes().to_vec(),
            format: format.to_owned(),
        });
        let options = CreateOptions {
            backing,
            ..CreateOptions::new(1 << 20)
        };
        let image = create_file(&file(name), &options);
        image.write(&[7; 5000], 70_000).unwrap();
        image.close().unwrap();
    };
    over("base", None);
    over("middle", Some(("base", "qcow2")));
    over("top", Some(("middle", "qcow2")));
    let files = ["base", "middle", "top"];
    let all = || files.map(|name| std::fs::read(file(name)).unwrap());
    let before = all();
    for (name, base, empty, words) in [
        ("base", 1, true, "no backing file"),
        ("top", 0, false, "no such layer"),
        ("top", 3, false, "no such layer"),
        ("top", 2, true, "only a commit into the backing file itself"),
    ] {
        let said = problem(commit_file(&file(name), base, empty));
        assert!(said.contains(words), "{name}: {said}");
    }
    let closed = CommitOptions {
        gate: Arc::new(NoFiles),
        ..CommitOptions::default()
    };
    let storage = FileStorage::open(&file("top"), true, Sharing::Exclusive).unwrap();
    let said = problem(commit(Box::new(storage), &closed, &quietly));
    assert!(said.contains("not opened"), "{said}");
    // Read-only, to be emptied.
    let options = CommitOptions {
        gate: Arc::new(PlainFiles::default()),
        ..CommitOptions::default()
    };
    let storage = FileStorage::open(&file("top"), false, Sharing::Exclusive).unwrap();
    assert!(commit(Box::new(storage), &options, &quietly).is_err());
    // Somebody reads the base.
    let reader = open_file(&file("middle"), reading());
    assert!(commit_file(&file("top"), 1, true).is_err());
    drop(reader);
    assert!(all() == before, "a refusal wrote something");
    // A cycle below.
    std::fs::copy(file("middle"), file("other")).unwrap();
    let image = open_file(&file("base"), crate::common::writing());
    let reference = tidemark_qcow2::BackingReference {
        name: b"middle".to_vec(),
        format: "qcow2".to_owned(),
    };
    image
        .set_backing(Some(&reference), tidemark_qcow2::Below::Same)
        .unwrap();
    let before = all();
    assert!(commit_file(&file("top"), 1, true).is_err());
    assert!(all() == before, "a refusal wrote something");
}

#[test]
fn an_overlay_with_internal_snapshots_is_not_committed() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(file("base"), vec![1; 1 << 20]).unwrap();
    let options = CreateOptions {
        backing: Some(crate::rebase_bitmaps::raw("base")),
        ..CreateOptions::new(1 << 20)
    };
    let image = create_file(&file("top"), &options);
    image.write(&[2; 5000], 0).unwrap();
    image.create_snapshot("s").unwrap();
    image.close().unwrap();
    let before = std::fs::read(file("top")).unwrap();
    for empty in [true, false] {
        let said = problem(commit_file(&file("top"), 1, empty));
        assert!(said.contains("internal snapshots"), "{said}");
    }
    assert!(std::fs::read(file("top")).unwrap() == before);
    assert!(std::fs::read(file("base")).unwrap() == vec![1; 1 << 20]);
}

/// The base is the one layer with snapshots: they keep their disks.
#[test]
fn snapshots_of_the_base_stay_as_they_are() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let base = create_file(&file("base"), &CreateOptions::new(1 << 20));
    base.write(&vec![1; 500_000], 0).unwrap();
    base.create_snapshot("s").unwrap();
    base.close().unwrap();
    let options = CreateOptions {
        cluster_bits: 12,
        backing: Some(tidemark_qcow2::BackingReference {
            name: b"base".to_vec(),
            format: "qcow2".to_owned(),
        }),
        ..CreateOptions::new(1 << 20)
    };
    let image = create_file(&file("top"), &options);
    image.write(&vec![2; 100_000], 450_000).unwrap();
    let disk = read_all(&image);
    image.close().unwrap();
    commit_file(&file("top"), 1, true).unwrap();
    let base = open_file(&file("base"), crate::common::writing());
    assert!(read_all(&base) == disk);
    base.apply_snapshot("s").unwrap();
    let mut old = vec![1; 500_000];
    old.resize(1 << 20, 0);
    assert!(read_all(&base) == old);
    assert_eq!(base.check().unwrap().exit_code(), 0);
}

/// What an emptied overlay held is free again, and goes on.
#[test]
fn an_emptied_overlay_goes_on_as_one() {
    let _alone = alone();
    let storage = CrashStorage::new(Vec::new());
    let gate = crate::rebase_bitmaps::bases();
    let options = CreateOptions {
        backing: Some(crate::rebase_bitmaps::raw("base")),
        ..CreateOptions::new(2 << 20)
    };
    let open = tidemark_qcow2::OpenOptions::writing(Arc::clone(&gate));
    let image = Image::create(Box::new(storage.clone()), &options, open.clone()).unwrap();
    image.write(&vec![4; 300_000], 0).unwrap();
    image.close().unwrap();
    let size = storage.to_bytes().len();
    let live = crate::stack::Live::new(gate.clone(), &["base"]);
    let options = CommitOptions {
        gate: Arc::new(live.clone()),
        ..CommitOptions::default()
    };
    for round in 0..4 {
        commit(Box::new(storage.clone()), &options, &quietly).unwrap();
        let open = tidemark_qcow2::OpenOptions::writing(Arc::new(live.clone()));
        let image = Image::open(Box::new(storage.clone()), open).unwrap();
        assert_eq!(image.check().unwrap().exit_code(), 0);
        image.write(&vec![5 + round; 300_000], 100_000).unwrap();
        image.close().unwrap();
    }
    assert!(
        storage.to_bytes().len() <= size + (4 << 16),
        "freed clusters are not used again"
    );
}
