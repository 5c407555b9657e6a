//! The interface end to end, with every type that a caller meets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{create, domain, media, write};
use tidemark_checkpoint::{
    Checkpoint, CheckpointInfo, CreateFlags, DeleteFlags, DeleteWarning, Deleted, DiskChange,
    DiskDelta, DiskState, ListFlags, ListOptions, Listing, Rebuilt, SinceOptions, Tentative, Walk,
};

#[test]
fn a_chain_is_made_asked_and_taken_apart() {
    let media = media(2);
    let domain = domain(&media);
    let first: Checkpoint = create(&domain, "first");
    write(&domain, "vda", 70_000, 10, 1);
    let tentative: Tentative = domain
        .prepare(&common::spec("second"), CreateFlags::NONE)
        .unwrap();
    assert_eq!(tentative.name(), "second");
    let second = tentative.commit().unwrap();
    assert!(second.is_current().unwrap() && !first.is_current().unwrap());

    let options = ListOptions {
        judge: true,
        sizes: true,
        ..ListOptions::default()
    };
    let listing: Listing = domain.list(options).unwrap();
    let of_second: &CheckpointInfo = listing
        .checkpoints
        .iter()
        .find(|info| info.name == "second")
        .unwrap();
    assert_eq!(of_second.parent.as_deref(), Some("first"));
    let states: &[DiskState] = &of_second.disks;
    assert_eq!(states.len(), 2);
    assert!(
        states
            .iter()
            .all(|state| state.dirty_bytes.is_some() && !state.inferred)
    );

    let changes: Vec<DiskChange> = first.changed_since(SinceOptions::default()).unwrap();
    for change in &changes {
        let DiskDelta::Incremental(bits) = &change.delta else {
            panic!("{}", change.disk)
        };
        // On the other disk a bit may have been planted there.
        assert!(bits.test(70_000) || change.disk != "vda", "{}", change.disk);
    }

    let rebuilt: Rebuilt = domain.rebuild(false).unwrap();
    assert_eq!((rebuilt.checkpoints.len(), rebuilt.problems.len()), (2, 0));
    let tree = domain.tree().unwrap();
    let walk: Walk<'_> = tree.walk(None);
    assert_eq!(walk.count(), 2);
    assert_eq!(domain.checkpoints(ListFlags::LEAVES).unwrap().len(), 1);

    let deleted: Deleted = first.delete(DeleteFlags::NONE).unwrap();
    let warnings: &[DeleteWarning] = &deleted.warnings;
    assert!(warnings.is_empty());
    assert_eq!(
        second
            .parent()
            .unwrap()
            .map(|parent| parent.name().to_owned()),
        None
    );
}
