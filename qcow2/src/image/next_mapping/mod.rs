//! The next mapping: L1 table, L2 tables and refcounts as they will be, built aside and made true
//! by one write of the header. Snapshots and resizing are nothing but work on it.
//!
//! 1. Counts to come are staged in memory (`counts`); whatever is wrong with what they count shows
//!    here.
//! 2. L2 tables that differ, and then the L1 table, go into fresh clusters (`tables`).
//! 3. Refcount blocks that differ and a refcount table go into fresh clusters (`alloc::next`).
//! 4. One header write names active L1, refcount table, and what else the update stages.
//!
//! Nothing that the present header names is changed, so that a crash before 4 leaves the old state
//! and leaked clusters, after it the new one.

mod counts;
mod tables;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;

pub(crate) use self::counts::{ADD, DROP};
use super::{Image, Update};
use crate::alloc::{HostRun, single};
use crate::convert::{to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::header::Header;
use crate::sync::atomic::Ordering;
use crate::units::HostOffset;

/// The mapping to come.
#[derive(Debug)]
pub(crate) struct NextMapping<'a> {
    image: &'a Image,
    /// The header as it is.
    header: Header,
    /// The active L1 table as it is.
    before: Vec<u64>,
    /// The active L1 table to come.
    l1: Vec<u64>,
    /// The L2 tables of `before`.
    active: HashSet<HostOffset>,
    /// Fresh clusters of metadata: nobody's before the header is written.
    metadata: Vec<HostRun>,
    /// The same for guest data.
    data: Vec<HostRun>,
    /// Metadata that the header will not name any more.
    released: Vec<HostRun>,
}

impl Image {
    /// Runs `work` on the mapping to come, and makes it true together with what `work` stages in
    /// the update. Returns what `work` answered.
    ///
    /// # Errors
    /// Those of `work` and of the commit, and then the mapping is as before.
    pub(crate) fn remap<R>(
        &self,
        work: impl FnOnce(&mut Update<'_>, &mut NextMapping<'_>) -> Result<R>,
    ) -> Result<R> {
        let next = RefCell::new(None);
        let committed = Cell::new(false);
        let answer = Cell::new(None);
        let changed = self.restructure(
            |update| {
                let next = &mut *next.borrow_mut();
                let next = next.insert(NextMapping::begin(self)?);
                answer.set(Some(work(update, next)?));
                next.finish(update)
            },
            |_, ()| {
                committed.set(true);
                next.take().map_or(Ok(()), NextMapping::adopt)
            },
        );
        if let Err(error) = changed {
            if !committed.get() && self.check_writable().is_ok() {
                next.take().map_or(Ok(()), NextMapping::give_back)?;
            }
            return Err(error);
        }
        answer
            .take()
            .ok_or_else(|| self.file.invalid(Mistake::Poisoned))
    }
}

impl<'a> NextMapping<'a> {
    fn begin(image: &'a Image) -> Result<Self> {
        let active = image.active_tables()?.into_iter().collect();
        let before = image.l1_words();
        image.with_allocator(|allocator, _| {
            allocator.begin_next();
            Ok(())
        })?;
        Ok(Self {
            image,
            header: image.header(),
            l1: before.clone(),
            before,
            active,
            metadata: Vec::new(),
            data: Vec::new(),
            released: Vec::new(),
        })
    }

    pub(crate) fn image(&self) -> &'a Image {
        self.image
    }

    /// The header as it is.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// The active L1 table to come.
    pub(crate) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// Puts another L1 table in its place. What is below either is the caller's to count.
    pub(crate) fn set_l1(&mut self, l1: Vec<u64>) {
        self.l1 = l1;
    }

    /// Takes clusters in a row for guest data, at most `wanted`.
    pub(crate) fn take_data(&mut self, wanted: u64) -> Result<HostRun> {
        let run = self.counts(|allocator, file| allocator.allocate(file, wanted))?;
        self.data.push(run);
        Ok(run)
    }

    /// Writes metadata, padded to whole clusters, into fresh clusters in a row.
    pub(crate) fn write_new(
        &mut self,
        mut bytes: Vec<u8>,
        what: &'static str,
    ) -> Result<HostOffset> {
        let geometry = self.header.geometry;
        let clusters = geometry.clusters_for(to_u64(bytes.len()));
        bytes.resize(to_usize(clusters << geometry.cluster_bits), 0);
        let start = self.counts(|allocator, file| allocator.allocate_exact(file, clusters))?;
        self.metadata.push(run(start, clusters));
        self.image.file.write(&bytes, start, what)?;
        Ok(start)
    }

    /// Stages that metadata is no longer named.
    pub(crate) fn drop_metadata(&mut self, start: HostOffset, bytes: u64) -> Result<()> {
        let run = run(start, self.header.geometry.clusters_for(bytes));
        self.count_run(run, DROP)?;
        self.released.push(run);
        Ok(())
    }

    /// Names the L1 table to come, and the counts, in the header to come.
    fn finish(&mut self, update: &mut Update<'_>) -> Result<()> {
        if self.l1 != self.before {
            self.place_l1(update)?;
        }
        if self.counts(|allocator, _| Ok(allocator.stages_counts()))? {
            update.commit_next_counts();
        }
        Ok(())
    }

    /// The header is durable: memory follows.
    fn adopt(self) -> Result<()> {
        let image = self.image;
        let size = image.header().disk_bytes;
        if self.l1 == self.before {
            image.size.store(size, Ordering::Release);
        } else {
            image.replace_mapping(size, self.l1);
        }
        let tables = image.active_tables()?.into_iter().map(single);
        image.with_allocator(|allocator, _| {
            let old = self.active.iter().copied().map(single);
            old.chain(self.released)
                .for_each(|run| allocator.release(run));
            tables
                .chain(self.metadata)
                .for_each(|run| allocator.fix_run(run.start, run.clusters));
            allocator.abandon_next(&image.file)
        })
    }

    /// The header was not written: the fresh clusters are nobody's.
    fn give_back(self) -> Result<()> {
        let file = &self.image.file;
        let fresh: Vec<HostRun> = self.metadata.into_iter().chain(self.data).collect();
        self.image.with_allocator(|allocator, _| {
            allocator.abandon_next(file)?;
            allocator.free_now(file, &fresh)
        })
    }
}

fn run(start: HostOffset, clusters: u64) -> HostRun {
    HostRun {
        start,
        clusters,
        untouched: false,
    }
}
