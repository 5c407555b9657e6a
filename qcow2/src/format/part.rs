//! Where the bytes of one guest cluster come from, stretch by stretch.

use super::subclusters::Subcluster;
use super::table::{CompressedData, L2Entry};
use crate::convert::{to_u64, to_usize};
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// Where a stretch of a guest cluster comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Data that starts at this byte of the file.
    Data(HostOffset),
    /// Zeros; the byte of the file that is reserved for the first of them.
    Zeros(Option<HostOffset>),
    /// The backing file, or zeros; the byte of the file that is reserved for the first of them.
    Below(Option<HostOffset>),
    /// The whole cluster, compressed.
    Compressed(CompressedData),
}

impl Part {
    /// What continues this part `len` bytes further on, if that is in one piece with it.
    #[must_use]
    pub fn after(self, len: u64) -> Self {
        match self {
            Self::Data(place) => Self::Data(place.plus(len)),
            Self::Zeros(place) => Self::Zeros(place.map(|place| place.plus(len))),
            Self::Below(place) => Self::Below(place.map(|place| place.plus(len))),
            Self::Compressed(data) => Self::Compressed(data),
        }
    }
}

impl L2Entry {
    /// The part that holds byte `inside` of the cluster, from that byte on, and its bytes up to the
    /// end of the part or of the cluster.
    pub fn part(&self, inside: u64, geometry: &Geometry) -> (Part, u64) {
        let at = |host: HostOffset| host.plus(inside);
        let part = match *self {
            Self::Unallocated => Part::Below(None),
            Self::Zero { allocated, .. } => Part::Zeros(allocated.map(at)),
            Self::Normal { offset, .. } => Part::Data(at(offset)),
            Self::Compressed { .. } => {
                let data = self.compressed();
                data.map_or(Part::Below(None), Part::Compressed)
            }
            Self::Partial {
                host, subclusters, ..
            } => {
                let bytes = geometry.subcluster_bytes();
                let (kind, end) = subclusters.run(to_usize(inside / bytes));
                let part = match (kind, host) {
                    (Subcluster::Allocated, Some(host)) => Part::Data(at(host)),
                    (Subcluster::Zero, host) => Part::Zeros(host.map(at)),
                    (_, host) => Part::Below(host.map(at)),
                };
                return (part, to_u64(end) * bytes - inside);
            }
        };
        (part, geometry.cluster_bytes() - inside)
    }
}
