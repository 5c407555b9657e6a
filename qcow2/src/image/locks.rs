//! Who waits for whom while an image is used by many threads.
//!
//! Locks are taken in this order and never the other way round:
//! 1. the entrance ([`Entrance`]): guest writes and flushes share it, structural changes own it;
//! 2. the lock of a group of guest clusters ([`ClusterLocks`]);
//! 3. the flush lock;
//! 4. the tracker's staging lock;
//! 5. creation of L2 tables;
//! 6. the allocator;
//! 7. the first cluster;
//! 8. the bitmap directory;
//! 9. the table cache;
//! 10. the set of clusters that are never written in place;
//! 11. the L1 table in memory.

use std::sync::PoisonError;

use crate::convert::to_usize;
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, lane};
use crate::units::GuestCluster;

/// Few under the model checker, which takes every lock one after another.
const ENTRANCES: usize = if cfg!(shuttle) { 2 } else { 16 };
const STRIPES: u64 = if cfg!(shuttle) { 4 } else { 1024 };
/// Guest clusters that share one lock, as a power of two.
const GROUP_BITS: u32 = 4;

/// A lock on its own cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(RwLock<()>);

/// Many shared holders that do not touch a common cache line, or one exclusive owner.
#[derive(Debug)]
pub(crate) struct Entrance {
    lines: Vec<Line>,
}

impl Entrance {
    pub(crate) fn new() -> Self {
        Self {
            lines: (0..ENTRANCES).map(|_| Line::default()).collect(),
        }
    }

    /// Enters beside other guests.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.lines[lane(ENTRANCES)]
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all guests have left and keeps new ones out.
    pub(crate) fn close(&self) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.lines
            .iter()
            .map(|line| line.0.write().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }
}

/// One lock for each group of guest clusters: data moves under it shared, mappings change under it
/// alone.
#[derive(Debug)]
pub(crate) struct ClusterLocks {
    stripes: Vec<RwLock<()>>,
}

impl ClusterLocks {
    pub(crate) fn new() -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| RwLock::default()).collect(),
        }
    }

    /// Clusters from `cluster` on that share its lock, including itself.
    pub(crate) fn group_rest(cluster: GuestCluster) -> u64 {
        (1 << GROUP_BITS) - (cluster.0 & ((1 << GROUP_BITS) - 1))
    }

    fn stripe(&self, cluster: GuestCluster) -> &RwLock<()> {
        &self.stripes[to_usize((cluster.0 >> GROUP_BITS) % STRIPES)]
    }

    pub(crate) fn share(&self, cluster: GuestCluster) -> RwLockReadGuard<'_, ()> {
        self.stripe(cluster)
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps everybody out of every cluster, for a change of the whole mapping.
    pub(crate) fn own_all(&self) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.stripes
            .iter()
            .map(|stripe| stripe.write().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    pub(crate) fn own(&self, cluster: GuestCluster) -> RwLockWriteGuard<'_, ()> {
        self.stripe(cluster)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
