//! Work in progress.
pub mod convert;
pub mod error;
pub mod format;
pub mod geometry;
pub mod storage;
pub mod units;
pub use error::{Error, Result};
