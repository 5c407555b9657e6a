//! An image, served.

use std::ops::Range;
use std::sync::Arc;

use tidemark_nbd::{BlockSizes, ErrorCode, Export, Fault, Offers, StatusRuns, Zeroing};
use tidemark_qcow2::{Error, Image, Mistake};

use super::allocation::{Runs, depth, state};
use super::dirty::DirtyContext;

/// A read that only warms the caches goes in such pieces.
const CACHE_PIECE: u64 = 1 << 20;

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";

/// A disk with the contexts that were asked for.
pub(crate) struct ImageExport {
    image: Arc<Image>,
    dirty: Vec<DirtyContext>,
    description: String,
}

impl ImageExport {
    pub(crate) fn new(image: Arc<Image>, dirty: Vec<DirtyContext>, description: &str) -> Self {
        Self {
            image,
            dirty,
            description: description.to_owned(),
        }
    }

    /// Bitmaps that record no more, since a checkpoint was taken, stay as they are from now on.
    pub(crate) fn follow(&self) -> tidemark_qcow2::Result<()> {
        for info in self.image.bitmaps()?.iter().filter(|info| !info.auto) {
            let name = DirtyContext::name_of(&info.name);
            let dirty = self.dirty.iter().filter(|dirty| dirty.name() == name);
            dirty.for_each(DirtyContext::freeze);
        }
        Ok(())
    }

    /// Marks what was changed, or may have been.
    fn changed(
        &self,
        offset: u64,
        length: u64,
        outcome: tidemark_qcow2::Result<()>,
    ) -> Result<(), Fault> {
        let range = offset..offset + length;
        self.dirty.iter().for_each(|context| context.mark(&range));
        outcome.map_err(|error| fault(&error))
    }

    /// Whether a range is given up as a whole, without any data to be written.
    fn is_fast(&self, offset: u64, length: u64) -> bool {
        let unit = self.image.geometry().subcluster_bytes();
        let end = offset + length;
        let whole =
            offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.image.size());
        whole && (self.image.geometry().version > 2 || self.image.backing().is_none())
    }
}

/// What a client is told of a failure of the engine.
pub(super) fn fault(error: &Error) -> Fault {
    let code = match error {
        _ if error.is_no_space() => ErrorCode::NoSpace,
        Error::Invalid { mistake, .. } => match mistake {
            Mistake::OutOfRange { .. } => ErrorCode::Invalid,
            Mistake::ReadOnly => ErrorCode::NotPermitted,
            _ => ErrorCode::Io,
        },
        _ => ErrorCode::Io,
    };
    Fault::new(code, error.to_string())
}

impl Export for ImageExport {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn offers(&self) -> Offers {
        Offers {
            writable: self.image.is_writable(),
            multi_conn: true,
            rotational: false,
        }
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Fault> {
        self.image
            .read(buffer, offset)
            .map_err(|error| fault(&error))
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<(), Fault> {
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        self.changed(offset, length, self.image.write(data, offset))
    }

    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> Result<(), Fault> {
        if how.only_fast && !self.is_fast(offset, length) {
            return Err(ErrorCode::NotSupported.into());
        }
        self.changed(offset, length, self.image.write_zeroes(offset, length))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), Fault> {
        self.changed(offset, length, self.image.discard(offset, length))
    }

    fn flush(&self) -> Result<(), Fault> {
        if !self.image.is_writable() {
            return Ok(());
        }
        self.image.flush().map_err(|error| fault(&error))
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), Fault> {
        let (mut at, end) = (offset, offset + length);
        let mut waste = Vec::new();
        while at < end {
            let piece = CACHE_PIECE.min(end - at);
            waste.resize(usize::try_from(piece).unwrap_or(0), 0);
            self.read(&mut waste, at)?;
            at += piece;
        }
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        let dirty = self.dirty.iter().map(|context| context.name().to_owned());
        let fixed = [ALLOCATION, DEPTH].map(ToOwned::to_owned);
        fixed.into_iter().chain(dirty).collect()
    }

    fn block_status<'a>(
        &'a self,
        context: &str,
        range: Range<u64>,
    ) -> Result<StatusRuns<'a>, Fault> {
        match context {
            ALLOCATION => Ok(Box::new(Runs::new(&self.image, range, state))),
            DEPTH => Ok(Box::new(Runs::new(&self.image, range, depth))),
            _ => {
                let mut dirty = self.dirty.iter();
                let found = dirty.find(|dirty| dirty.name() == context);
                let found = found.ok_or(ErrorCode::Invalid)?;
                Ok(Box::new(found.runs(range)))
            }
        }
    }
}
