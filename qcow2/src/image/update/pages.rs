//! Pages and table of one bitmap on their way to the disk.
//!
//! - What changed goes into fresh clusters, runs of pages in one write; nothing is changed in place.
//! - A page that the replaced bitmap has on disk already, byte for byte, is taken over: only
//!   changed pages are stored. Not from a bitmap that a foreign writer left in use, and not a
//!   cluster that the refcounts do not give to that page alone.

use std::collections::HashSet;

use tidemark_bitmap::{Bitmap, Page};

use super::commit::write_new;
use crate::alloc::HostRun;
use crate::bitmaps::directory::{read_table, shape};
use crate::convert::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::format::bitmap::{self, DirectoryEntry, TableEntry};
use crate::image::Image;
use crate::units::HostOffset;

/// Most bytes of pages that are written at once.
const WRITE_BYTES: usize = 1 << 20;

/// Bits to be stored, and the table of the bitmap that they replace.
pub(super) struct Pages<'a> {
    image: &'a Image,
    bits: &'a Bitmap,
    old: Vec<TableEntry>,
}

impl<'a> Pages<'a> {
    pub(super) fn new(
        image: &'a Image,
        bits: &'a Bitmap,
        old: Option<&DirectoryEntry>,
    ) -> Result<Self> {
        let old = match old {
            Some(old) if !old.in_use && old.granularity == bits.shape().granularity() => {
                Self::old_table(image, old)?
            }
            _ => Vec::new(),
        };
        Ok(Self { image, bits, old })
    }

    /// The table of what is replaced; one that is damaged has nothing to take over.
    fn old_table(image: &Image, old: &DirectoryEntry) -> Result<Vec<TableEntry>> {
        let geometry = image.geometry();
        let shape = shape(image.file(), &geometry, image.size(), old.granularity)?;
        match read_table(image.file(), &geometry, shape, old) {
            Err(Error::Corrupt { .. }) => Ok(Vec::new()),
            answer => answer,
        }
    }

    /// Writes what is new; returns where the table is.
    pub(super) fn write(
        self,
        taken: &mut Vec<HostRun>,
        kept: &mut HashSet<HostOffset>,
    ) -> Result<HostOffset> {
        let mut entries = vec![TableEntry::Zeros; self.bits.shape().pages()];
        let (mut waiting, mut buffer) = (Vec::new(), Vec::new());
        for number in 0..entries.len() {
            match self.bits.page(number) {
                Page::Zeros => {}
                Page::Ones if self.is_whole(number) => entries[number] = TableEntry::Ones,
                // QEMU reads all-ones entries, but a clipped last page must not say more than it has.
                Page::Ones | Page::Bits(_) => {
                    let start = buffer.len();
                    buffer.resize(start + self.image.geometry().cluster_len(), 0);
                    self.bits.write_page(number, &mut buffer[start..]);
                    if let Some(place) = self.same_on_disk(number, &buffer[start..], kept)? {
                        entries[number] = TableEntry::Cluster(place);
                        buffer.truncate(start);
                        continue;
                    }
                    waiting.push(number);
                    if buffer.len() >= WRITE_BYTES {
                        self.write_waiting(&mut waiting, &mut buffer, &mut entries, taken)?;
                    }
                }
            }
        }
        self.write_waiting(&mut waiting, &mut buffer, &mut entries, taken)?;
        let mut table = bitmap::encode_table(&entries);
        write_new(self.image, &mut table, "write bitmap table", taken)
    }

    fn is_whole(&self, number: usize) -> bool {
        let shape = self.bits.shape();
        shape.bits_in_page(number) == shape.bits_per_page()
    }

    /// Where the disk has this page already, in a cluster of its own.
    fn same_on_disk(
        &self,
        number: usize,
        wanted: &[u8],
        kept: &mut HashSet<HostOffset>,
    ) -> Result<Option<HostOffset>> {
        let Some(&TableEntry::Cluster(place)) = self.old.get(number) else {
            return Ok(None);
        };
        let mut present = vec![0; wanted.len()];
        self.image
            .file()
            .read(&mut present, place, "read bitmap data")?;
        if present != wanted {
            return Ok(None);
        }
        let cluster = self.image.geometry().host_cluster(place);
        let own = self.image.with_allocator(|allocator, _| {
            Ok(!allocator.is_fixed(cluster) && allocator.count(self.image.file(), cluster)? == 1)
        })?;
        // Two entries may name one cluster; only one of them keeps it.
        Ok((own && kept.insert(place)).then_some(place))
    }

    /// Writes the pages that wait in the buffer, a run of clusters at once.
    fn write_waiting(
        &self,
        waiting: &mut Vec<usize>,
        buffer: &mut Vec<u8>,
        entries: &mut [TableEntry],
        taken: &mut Vec<HostRun>,
    ) -> Result<()> {
        let (file, geometry) = (self.image.file(), self.image.geometry());
        let (mut rest, mut bytes) = (&waiting[..], &buffer[..]);
        while !rest.is_empty() {
            let run = self
                .image
                .with_allocator(|allocator, _| allocator.allocate(file, to_u64(rest.len())))?;
            taken.push(run);
            let (now, later) = rest.split_at(to_usize(run.clusters));
            let (written, unwritten) = bytes.split_at(now.len() * geometry.cluster_len());
            file.write(written, run.start, "write bitmap data")?;
            for (step, &number) in now.iter().enumerate() {
                let offset = to_u64(step) << geometry.cluster_bits;
                entries[number] = TableEntry::Cluster(run.start.plus(offset));
            }
            (rest, bytes) = (later, unwritten);
        }
        waiting.clear();
        buffer.clear();
        Ok(())
    }
}
