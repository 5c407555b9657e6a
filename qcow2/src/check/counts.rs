//! References to each host cluster, in memory that the file bounds and nothing that it claims.
//!
//! One byte a cluster in a dense array while the file is of usual size. In a huge sparse file only
//! the neighbourhoods of referenced clusters have memory. Counts that do not fit a byte stand in a
//! map beside.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::convert::{low_byte, to_u64, to_usize};

/// Clusters up to which the array is dense.
const DENSE_CLUSTERS: u64 = 1 << 28;
/// Clusters that share one piece of a sparse array.
const PIECE: usize = 64;
/// Bytes that are looked at together.
const STRETCH: usize = 256;
/// Says that the count stands in the map.
const HIGH: u8 = u8::MAX;

#[derive(Debug)]
enum Bytes {
    Dense(Vec<u8>),
    Sparse(BTreeMap<u64, Box<[u8; PIECE]>>),
}

/// References to the clusters of one file.
#[derive(Debug)]
pub(super) struct ReferenceCounts {
    bytes: Bytes,
    high: HashMap<u64, u64>,
    /// Largest count, which a refcount of the image can hold.
    most: u64,
    /// No cluster from this one on has a reference.
    used: u64,
}

impl ReferenceCounts {
    /// No references to any of `clusters` clusters.
    pub(super) fn new(clusters: u64, most: u64) -> Self {
        Self::with_dense_limit(clusters, most, DENSE_CLUSTERS)
    }

    fn with_dense_limit(clusters: u64, most: u64, limit: u64) -> Self {
        let bytes = if clusters <= limit {
            Bytes::Dense(vec![0; to_usize(clusters)])
        } else {
            Bytes::Sparse(BTreeMap::new())
        };
        Self {
            bytes,
            high: HashMap::new(),
            most,
            used: 0,
        }
    }

    /// Adds `times` references to a cluster; returns how many of them cannot be counted.
    pub(super) fn add(&mut self, cluster: u64, times: u64) -> u64 {
        let old = self.get(cluster);
        let room = self.most - old;
        self.put(cluster, old + times.min(room));
        times.saturating_sub(room)
    }

    /// Adds one reference where that is a matter of one byte; returns whether it was.
    pub(super) fn bump(&mut self, cluster: u64) -> bool {
        let most = self.most.min(u64::from(HIGH) - 1);
        self.used = self.used.max(cluster + 1);
        match &mut self.bytes {
            Bytes::Dense(bytes) => match bytes.get_mut(to_usize(cluster)) {
                Some(byte) if u64::from(*byte) < most => {
                    *byte += 1;
                    true
                }
                _ => false,
            },
            Bytes::Sparse(_) => false,
        }
    }

    /// Adds one reference to each cluster of a run where that is a matter of bytes; returns whether
    /// it was.
    pub(super) fn bump_run(&mut self, clusters: Range<u64>) -> bool {
        let most = low_byte(self.most.min(u64::from(HIGH) - 1));
        let range = to_usize(clusters.start)..to_usize(clusters.end);
        let Bytes::Dense(bytes) = &mut self.bytes else {
            return false;
        };
        let Some(run) = bytes.get_mut(range) else {
            return false;
        };
        if run
            .iter()
            .fold(false, |full, &count| full | (count >= most))
        {
            return false;
        }
        run.iter_mut().for_each(|count| *count += 1);
        self.used = self.used.max(clusters.end);
        true
    }

    /// The counts of a range where they are bytes in a row; those that are missing at its end are
    /// zero. [`u8::MAX`] stands for more than fit.
    pub(super) fn slice(&self, clusters: Range<u64>) -> Option<&[u8]> {
        match &self.bytes {
            Bytes::Dense(bytes) => {
                let end = to_usize(clusters.end).min(bytes.len());
                bytes.get(to_usize(clusters.start)..end)
            }
            Bytes::Sparse(_) => None,
        }
    }

    /// References to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let byte = match &self.bytes {
            Bytes::Dense(bytes) => bytes.get(to_usize(cluster)).copied(),
            Bytes::Sparse(pieces) => pieces
                .get(&(cluster / to_u64(PIECE)))
                .map(|piece| piece[slot(cluster)]),
        };
        match byte.unwrap_or(0) {
            HIGH => self.high.get(&cluster).copied().unwrap_or(HIGH.into()),
            byte => byte.into(),
        }
    }

    fn put(&mut self, cluster: u64, value: u64) {
        let byte = u8::try_from(value).unwrap_or(HIGH);
        if byte == HIGH {
            self.high.insert(cluster, value);
        }
        self.used = self.used.max(cluster + 1);
        match &mut self.bytes {
            Bytes::Dense(bytes) => {
                let length = bytes.len().max(to_usize(cluster) + 1);
                bytes.resize(length, 0);
                bytes[to_usize(cluster)] = byte;
            }
            Bytes::Sparse(pieces) => {
                let piece = pieces
                    .entry(cluster / to_u64(PIECE))
                    .or_insert_with(|| Box::new([0; PIECE]));
                piece[slot(cluster)] = byte;
            }
        }
    }

    /// Replaces the references by the refcount on disk, for clusters that have any.
    pub(super) fn settle(&mut self, cluster: u64, refcount: u64) {
        let known = match &self.bytes {
            Bytes::Dense(bytes) => to_usize(cluster) < bytes.len(),
            Bytes::Sparse(pieces) => pieces.contains_key(&(cluster / to_u64(PIECE))),
        };
        if known {
            // From now on only "is it one" is asked.
            self.put(cluster, refcount.min(2));
        }
    }

    /// First cluster in `from..end` with a reference.
    pub(super) fn next_referenced(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.used);
        match &self.bytes {
            Bytes::Dense(bytes) => {
                let end = to_usize(end.min(to_u64(bytes.len())));
                first_used(bytes.get(to_usize(from)..end)?).map(|position| from + to_u64(position))
            }
            Bytes::Sparse(pieces) => {
                let size = to_u64(PIECE);
                if from >= end {
                    return None;
                }
                let range = from / size..=(end - 1) / size;
                pieces.range(range).find_map(|(number, piece)| {
                    let base = number * size;
                    (base.max(from)..(base + size).min(end))
                        .find(|&cluster| piece[slot(cluster)] != 0)
                })
            }
        }
    }
}

/// Position of the first byte that is not zero.
fn first_used(bytes: &[u8]) -> Option<usize> {
    let used = |byte: &u8| *byte != 0;
    // Most often the next one is; else a stretch at a time.
    if bytes.first().is_some_and(used) {
        return Some(0);
    }
    let stretch = bytes
        .chunks(STRETCH)
        .position(|stretch| stretch.iter().fold(0, |any, byte| any | byte) != 0)?;
    let start = stretch * STRETCH;
    let inside = bytes[start..].iter().position(used)?;
    Some(start + inside)
}

fn slot(cluster: u64) -> usize {
    to_usize(cluster) % PIECE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [ReferenceCounts; 2] {
        [1 << 20, 0].map(|limit| ReferenceCounts::with_dense_limit(100_000, u64::MAX, limit))
    }

    #[test]
    fn dense_and_sparse_count_alike() {
        for mut counts in both() {
            for (cluster, times) in [(0, 1), (63, 2), (64, 254), (64, 1), (64, 700), (99_999, 3)] {
                assert_eq!(counts.add(cluster, times), 0);
            }
            assert_eq!(
                [0, 63, 64, 99_999, 5].map(|at| counts.get(at)),
                [1, 2, 955, 3, 0]
            );
            assert_eq!(counts.next_referenced(1, 100_000), Some(63));
            assert_eq!(counts.next_referenced(65, 100_000), Some(99_999));
            assert_eq!(counts.next_referenced(65, 99_999), None);
            let bumped = counts.bump(7) || counts.add(7, 1) == 0;
            assert!(bumped && counts.get(7) == 1 && !counts.bump(64));
            counts.settle(64, 1);
            assert_eq!(counts.get(64), 1);
        }
    }

    #[test]
    fn what_does_not_fit_the_width_is_told() {
        let mut counts = ReferenceCounts::new(8, 3);
        assert_eq!(counts.add(1, 2), 0);
        assert_eq!(counts.add(1, 5), 4);
        assert_eq!(counts.get(1), 3);
    }

    #[test]
    fn a_sparse_count_costs_only_what_is_referenced() {
        let mut counts = ReferenceCounts::new(1 << 50, u64::MAX);
        assert_eq!(counts.add((1 << 50) - 1, 1), 0);
        assert_eq!(counts.next_referenced(0, 1 << 50), Some((1 << 50) - 1));
        assert_eq!(counts.next_referenced(5, 5), None);
    }
}
