//! `bitmap`: the persistent dirty bitmaps of one image.
//!
//! A bitmap that belongs to a chain of checkpoints is changed only with `--force`, and then the
//! chain record says in the same commit what was lost ([`loss`]).

mod change;
mod dump;
mod list;
mod loss;
mod merge;

use clap::Subcommand;

use crate::exit::Outcome;
use crate::out::Out;

/// List and change the persistent dirty bitmaps of an image
#[derive(Subcommand, Debug)]
pub(crate) enum Bitmap {
    List(list::List),
    Add(change::Add),
    Remove(change::Remove),
    Clear(change::Clear),
    Enable(change::Enable),
    Disable(change::Disable),
    Merge(merge::Merge),
    Dump(dump::Dump),
}

impl Bitmap {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        match self {
            Self::List(list) => list.run(out),
            Self::Add(add) => add.run(out),
            Self::Remove(remove) => remove.run(out),
            Self::Clear(clear) => clear.run(out),
            Self::Enable(enable) => enable.run(out),
            Self::Disable(disable) => disable.run(out),
            Self::Merge(merge) => merge.run(out),
            Self::Dump(dump) => dump.run(out),
        }
    }
}
