//! An NBD server for anything that is a disk.
//!
//! Implement [`Export`], give it a name, and [`Server`] serves it on Unix sockets and TCP: fixed
//! newstyle negotiation, structured replies and extended headers, metadata contexts, trim, zeroes,
//! flush, cache, several connections to one export.
//!
//! The feature `tls` adds TLS by rustls.
//!
//! # What this crate owns
//! - [`protocol`]: bytes and values, pure.
//! - The handshake, the session that answers requests out of order, the server with its limits.
//!
//! # Invariants
//! 1. A client is an attacker: whatever it sends, memory and threads are bounded by [`Limits`], it
//!    waits for nobody but itself, and nothing reaches an export that is outside of it or that the
//!    export did not offer.
//! 2. A reply is sent when its work is done, never before: a flush that is answered covers
//!    everything that was answered before it was asked.
//! 3. A message that cannot be understood ends its connection. Nothing is guessed of its length.
//! 4. A shutdown answers what was received and takes nothing more.
//!
//! # What it does not do
//! It knows no image format, opens no file but its sockets, and never becomes a client.
//!
//! ```
//! use std::sync::Arc;
//! use tidemark_nbd::{Limits, MemoryExport, Server};
//!
//! let folder = tempfile::tempdir()?;
//! let disk = Arc::new(MemoryExport::new(16 << 20));
//! let mut server = Server::new(Limits::default())?;
//! server.export("disk", disk)?;
//! server.listen_unix(&folder.path().join("nbd"))?;
//! let handle = server.handle();
//! let serving = std::thread::spawn(move || server.run());
//! // qemu-img info nbd+unix:///disk?socket=nbd
//! handle.shut_down();
//! serving.join().expect("the server does not panic")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod convert;
mod event;
mod export;
mod fault;
mod handshake;
mod incoming;
mod limits;
mod memory;
pub mod protocol;
mod server;
mod session;
#[cfg(feature = "tls")]
mod tls;
mod transport;

pub use event::{Ending, Event};
pub use export::{BlockSizes, BlockStatus, Export, Offers, StatusRuns, Zeroing};
pub use fault::{ErrorCode, Fault};
pub use limits::Limits;
pub use memory::MemoryExport;
pub use server::{Handle, Server, UnixSocket};
#[cfg(feature = "tls")]
pub use tls::{Tls, TlsError};
pub use transport::{Direction, Transport};
