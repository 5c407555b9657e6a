//! A set of host clusters: one bit each, with memory only where there are any.

use std::collections::BTreeMap;

use crate::convert::{to_u64, to_usize};
use crate::units::HostCluster;

const WORDS: usize = 64;
const WORD_BITS: u64 = 64;

/// Host clusters, in memory that the neighbourhoods of its members bound.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterSet {
    pieces: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl ClusterSet {
    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether it holds `cluster`.
    pub(crate) fn contains(&self, cluster: HostCluster) -> bool {
        let (piece, word, bit) = place(cluster);
        self.pieces
            .get(&piece)
            .is_some_and(|words| words[word] & bit != 0)
    }

    /// Adds a cluster; returns whether it is new.
    pub(crate) fn insert(&mut self, cluster: HostCluster) -> bool {
        let (piece, word, bit) = place(cluster);
        let words = self
            .pieces
            .entry(piece)
            .or_insert_with(|| Box::new([0; WORDS]));
        let new = words[word] & bit == 0;
        words[word] |= bit;
        new
    }

    /// Adds everything that `other` holds.
    pub(crate) fn extend(&mut self, other: &Self) {
        for (&piece, words) in &other.pieces {
            let own = self
                .pieces
                .entry(piece)
                .or_insert_with(|| Box::new([0; WORDS]));
            for (own, word) in own.iter_mut().zip(words.iter()) {
                *own |= word;
            }
        }
    }

    /// Empties it.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
    }
}

/// Piece, word in it, and bit in that.
fn place(cluster: HostCluster) -> (u64, usize, u64) {
    let word = cluster.0 / WORD_BITS;
    let words = to_u64(WORDS);
    (
        word / words,
        to_usize(word % words),
        1 << (cluster.0 % WORD_BITS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_into_it() {
        let members = [0, 1, 63, 64, 4095, 4096, 1 << 54];
        let mut set = ClusterSet::default();
        assert!(set.is_empty());
        for cluster in members.map(HostCluster) {
            assert!(!set.contains(cluster));
            assert!(set.insert(cluster) && !set.insert(cluster));
        }
        let mut other = ClusterSet::default();
        other.insert(HostCluster(7));
        set.extend(&other);
        assert!(set.contains(HostCluster(7)) && !set.contains(HostCluster(8)));
        assert!(members.into_iter().all(|at| set.contains(HostCluster(at))));
        set.clear();
        assert!(set.is_empty() && !set.contains(HostCluster(0)));
    }
}
