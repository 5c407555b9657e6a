//! The anchors of a checkpoint that is about to be taken; see [`crate::anchor`].

use tidemark_qcow2::Feature;

use super::draft::{Draft, Part};
use crate::{Error, Result, anchor};

impl Draft {
    /// What an older anchor knows of a bitmap that was lost is put into the bitmap, for the anchor
    /// goes with the next checkpoint.
    pub(super) fn mend_by_anchors(&self) -> Result<()> {
        for part in &self.participants {
            crate::recover::mend_by_anchor(&part.image).map_err(Error::on(&part.disk))?;
        }
        Ok(())
    }

    /// Takes the anchors, before the moment itself. After a failure there are none.
    pub(super) fn anchor(&mut self, wanted: bool) -> Result<()> {
        if !wanted {
            return Ok(());
        }
        let mut outcome = Ok(());
        for part in &mut self.participants {
            match anchor::take(&part.image, self.identity) {
                Ok(proof) => part.anchor = Some(proof),
                Err(error) => {
                    outcome = Err(Error::on(&part.disk)(error));
                    break;
                }
            }
        }
        if outcome.is_err() {
            self.sweep_anchors();
        }
        outcome
    }

    /// Clears away anchors that no record names, on every disk that lets itself be written. One
    /// that stays costs room and is cleared away by the next checkpoint.
    pub(super) fn sweep_anchors(&self) {
        for part in &self.participants {
            let _ = anchor::sweep(&part.image);
        }
    }
}

/// Refuses what no snapshot can be taken of, before the first write.
pub(super) fn check(part: &Part) -> Result<()> {
    let geometry = part.image.geometry();
    let feature = if geometry.external_data {
        Feature::SnapshotOfDataFile
    } else if geometry.refcount_max() < 2 {
        Feature::Limit {
            what: "references to one host cluster",
            value: 2,
            limit: geometry.refcount_max(),
        }
    } else {
        return Ok(());
    };
    let image = part.image.name().to_owned();
    Err(Error::on(&part.disk)(tidemark_qcow2::Error::Unsupported {
        image,
        feature,
    }))
}
