//! What a repair could not save as it was: a sentence for each.

use crate::units::HostOffset;

/// Something that is not as it was before the damage. Bitmaps are never lost in silence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// The directory is not where the header says, or what is there is none.
    #[error("the bitmap directory at {offset} cannot be read: {problem}; its bitmaps are lost")]
    Directory {
        /// Where it should be.
        offset: HostOffset,
        /// Why it cannot be read.
        problem: &'static str,
    },
    /// The header counts other bitmaps than the directory holds.
    #[error("the header counts {declared} bitmaps, the directory holds {found}")]
    Count {
        /// As the header says.
        declared: u32,
        /// Entries that could be read.
        found: usize,
    },
    /// An entry of the directory that means nothing to anybody.
    #[error("entry {number} of the bitmap directory ({name:?}) is dropped: {problem}")]
    Entry {
        /// Number of the entry, from 0.
        number: usize,
        /// What stands in the place of its name, lossily decoded.
        name: String,
        /// Why it cannot be kept.
        problem: String,
    },
    /// Pages of a bitmap are gone. They now say that everything changed: too much, never too
    /// little.
    #[error("bitmap {name:?}: {pages} of its {of} pages are lost and now say that all changed")]
    Widened {
        /// Its name, lossily decoded.
        name: String,
        /// Pages that were lost.
        pages: usize,
        /// Pages that it has.
        of: usize,
    },
    /// A bitmap whose name was empty or taken has a new one.
    #[error("bitmap {from:?} is now called {to:?}: {problem}")]
    Renamed {
        /// Its old name, lossily decoded.
        from: String,
        /// Its new name.
        to: String,
        /// What was wrong with the old one.
        problem: &'static str,
    },
    /// A bitmap that a program without bitmap support let go stale.
    #[error("bitmap {0:?} is dropped: a program without bitmap support changed the image")]
    Stale(String),
    /// A checkpoint whose bitmap is gone; the chain record keeps it as missing.
    #[error("checkpoint {0:?} lost its bitmap; the chain record keeps it as missing")]
    Checkpoint(String),
}
