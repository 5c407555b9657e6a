//! A census for those who write: what is referred to on disk, and how often.

use std::ops::Range;

use super::counts::ReferenceCounts;
use super::{Census, MAX_BEYOND};
use crate::error::Result;
use crate::image::Image;
use crate::units::{HostCluster, HostOffset};

/// Everything that the image refers to, as it is on disk.
#[derive(Debug)]
pub(crate) struct References {
    counts: ReferenceCounts,
    end: u64,
    beyond: Vec<Range<u64>>,
    /// Whether everything could be followed: without that a cluster may have more references.
    pub(crate) complete: bool,
    /// Metadata, but for pages of bitmaps, whose cluster something else refers to as well.
    pub(crate) overlap: Option<(&'static str, HostOffset)>,
}

impl References {
    /// Counts the references of an image that nobody changes meanwhile.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn count_all(image: &Image) -> Result<Self> {
        let header = image.header();
        let mut census = Census::unlimited(image.file(), &header)?;
        let (place, entries) = census.read_directory(image);
        census.count_all(image, &header, place, &entries);
        if let Some(error) = census.failed {
            return Err(error);
        }
        let geometry = census.geometry;
        let block = census.shared_block.map(|offset| ("refcount block", offset));
        let mut shared = census
            .shared
            .iter()
            .filter(|(_, (structure, _))| *structure != "bitmap page")
            .map(|(&cluster, &(name, _))| (name, geometry.host_offset(HostCluster(cluster))));
        let overlap = shared.next().or(block);
        let whole = census.beyond.len() < MAX_BEYOND && census.beyond.iter().all(is_short);
        Ok(Self {
            overlap,
            complete: !census.unfollowed && whole,
            end: census.clusters + 1,
            beyond: census.beyond.into_iter().filter(is_short).collect(),
            counts: census.counts,
        })
    }

    /// The first cluster of a range that has references.
    pub(crate) fn next(&self, clusters: Range<u64>) -> Option<u64> {
        let end = clusters.end.min(self.end);
        self.counts.next_referenced(clusters.start, end)
    }

    /// The counts of a range where they are bytes in a row; those that are missing at its end are
    /// zero. [`u8::MAX`] stands for more than fit.
    pub(crate) fn slice(&self, clusters: Range<u64>) -> Option<&[u8]> {
        self.counts.slice(clusters)
    }

    /// References to a cluster.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        self.counts.get(cluster)
    }

    /// Clusters behind the end of the file that something refers to.
    pub(crate) fn beyond(&self) -> impl Iterator<Item = u64> {
        self.beyond.iter().flat_map(Range::clone)
    }
}

/// Whether a range is what one cluster of data takes, compressed or not.
fn is_short(range: &Range<u64>) -> bool {
    range.end - range.start <= 4
}
