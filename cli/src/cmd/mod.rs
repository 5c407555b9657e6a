//! One file a command: its options, what it does, what it answers.

pub(crate) mod amend;
pub(crate) mod backup;
pub(crate) mod bitmap;
pub(crate) mod check;
pub(crate) mod checkpoint;
pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod demo;
pub(crate) mod info;
mod info_text;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod rebase;
pub(crate) mod resize;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod snapshot;
