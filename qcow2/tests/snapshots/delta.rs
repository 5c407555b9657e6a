//! `delta`: what differs between two moments, against the bytes themselves.

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{Delta, Image, Moment};

use crate::common::{self, alone};
use crate::life::{Disk, MIB, Place, SHAPES, assert_covers, qemu_life, text};

/// Compares every pair of moments; returns how many there were.
pub(crate) fn assert_deltas(image: &Image, disk: &Disk, what: &str) -> usize {
    let present = (Moment::Present, disk.content.as_slice());
    let moments: Vec<(Moment<'_>, &[u8])> = disk
        .snapshots
        .iter()
        .map(|(name, content)| (Moment::Snapshot(name), content.as_slice()))
        .chain([present])
        .collect();
    let mut pairs = 0;
    for (from, old) in &moments {
        for (to, new) in &moments {
            let delta: Delta = image.delta(*from, *to).unwrap();
            let what = format!("{what}: {from:?} to {to:?}");
            assert_eq!(
                delta.changed.shape().disk_bytes(),
                u64::try_from(new.len()).unwrap()
            );
            assert_covers(&delta.changed, old, new, &what);
            assert!(delta.below.is_clean(), "{what}");
            assert!(from != to || delta.changed.is_clean(), "{what}");
            pairs += 1;
        }
    }
    pairs
}

#[test]
fn a_delta_covers_every_byte_that_differs() {
    let _alone = alone();
    require_qemu!();
    let mut pairs = 0;
    for (seed, opts) in (20..).zip(SHAPES) {
        let place = Place::new();
        let disk = qemu_life(&place.path, 3 * MIB + 512, opts, 3, seed);
        pairs += assert_deltas(&place.open(), &disk, &format!("{opts:?}"));
    }
    println!("{pairs} pairs of moments");
    assert!(pairs >= 105);
}

#[test]
fn a_delta_names_only_clusters_whose_mapping_moved() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    qemu_img::create(&place.path, 64 * MIB, &[]);
    qemu_io::commands(&place.path, &["write -P 1 0 32M"]);
    qemu_img::ok(&["snapshot", "-q", "-c", "old", text(&place.path)]);
    qemu_io::commands(&place.path, &["write -P 2 5M 100", "write -P 2 40M 64k"]);
    let delta = place.open().delta(Moment::Snapshot("old"), Moment::Present);
    let ranges: Vec<_> = delta.unwrap().changed.dirty_ranges().collect();
    let cluster = 65536;
    assert_eq!(
        ranges,
        [5 * MIB..5 * MIB + cluster, 40 * MIB..40 * MIB + cluster]
    );
}

#[test]
fn what_a_disk_did_not_have_counts_as_changed() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    let disk = qemu_life(&place.path, MIB, &[], 1, 3);
    qemu_img::resize(&place.path, 2 * MIB);
    let image = place.open();
    let grown = image
        .delta(Moment::Snapshot("s0"), Moment::Present)
        .unwrap();
    assert_covers(
        &grown.changed,
        disk.snapshot("s0"),
        &common::read_all(&image),
        "grown",
    );
    assert!(
        grown
            .changed
            .dirty_ranges()
            .any(|range| range.end == 2 * MIB)
    );
    let back = image
        .delta(Moment::Present, Moment::Snapshot("s0"))
        .unwrap();
    assert_eq!(back.changed.shape().disk_bytes(), MIB);
    assert_covers(&back.changed, &disk.content, disk.snapshot("s0"), "cut");
}

#[test]
fn with_a_backing_file_what_nobody_maps_is_told_apart() {
    let _alone = alone();
    require_qemu!();
    let place = Place::new();
    let base = place.beside("base.qcow2");
    qemu_img::create(&base, 4 * MIB, &[]);
    qemu_io::commands(&base, &["write -P 7 0 4M"]);
    qemu_img::create_overlay(&place.path, text(&base), "qcow2");
    qemu_io::commands(&place.path, &["write -P 1 1M 64k"]);
    qemu_img::ok(&["snapshot", "-q", "-c", "old", text(&place.path)]);
    qemu_io::commands(&place.path, &["write -P 2 2M 64k"]);
    let image = place.open();
    let delta = image
        .delta(Moment::Snapshot("old"), Moment::Present)
        .unwrap();
    let mut changed = delta.changed.dirty_ranges();
    assert_eq!(changed.next(), Some(2 * MIB..2 * MIB + 65536));
    assert_eq!(changed.next(), None);
    let below: Vec<_> = delta.below.dirty_ranges().collect();
    assert_eq!(
        below,
        [0..MIB, MIB + 65536..2 * MIB, 2 * MIB + 65536..4 * MIB]
    );
}
