//! One file a command: its options, what it does, what it answers.

pub(crate) mod bitmap;
pub(crate) mod completions;
pub(crate) mod create;
pub(crate) mod info;
mod info_text;
pub(crate) mod map;
