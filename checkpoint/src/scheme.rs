//! Changing how the bitmaps of an image share the work.
//!
//! Intervals to cumulative: each bitmap becomes the union from its interval on, and records.
//! Cumulative to intervals: each but the newest is frozen as it is. Nothing is subtracted: the
//! union since a checkpoint stays what it was, and each interval stays a superset of its own.

use tidemark_qcow2::Image;
use tidemark_qcow2::chain::{ChainRecord, Health, Proof, Scheme};

use crate::fold::{self, Findings, inherited_proof, is_recording, refused};
use crate::settle::{record_of, settle};
use crate::view::View;
use crate::{Domain, Error, Result};

impl Domain {
    /// Brings every image with a record to `scheme`; one update an image. Repeating it changes
    /// nothing.
    ///
    /// # Errors
    /// Before anything is written: [`Error::DiskReadOnly`], [`Error::RecordUnsound`],
    /// [`Error::Undecided`], [`Error::PendingBackup`]. Later, [`Error::Image`]: repeat it.
    pub fn set_scheme(&self, scheme: Scheme) -> Result<()> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        view.require_changeable()?;
        let other = |record: &&ChainRecord| record.scheme != scheme;
        let disks: Vec<_> = view
            .disks
            .iter()
            .filter(|disk| disk.record.as_ref().filter(other).is_some())
            .collect();
        if let Some(disk) = disks.iter().find(|disk| !disk.image.is_writable()) {
            return Err(Error::DiskReadOnly(disk.name.clone()));
        }
        settle(&view)?;
        for disk in disks {
            let convert = match scheme {
                Scheme::Cumulative => to_cumulative,
                Scheme::Intervals => to_intervals,
            };
            convert(&disk.image).map_err(Error::on(&disk.name))?;
        }
        Ok(())
    }
}

fn to_cumulative(image: &Image) -> fold::Result<()> {
    let Some(before) = record_of(image) else {
        return Ok(());
    };
    let findings = Findings::of(image, &before, |_| true)?;
    image.update(|update| {
        let mut record = update.record().cloned().unwrap_or(before);
        let recorder = record
            .checkpoints
            .last()
            .filter(|entry| is_recording(entry))
            .cloned();
        let mut union: Option<tidemark_bitmap::Bitmap> = None;
        let mut lost = recorder.is_none();
        for entry in record.checkpoints.iter_mut().rev() {
            let (health, bits) = findings.take(update, entry)?;
            lost |= !health.is_usable();
            entry.health = if lost && health.is_usable() {
                Health::Lost
            } else {
                health
            };
            if let Some(mut bits) = bits {
                if let Some(union) = &union {
                    bits.union_outward(union)
                        .map_err(|error| refused(image, error))?;
                }
                union = Some(bits);
            }
            let (Some(bits), Some(recorder)) = (&union, &recorder) else {
                continue;
            };
            entry.proof = Proof::Recording(inherited_proof(recorder, bits));
            entry.granularity = bits.shape().granularity();
            update.put(&entry.name, bits.clone(), true)?;
        }
        record.scheme = Scheme::Cumulative;
        update.set_record(Some(record));
        Ok(())
    })
}

fn to_intervals(image: &Image) -> fold::Result<()> {
    let Some(before) = record_of(image) else {
        return Ok(());
    };
    let findings = Findings::of(image, &before, |_| true)?;
    image.update(|update| {
        let mut record = update.record().cloned().unwrap_or(before);
        record.scheme = Scheme::Intervals;
        if let Some(newest) = record.checkpoints.last().map(|entry| entry.identity) {
            fold::freeze(update, &mut record, newest, &findings)?;
        }
        update.set_record(Some(record));
        Ok(())
    })
}
