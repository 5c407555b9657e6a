//! Reading compressed clusters.
//!
//! Invariants:
//! - A cluster is expanded into a buffer of one cluster and read from at most two clusters and a
//!   sector of the file, whatever the descriptor or the stored bytes claim.
//! - A kept cluster is known by where its data lies. The data stays as it is while anything refers
//!   to it, and whoever writes compressed data there anew calls [`ExpandedClusters::forget`] first.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use super::Image;
use crate::codec;
use crate::convert::to_usize;
use crate::error::{Damage, Result};
use crate::format::table::CompressedData;
use crate::geometry::Geometry;
use crate::sync::{Mutex, MutexGuard};
use crate::units::HostOffset;

/// Bytes of expanded clusters that an image keeps, or [`MIN_KEPT`] clusters where that is more: at
/// most 8 MiB.
const KEPT_BYTES: u64 = 1 << 20;
const MIN_KEPT: u64 = 4;
const MAX_KEPT: u64 = 64;

/// The clusters that were expanded last, so that small reads in a row expand each only once.
#[derive(Debug)]
pub(super) struct ExpandedClusters {
    /// Newest first.
    kept: Mutex<VecDeque<(CompressedData, Arc<[u8]>)>>,
    most: usize,
}

impl ExpandedClusters {
    pub(super) fn new(geometry: &Geometry) -> Self {
        let most = (KEPT_BYTES >> geometry.cluster_bits).clamp(MIN_KEPT, MAX_KEPT);
        Self {
            kept: Mutex::default(),
            most: to_usize(most),
        }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(CompressedData, Arc<[u8]>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, data: CompressedData) -> Option<Arc<[u8]>> {
        let mut kept = self.kept();
        let at = kept.iter().position(|(known, _)| *known == data)?;
        let found = kept.remove(at)?;
        let cluster = Arc::clone(&found.1);
        kept.push_front(found);
        Some(cluster)
    }

    fn keep(&self, data: CompressedData, cluster: Arc<[u8]>) {
        let mut kept = self.kept();
        kept.retain(|(known, _)| *known != data);
        kept.truncate(self.most - 1);
        kept.push_front((data, cluster));
    }

    /// Drops what begins at `offset`: other data will.
    pub(super) fn forget(&self, offset: HostOffset) {
        self.kept().retain(|(known, _)| known.offset != offset);
    }
}

impl Image {
    /// Reads a part of the compressed cluster that holds byte `offset` of the disk.
    pub(super) fn read_compressed(
        &self,
        buf: &mut [u8],
        offset: u64,
        data: CompressedData,
    ) -> Result<()> {
        if buf.len() == self.geometry.cluster_len() {
            // All of it: nothing is left to keep.
            return self.expand(buf, offset, data);
        }
        let inside = to_usize(self.geometry.offset_in_cluster(offset));
        let cluster = match self.expanded.find(data) {
            Some(cluster) => cluster,
            None => {
                let mut cluster = vec![0; self.geometry.cluster_len()];
                self.expand(&mut cluster, offset, data)?;
                let cluster: Arc<[u8]> = cluster.into();
                self.expanded.keep(data, Arc::clone(&cluster));
                cluster
            }
        };
        buf.copy_from_slice(&cluster[inside..inside + buf.len()]);
        Ok(())
    }

    fn expand(&self, cluster: &mut [u8], offset: u64, data: CompressedData) -> Result<()> {
        let damage = |problem| {
            self.file.damage(Damage::Compressed {
                cluster: self.geometry.guest_cluster(offset).0,
                offset: data.offset,
                problem,
            })
        };
        if data.offset.0 < self.geometry.cluster_bytes() {
            return Err(damage("it lies on the header"));
        }
        let present = self.file.len()?.saturating_sub(data.offset.0);
        if present == 0 {
            return Err(damage("it lies past the end of the file"));
        }
        // The last sector of a file need not be whole.
        let mut stored = vec![0; to_usize(data.bytes.min(present))];
        self.file
            .read(&mut stored, data.offset, "read compressed data")?;
        codec::decompress(&stored, cluster, self.compression).map_err(damage)
    }
}

#[cfg(test)]
mod tests {
    use super::ExpandedClusters;
    use crate::format::table::CompressedData;
    use crate::geometry::Geometry;
    use crate::units::HostOffset;

    fn kept(cluster_bits: u32) -> ExpandedClusters {
        ExpandedClusters::new(&Geometry {
            cluster_bits,
            refcount_order: 4,
            version: 3,
            extended_l2: false,
            external_data: false,
        })
    }

    fn data(offset: u64, bytes: u64) -> CompressedData {
        let offset = HostOffset(offset);
        CompressedData { offset, bytes }
    }

    #[test]
    fn memory_is_bounded_for_every_cluster_size() {
        for bits in 9..=21 {
            let clusters = kept(bits);
            for number in 0..200 {
                clusters.keep(data(number, 512), vec![0; 1].into());
            }
            let held = clusters.kept().len() << bits;
            assert!(held <= 8 << 20, "2^{bits}: {held}");
            assert!(clusters.find(data(199, 512)).is_some());
            assert!(clusters.find(data(0, 512)).is_none());
        }
    }

    #[test]
    fn what_was_used_last_stays_and_what_is_written_anew_goes() {
        let clusters = kept(21);
        for number in 0..4 {
            clusters.keep(data(number, 512), vec![0; 1].into());
        }
        assert!(clusters.find(data(0, 512)).is_some());
        clusters.keep(data(9, 512), vec![0; 1].into());
        assert!(clusters.find(data(0, 512)).is_some());
        assert!(clusters.find(data(1, 512)).is_none());
        clusters.keep(data(9, 1024), vec![0; 1].into());
        clusters.forget(HostOffset(9));
        assert!(clusters.find(data(9, 512)).is_none());
        assert!(clusters.find(data(9, 1024)).is_none());
    }
}
