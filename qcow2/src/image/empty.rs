//! An overlay that lets go of everything it holds, by one commit of the header.
//!
//! Its backing file shows everywhere from then on. The caller vouches that the disk reads the same:
//! bitmaps and chain record stay.

use super::Image;
use crate::error::Result;

impl Image {
    /// Gives the image an empty mapping. What it held is freed after the commit.
    ///
    /// # Errors
    /// Damage of the mapping, before the first write; I/O. After an error the mapping is as before,
    /// except for one while clusters are freed.
    pub(crate) fn give_up_content(&self) -> Result<()> {
        self.check_writable()?;
        self.remap(|_, next| (0..next.l1().len()).try_for_each(|number| next.cut_table(number)))
    }
}
