//! Bytes to checked values and back: no I/O, no locks, no policy.
//!
//! One structure is one file; the layout of each is drawn once, in the rustdoc of its type. Names
//! are those of the qcow2 specification (QEMU's `docs/interop/qcow2`) where it has one.

pub mod bitmap;
pub mod chain;
pub mod encryption;
pub mod extension;
pub mod header;
pub mod limits;
pub mod part;
pub mod refcount;
pub mod snapshot;
pub mod subclusters;
pub mod table;
