//! The image file as the engine sees it: a storage with a name for its errors.

use byteorder::{BigEndian, ByteOrder};

use crate::convert::to_usize;
use crate::error::{Damage, Error, Feature, FormatError, Mistake, Result};
use crate::geometry::Geometry;
use crate::storage::Storage;
use crate::units::HostOffset;

/// A storage whose failures carry operation, file and offset.
#[derive(Debug)]
pub(crate) struct ImageFile {
    storage: Box<dyn Storage>,
    name: String,
}

impl ImageFile {
    pub(crate) fn new(storage: Box<dyn Storage>) -> Self {
        let name = storage.name();
        Self { storage, name }
    }

    pub(crate) fn into_storage(self) -> Box<dyn Storage> {
        self.storage
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Reads all of `buf`; what lies beyond the end of the file reads as zero, as QEMU reads it.
    pub(crate) fn read(&self, buf: &mut [u8], at: HostOffset, what: &'static str) -> Result<()> {
        let count = self
            .storage
            .read_at(buf, at.0)
            .map_err(|source| self.io(source, what, at.0))?;
        buf[count..].fill(0);
        Ok(())
    }

    /// Reads a table of `entries` 64-bit numbers.
    pub(crate) fn read_table(
        &self,
        at: HostOffset,
        entries: usize,
        what: &'static str,
    ) -> Result<Vec<u64>> {
        let mut bytes = vec![0; to_usize(Geometry::entries_bytes(entries))];
        self.read(&mut bytes, at, what)?;
        let mut table = vec![0; entries];
        BigEndian::read_u64_into(&bytes, &mut table);
        Ok(table)
    }

    pub(crate) fn write(&self, buf: &[u8], at: HostOffset, what: &'static str) -> Result<()> {
        self.storage
            .write_at(buf, at.0)
            .map_err(|source| self.io(source, what, at.0))
    }

    pub(crate) fn barrier(&self) -> Result<()> {
        self.storage
            .flush()
            .map_err(|source| self.io(source, "flush", 0))
    }

    pub(crate) fn len(&self) -> Result<u64> {
        self.storage
            .len()
            .map_err(|source| self.io(source, "length", 0))
    }

    /// As [`Storage::hole_at`].
    pub(crate) fn hole_at(&self, at: HostOffset) -> Result<u64> {
        self.storage
            .hole_at(at.0)
            .map_err(|source| self.io(source, "look for holes", at.0))
    }

    /// Length of the run at `at`, at most up to `end`, and whether it is a hole of the file.
    pub(crate) fn run_at(&self, at: HostOffset, end: u64) -> Result<(u64, bool)> {
        let rest = end - at.0;
        let hole = self.hole_at(at)?.min(rest);
        if hole > 0 {
            return Ok((hole, true));
        }
        let data = self
            .storage
            .data_at(at.0)
            .map_err(|source| self.io(source, "look for holes", at.0))?;
        // A hole that was punched just now leaves nothing here; then the rest counts as data.
        Ok((if data == 0 { rest } else { data.min(rest) }, false))
    }

    pub(crate) fn io(&self, source: std::io::Error, operation: &'static str, offset: u64) -> Error {
        Error::Io {
            image: self.name.clone(),
            operation,
            offset,
            source,
        }
    }

    pub(crate) fn damage(&self, damage: Damage) -> Error {
        Error::Corrupt {
            image: self.name.clone(),
            damage,
        }
    }

    pub(crate) fn unsupported(&self, feature: Feature) -> Error {
        Error::Unsupported {
            image: self.name.clone(),
            feature,
        }
    }

    pub(crate) fn invalid(&self, mistake: Mistake) -> Error {
        Error::Invalid {
            image: self.name.clone(),
            mistake,
        }
    }

    pub(crate) fn format(&self, error: FormatError) -> Error {
        error.in_image(&self.name)
    }
}
