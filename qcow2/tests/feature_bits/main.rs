//! What the bits of the header ask for: encryption, lazy refcounts, dirty, corrupt.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

#[path = "../check/corpus.rs"]
mod corpus;
mod corrupt;
mod dirty;
mod encrypted;
mod snapshots;
