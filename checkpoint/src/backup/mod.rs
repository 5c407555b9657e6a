//! Push backups: the moment of a domain's disks, copied into a directory that needs nobody else.
//!
//! Each [`backup`] adds one *point* to a directory: one manifest, and for each disk one target and
//! one file of block hashes. A full target holds the disk; an increment holds what changed since
//! another point, which is its backing file, so that `qemu-img convert` restores any point
//! without us.
//!
//! # Invariants
//! 1. A point exists when its manifest does. The manifest is published last, whole and once;
//!    files under a temporary name belong to nobody.
//! 2. An increment holds every cluster that a changed byte touches, each filled from the disk at
//!    the moment; one that reads as zero is an explicit zero cluster. Nothing of it is inherited.
//! 3. What an increment builds on is found by the identity of the checkpoint, never by its name.
//!    Where there is no such backup the disk is copied in full, alone, with the reason.
//! 4. A published file is never changed. Every byte of a target that can change what it says is
//!    under a 256-bit hash, and every hash is under the manifest's own.
//! 5. All paths in a manifest are plain names in its directory, which can be moved as a whole.
//!
//! The new checkpoint and the backup are one transaction: the checkpoint is prepared on all disks
//! first, so that its bitmaps record while the data is copied; it is committed when the manifest
//! is durable. An error takes both back. A process that dies in between leaves a prepared
//! checkpoint: [`resume`] makes it real if the manifest was published, else [`cancel`] ends it.
//! Files under a temporary name that it left can be removed; [`verify()`] lists them.
//!
//! It does not keep a disk still: whoever writes to the images meanwhile gets a backup in which
//! blocks are of different moments, though no later increment misses one of them.

mod base;
mod catalogue;
mod compare;
mod copy;
mod error;
mod files;
mod fill;
mod hashes;
mod hex;
mod layout;
mod manifest;
mod options;
mod pieces;
mod point;
mod reader;
mod restore;
mod run;
mod target;
mod units;
mod verify;

pub use catalogue::{Catalogue, Link, catalogue};
pub use compare::{differences, differences_between};
pub use error::{Error, Result};
pub use fill::{Filled, fill, fill_from_image};
pub use manifest::{Backing, DiskEntry, Format, Manifest, Mode, Since};
pub use options::{BackupOptions, DiskReport, Progress, Report, Watch};
pub use restore::{RestoreOptions, Restored, restore};
pub use run::{backup, cancel, resume};
pub use verify::{Defect, Finding, Verification, verify};
