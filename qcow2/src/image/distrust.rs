//! When a write meets damage: the image is marked corrupt, and nothing more is changed.
//!
//! Whoever goes on writing by tables that contradict themselves ruins what is still right. So the
//! first change that is refused for damage of the mapping makes everything before it durable, sets
//! the corrupt bit in the header, and ends all changes; reading, flushing and closing go on.
//! Opening for writing is then refused until a repair clears the bit. Bitmaps are left as wide as
//! they are on disk: they say too much, never too little.
//!
//! Reading writes nothing, so a read that meets damage only fails. Version 2 has no such bit;
//! there the changes end all the same.

use super::{Image, lock};
use crate::error::{Damage, Error, Result};
use crate::format::header::incompatible;
use crate::sync::atomic::Ordering;

impl Image {
    /// Looks at the answer of a change of guest data.
    pub(super) fn distrust_after<T>(&self, answer: Result<T>) -> Result<T> {
        if let Err(error) = &answer
            && is_damage_of_the_mapping(error, self.name())
            && !self.distrusted.swap(true, Ordering::AcqRel)
        {
            self.mark_corrupt();
        }
        answer
    }

    /// The same for what comes before a change: only an overlap with metadata counts.
    pub(super) fn distrust_overlap<T>(&self, answer: Result<T>) -> Result<T> {
        match answer {
            Err(error) if matches!(error.damage(), Some(Damage::Overlap { .. })) => {
                self.distrust_after(Err(error))
            }
            answer => answer,
        }
    }

    /// Whether damage ended all changes.
    pub(super) fn is_distrusted(&self) -> bool {
        self.distrusted.load(Ordering::Acquire)
    }

    /// The caller shares the entrance and holds no other lock.
    fn mark_corrupt(&self) {
        // Where that fails, what was not yet durable is as after a crash.
        let _ = self.sync();
        if self.geometry.version == 2 {
            return;
        }
        let mut first = lock(&self.first);
        let mut next = first.content().clone();
        next.header.incompatible |= incompatible::CORRUPT;
        if let Err(error) = first.commit(&self.file, next) {
            self.poison_unless_refused(&error);
        }
    }
}

/// Damage that makes every further change a danger; compressed bytes that cannot be expanded, for
/// example, are none.
fn is_damage_of_the_mapping(error: &Error, name: &str) -> bool {
    match error {
        // A backing file that is damaged is not this image.
        Error::Corrupt { image, damage } => {
            let of_mapping = matches!(
                damage,
                Damage::Entry { .. } | Damage::Overlap { .. } | Damage::Place { .. }
            );
            of_mapping && image == name
        }
        _ => false,
    }
}
