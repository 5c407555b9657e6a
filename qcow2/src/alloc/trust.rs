//! How far the refcounts of an image that somebody else wrote are believed.
//!
//! A refcount may be too low: then a cluster that is in use looks free, or is freed while somebody
//! still refers to it. Only a census of all references can tell, and until there was one:
//! - no cluster is given out that the file had when it was opened;
//! - one of those that is freed keeps its content: its count goes down, its space stays.
//!
//! A census also shows which clusters have more references than are counted. They stay as they
//! are: never given out, never freed, never written in place.

use std::collections::HashSet;
use std::ops::Range;

use super::block::RefcountBlock;
use super::set::ClusterSet;
use super::{Allocator, HostRun};
use crate::check::{References, USUAL_ORDER, counts_enough};
use crate::convert::to_usize;
use crate::error::Result;
use crate::image::file::ImageFile;
use crate::units::HostCluster;

/// Clusters before the end of the file that are looked at for free ones.
const WINDOW: u64 = 4096;

/// What is known of the clusters that the file had when it was opened.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// Clusters below this one are not given out, and keep their content when they are freed. Zero
    /// once a census has seen every reference.
    floor: u64,
    /// Clusters with more references than are counted.
    held: ClusterSet,
    /// Clusters below the floor that this session freed.
    freed: u64,
    /// Guest data that its table says is its alone, of the tables that were looked at.
    own: ClusterSet,
    /// Guest data that they say may be somebody else's too.
    others: ClusterSet,
    /// L1 indexes of the tables that were looked at.
    guarded: HashSet<usize>,
}

impl Trust {
    /// Nothing below cluster `floor` is believed.
    pub(super) fn nothing_below(floor: u64) -> Self {
        Self {
            floor,
            ..Self::default()
        }
    }

    /// First cluster that may be given out.
    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    /// Whether a cluster has more references than are counted.
    pub(super) fn holds(&self, cluster: HostCluster) -> bool {
        self.held.contains(cluster)
    }

    /// Notes that a table has a cluster; returns whether that contradicts what others said of it.
    fn is_claimed_again(&mut self, cluster: HostCluster, own: bool) -> bool {
        if own {
            !self.own.insert(cluster) || self.others.contains(cluster)
        } else {
            self.others.insert(cluster);
            self.own.contains(cluster)
        }
    }

    /// A cluster lost its last counted reference; returns whether nobody else can have one.
    pub(super) fn gone(&mut self, cluster: HostCluster) -> bool {
        let old = cluster.0 < self.floor;
        self.freed += u64::from(old);
        !old
    }
}

impl Allocator {
    /// Takes note of everything that is referred to on disk; no reference has changed since, and
    /// none is about to be dropped. Returns the clusters with more references than are counted,
    /// those behind the end of the file among them.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn learn(
        &mut self,
        file: &ImageFile,
        references: &References,
    ) -> Result<ClusterSet> {
        let per_block = self.geometry.refcounts_per_block();
        let mut found = ClusterSet::default();
        let mut from = 0;
        while let Some(cluster) = references.next(from..u64::MAX) {
            let number = cluster / per_block;
            from = (number + 1).saturating_mul(per_block);
            let clusters = number * per_block..from;
            self.compare(file, to_usize(number), clusters, references, &mut found)?;
        }
        for cluster in references.beyond() {
            found.insert(HostCluster(cluster));
        }
        self.trust.held.extend(&found);
        if references.complete {
            self.trust.floor = 0;
            self.trust.own.clear();
            self.trust.others.clear();
        }
        Ok(found)
    }

    /// Compares what one block counts. Blocks that are not in memory are not kept there.
    fn compare(
        &mut self,
        file: &ImageFile,
        number: usize,
        clusters: Range<u64>,
        references: &References,
        found: &mut ClusterSet,
    ) -> Result<()> {
        let read;
        let block = match self.blocks.get(&number) {
            Some(block) => Some(block),
            None => {
                read = match self.block_offset(file, number)? {
                    Some(offset) => Some(RefcountBlock::read(self.geometry, offset, file)?),
                    None => None,
                };
                read.as_ref()
            }
        };
        if self.geometry.refcount_order == USUAL_ORDER
            && let Some(block) = block
            && let Some(counted) = references.slice(clusters.clone())
            && counts_enough(block.bytes(), counted)
        {
            return Ok(());
        }
        let mut from = clusters.start;
        while let Some(cluster) = references.next(from..clusters.end) {
            let slot = to_usize(cluster - clusters.start);
            let count = block.map_or(0, |block| block.count(slot));
            if references.count(cluster) > count {
                found.insert(HostCluster(cluster));
            }
            from = cluster + 1;
        }
        Ok(())
    }

    /// Whether a census would give back more than it costs: it reads `tables` clusters.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn is_census_due(&mut self, file: &ImageFile, tables: u64) -> Result<bool> {
        let floor = self.trust.floor;
        let needed = tables / 8 + 1;
        let mut free = self.trust.freed;
        for cluster in (floor.saturating_sub(WINDOW)..floor).map(HostCluster) {
            if free >= needed {
                break;
            }
            free += u64::from(self.count(file, cluster)? == 0);
        }
        Ok(floor > 0 && free >= needed)
    }

    /// Looks at the data below L2 table `number`, once: clusters that may not be written in place go
    /// to `crossed`, because another table that was looked at has them too, or because they are not
    /// counted once. Each run of `data` comes with whether the table says that it is its alone.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn claim(
        &mut self,
        file: &ImageFile,
        number: usize,
        data: &[(HostRun, bool)],
        crossed: &mut ClusterSet,
    ) -> Result<()> {
        let counted = self.trust.floor == 0;
        for &(run, own) in data {
            let first = self.geometry.host_cluster(run.start).0;
            for cluster in (first..first + run.clusters).map(HostCluster) {
                let miscounted = own && self.count(file, cluster)? != 1;
                if miscounted || !counted && self.trust.is_claimed_again(cluster, own) {
                    crossed.insert(cluster);
                }
            }
        }
        self.trust.guarded.insert(number);
        Ok(())
    }

    /// Whether the data below L2 table `number` was looked at.
    pub(crate) fn is_guarded(&self, number: usize) -> bool {
        self.trust.guarded.contains(&number)
    }

    /// Whether guest data was seen on `cluster`.
    pub(super) fn is_claimed(&self, cluster: HostCluster) -> bool {
        self.trust.own.contains(cluster) || self.trust.others.contains(cluster)
    }

    /// The active mapping is another one.
    pub(crate) fn forget_claims(&mut self) {
        self.trust.own.clear();
        self.trust.others.clear();
        self.trust.guarded.clear();
    }
}
