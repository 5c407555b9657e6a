//! Hostile and broken images: a typed answer, nothing written, no panic, bounded time and memory.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backing;
mod cases;
mod chain;
mod mutations;
mod probe;
mod table;
mod traps;
mod world;
