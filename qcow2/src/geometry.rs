//! Every shift, mask and bound of one image, computed once from its checked header.

use crate::convert::{to_u64, to_usize};
use crate::format::subclusters;
use crate::units::{GuestCluster, HostCluster, HostOffset};

/// Shifts and bounds that follow from cluster size, refcount width and version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cluster size is `1 << cluster_bits` bytes; 9 to 21.
    pub cluster_bits: u32,
    /// Refcount width is `1 << refcount_order` bits; 0 to 6.
    pub refcount_order: u32,
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// L2 entries have 16 bytes and say for each of 32 subclusters what it is.
    pub extended_l2: bool,
    /// Guest data lies in an external data file, each cluster where it is on the disk.
    pub external_data: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a cluster, as a length in memory.
    pub const fn cluster_len(&self) -> usize {
        to_usize(self.cluster_bytes())
    }

    /// Bytes that the mapping can tell apart from their neighbours: a subcluster where entries are
    /// extended, else a cluster.
    pub const fn subcluster_bytes(&self) -> u64 {
        if self.extended_l2 {
            self.cluster_bytes() / to_u64(subclusters::COUNT)
        } else {
            self.cluster_bytes()
        }
    }

    /// Entries of one L2 table.
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / (8 * to_u64(self.words_per_l2_entry()))
    }

    /// 64-bit words of one L2 entry: the entry itself and, in an extended one, its subclusters.
    pub const fn words_per_l2_entry(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// L2 tables, that is L1 entries, that a disk of `size` bytes needs.
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.cluster_bits)
            .div_ceil(self.l2_entries())
    }

    /// Index into L1 and into the L2 table below it.
    pub const fn table_indexes(&self, cluster: GuestCluster) -> (usize, usize) {
        let per_table = self.l2_entries();
        (
            to_usize(cluster.0 / per_table),
            to_usize(cluster.0 % per_table),
        )
    }

    /// Guest cluster that holds byte `offset` of the disk.
    pub const fn guest_cluster(&self, offset: u64) -> GuestCluster {
        GuestCluster(offset >> self.cluster_bits)
    }

    /// Position of byte `offset` inside its cluster.
    pub const fn offset_in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Host cluster that holds `offset`.
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a host cluster.
    pub const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Whether `offset` is the first byte of a cluster.
    pub const fn is_aligned(&self, offset: HostOffset) -> bool {
        self.offset_in_cluster(offset.0) == 0
    }

    /// Clusters that hold `bytes` bytes.
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(1 << self.cluster_bits)
    }

    /// Bits of one refcount.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Largest refcount that fits.
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Refcounts in one refcount block.
    pub const fn refcounts_per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Index into the refcount table and into the block below it.
    pub const fn refcount_indexes(&self, cluster: HostCluster) -> (usize, usize) {
        let per_block = self.refcounts_per_block();
        (
            to_usize(cluster.0 / per_block),
            to_usize(cluster.0 % per_block),
        )
    }

    /// Entries of a table of `clusters` whole clusters of 8-byte entries.
    pub const fn table_entries(&self, clusters: u64) -> u64 {
        clusters << (self.cluster_bits - 3)
    }

    /// Bytes of `entries` 8-byte table entries.
    pub const fn entries_bytes(entries: usize) -> u64 {
        to_u64(entries) * 8
    }
}
