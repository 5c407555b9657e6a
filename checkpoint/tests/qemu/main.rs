//! Checkpoints on image files that QEMU uses too: what goes wrong in the field, row by row; what
//! QEMU's commands do to a chain; chains that QEMU's own sessions left.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod anchors;
#[path = "../common/mod.rs"]
mod common;
mod desk;
mod failures;
mod layers;
mod more_failures;
mod rebuilds;
mod schemes;
mod survival;
