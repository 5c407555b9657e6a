//! Internal snapshots: made by QEMU and used by us, made by us and used by QEMU; contents compared
//! for the present and for every snapshot.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod delta;
mod faults;
mod kinds;
mod life;
mod lives;
mod reading;
mod sizes;
mod turns;
