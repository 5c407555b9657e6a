//! `demo`: the story ends well, and keeps what it was told to keep.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, has_keys};

#[test]
fn the_demo_holds_all_its_comparisons_and_leaves_nothing() {
    let place = Place::new();
    let told = place.ok("demo");
    assert!(told.contains(" 0 failed."), "{told}");
    assert!(!told.contains("[FAILED]"), "{told}");
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn the_demo_keeps_a_directory_that_must_be_empty() {
    let place = Place::new();
    let answer = place.json("demo kept");
    has_keys(&answer, &["comparisons", "failed", "directory"]);
    assert_eq!(answer["failed"], serde_json::json!([]));
    assert!(answer["comparisons"].as_u64().unwrap() > 10);
    place.ok("check kept/disk.qcow2");
    place.ok("verify kept/backups");
    place.run("demo kept").ends_with(1);
}
