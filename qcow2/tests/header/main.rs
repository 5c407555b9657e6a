//! The first cluster: room for QEMU's own rewrite, and every tear of every write to it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod desk;
mod room;
mod tear;
mod view;
mod walk;
