//! Checkpoints of a domain: named moments of a set of qcow2 disks, by which one can ask later
//! what changed.
//!
//! A checkpoint stores no data. It lives in the images themselves: a dirty bitmap of its name on
//! every disk that takes part, and an entry in the image's chain record that knows its identity,
//! its parent and the proof of its bits. A descriptor outside (one XML file) adds a description
//! and the domain's definition; without it everything still works.
//!
//! # What this crate owns
//! - Who is whose parent, who is listed, what a deletion means: [`Tree`], [`mod@list`],
//!   [`delete::plan`]. Pure.
//! - The interface, after libvirt's proposal of 2018: [`Domain`] and [`Checkpoint`].
//! - The operations on images: [`create`], [`delete`], [`delta`], [`rebuild`], [`recover`].
//! - Descriptors outside the images, in [`store`].
//!
//! # Invariants
//! 1. For every checkpoint, "changed since" is a superset of the bytes that differ, or says that
//!    the disk must be full, and why.
//! 2. A creation is on all its disks or on none. A deletion that stopped half way is finished by
//!    repeating it.
//! 3. Reading writes nothing, and every refusal comes before the first write.
//! 4. Names are for people. Checkpoints are told apart by identity.
//! 5. What is inferred is labelled; disks that contradict each other are reported, not guessed.
//!
//! # What it does not do
//! It copies no data; that is for backups. It knows no bytes of the image format; that is
//! `tidemark-qcow2`. One process at a time changes a chain: the images' locks see to that.
//!
//! ```
//! use std::sync::Arc;
//! use tidemark_checkpoint::{CreateFlags, CreateSpec, Disk, DiskDelta, Domain, SinceOptions};
//! use tidemark_qcow2::{CreateOptions, Image, MemoryStorage, OpenOptions};
//!
//! let storage = Box::new(MemoryStorage::new());
//! let image = Image::create(storage, &CreateOptions::new(64 << 20), OpenOptions::default())?;
//! let disk = Disk { name: "vda".to_owned(), image: Arc::new(image) };
//! let domain = Domain::new(vec![disk.clone()], Default::default())?;
//!
//! let spec = CreateSpec { name: Some("monday".to_owned()), ..Default::default() };
//! let monday = domain.create(&spec, CreateFlags::NONE)?;
//! disk.image.write(b"new", 5 << 20)?;
//! for change in monday.changed_since(SinceOptions::default())? {
//!     match change.delta {
//!         DiskDelta::Incremental(bits) => assert!(bits.test(5 << 20)),
//!         DiskDelta::Full { reason } => panic!("{}: {reason}", change.disk),
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adopt;
mod anchor;
pub mod backup;
mod checkpoint;
pub mod create;
pub mod delete;
pub mod delta;
pub mod describe;
pub mod domain;
mod error;
mod flags;
mod fold;
mod infer;
pub mod layers;
pub mod list;
pub mod name;
mod problem;
pub mod rebuild;
pub mod recover;
mod scheme;
mod settle;
mod snapshots;
pub mod store;
pub mod tree;
mod verify;
mod view;

pub use checkpoint::Checkpoint;
pub use create::{CreateSpec, Tentative};
pub use delete::{DeleteWarning, Deleted};
pub use delta::{DiskChange, DiskDelta, FullReason, SinceOptions};
pub use describe::{CheckpointInfo, DiskState, Evidence, Kind, ListOptions, Listing};
pub use domain::{Disk, Domain, DomainOptions};
pub use error::{Error, ErrorCode, Result};
pub use flags::{CreateFlags, DeleteFlags, ListFlags, XmlFlags};
pub use layers::CommittedBitmap;
pub use problem::Problem;
pub use rebuild::Rebuilt;
pub use recover::{Outcome, Recovery};
pub use store::{DescribedDisk, Descriptor, Store};
pub use tree::{Node, NodeId, Tree, Walk};
