//! An image as an NBD export: what a client may ask of it, in terms of the engine.
//!
//! - [`export`]: reads, writes and failures.
//! - [`allocation`]: where the disk's bytes are, as metadata contexts say it.
//! - [`dirty`]: bitmaps as metadata contexts, alive while the export is written.
//! - [`control`]: checkpoints and questions while it is served.
//! - [`signals`]: what ends a server.
//!
//! All writes of this process go through the exports, so a bitmap that is marked here is as exact as
//! the one that the engine keeps on disk.

mod allocation;
pub(crate) mod control;
mod dirty;
mod export;
pub(crate) mod signals;

pub(crate) use dirty::DirtyContext;
pub(crate) use export::ImageExport;
