//! Space for compressed data: several clusters' worth share one host cluster, byte by byte.
//!
//! Invariants:
//! - Every compressed cluster is one reference to each host cluster that holds a byte of it.
//! - The tail lies in a cluster that has references: one that is freed is left at once.

use super::{Allocator, HostRun};
use crate::error::{Feature, Result};
use crate::format::table::CompressedData;
use crate::image::file::ImageFile;
use crate::units::{HostCluster, HostOffset};

impl Allocator {
    /// Takes `len` bytes, less than a cluster, behind the last ones taken, or at the start of a new
    /// cluster where there is no room or no reference left.
    pub(crate) fn allocate_bytes(&mut self, file: &ImageFile, len: u64) -> Result<HostOffset> {
        let tail = self.usable_tail(file)?;
        let cluster = self.geometry.cluster_bytes();
        let start = match tail {
            Some(tail) if self.geometry.offset_in_cluster(tail.0) + len <= cluster => {
                self.add_reference(file, self.geometry.host_cluster(tail))?;
                tail
            }
            _ => self.begin_cluster(file, tail)?,
        };
        let end = start.plus(len);
        self.tail = (!self.geometry.is_aligned(end)).then_some(end);
        Ok(start)
    }

    /// The tail, if its cluster can take another reference.
    fn usable_tail(&mut self, file: &ImageFile) -> Result<Option<HostOffset>> {
        let Some(tail) = self.tail else {
            return Ok(None);
        };
        let count = self.count(file, self.geometry.host_cluster(tail))?;
        Ok((count > 0 && count < self.geometry.refcount_max()).then_some(tail))
    }

    /// A new cluster; the data begins at the tail when the new cluster follows it.
    fn begin_cluster(&mut self, file: &ImageFile, tail: Option<HostOffset>) -> Result<HostOffset> {
        let run = self.allocate(file, 1)?;
        let end = run.start.plus(self.geometry.cluster_bytes());
        let limit = CompressedData::offset_limit(&self.geometry);
        if end > limit {
            self.free_now(file, &[run])?;
            return Err(file.unsupported(Feature::Limit {
                what: "host offset of compressed data",
                value: run.start.0,
                limit: limit.0,
            }));
        }
        match tail {
            Some(tail) if tail.0.next_multiple_of(self.geometry.cluster_bytes()) == run.start.0 => {
                self.add_reference(file, self.geometry.host_cluster(tail))?;
                Ok(tail)
            }
            _ => Ok(run.start),
        }
    }

    /// The host clusters that hold `len` bytes from `start` on.
    pub(crate) fn clusters_of_bytes(&self, start: HostOffset, len: u64) -> HostRun {
        let first = self.geometry.host_cluster(start);
        let last = self.geometry.host_cluster(HostOffset(start.0 + len - 1));
        HostRun {
            start: self.geometry.host_offset(first),
            clusters: last.0 - first.0 + 1,
            untouched: false,
        }
    }

    /// Nothing more is put into a cluster that nobody refers to any longer.
    pub(super) fn leave_tail(&mut self, cluster: HostCluster) {
        if self
            .tail
            .is_some_and(|tail| self.geometry.host_cluster(tail) == cluster)
        {
            self.tail = None;
        }
    }
}
