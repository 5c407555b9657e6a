//! Bytes and values of the NBD protocol: no I/O, no policy.
//!
//! - [`numbers`]: the specification's numbers under its names.
//! - [`options`]: what is said before an export is chosen.
//! - [`request`], [`reply`]: what is said afterwards.
//!
//! Everything a client sends is checked here before it has a meaning: a length that does not fit
//! its message is [`Malformed`], never an index or a size of memory.

mod cursor;
pub mod numbers;
pub mod options;
pub mod reply;
pub mod request;

/// A message whose parts do not fit its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Too short for what it says, or longer.
    #[error("its parts do not fit its length")]
    Length,
    /// A string is longer than the protocol allows.
    #[error("a string has over 4096 bytes")]
    LongString,
    /// It does not begin as it must.
    #[error("bad magic number {0:#x}")]
    Magic(u64),
}
