//! The chain as it is: the records of all disks and the descriptors, joined into one tree.
//!
//! # Invariants
//! 1. Reading writes nothing. Interrupted operations are resolved in memory only.
//! 2. Checkpoints are joined by identity. Names are for people.
//! 3. Where disks contradict each other the tree has a gap and a [`Problem`], not a guess.

mod join;
mod pending;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tidemark_qcow2::chain::{ChainRecord, CheckpointEntry, Health, Identity, Proof, Reading};
use tidemark_qcow2::{BitmapInfo, Image, proof};

use crate::{Descriptor, Domain, Error, Evidence, NodeId, Problem, Result, Tree};

pub(crate) use join::identity_of_name;
pub(crate) use pending::{Pending, Standing};

/// What was found of an image's chain record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Soundness {
    Absent,
    Current,
    Stale,
    Damaged,
}

/// One disk at one moment.
pub(crate) struct DiskView {
    pub(crate) name: String,
    pub(crate) image: Arc<Image>,
    /// The images below, from the top down, as far as they were given.
    pub(crate) layers: Vec<Arc<Image>>,
    pub(crate) soundness: Soundness,
    /// The record with interrupted operations resolved.
    pub(crate) record: Option<ChainRecord>,
    /// The interrupted operation, if there is one.
    pub(crate) pending: Option<Pending>,
    pub(crate) bitmaps: Vec<BitmapInfo>,
    /// Where each checkpoint stands in the record.
    places: HashMap<Identity, usize>,
    /// Where each bitmap stands in the directory.
    named: HashMap<String, usize>,
    /// Whether the directory of bitmaps could be read.
    pub(crate) readable: bool,
    /// Whether nobody else changed the directory since the record was written.
    pub(crate) directory_is_ours: bool,
}

/// All of a domain's chain at one moment.
pub(crate) struct View {
    pub(crate) disks: Vec<DiskView>,
    pub(crate) tree: Tree,
    pub(crate) current: CurrentState,
    /// Descriptors, by the identity of the checkpoint that they were found to describe.
    pub(crate) descriptors: HashMap<Identity, Descriptor>,
    pub(crate) problems: Vec<Problem>,
}

/// Who is current, as far as the disks agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CurrentState {
    /// The identity, which need not be in the tree, or none.
    Agreed(Option<Identity>),
    Disputed,
}

impl View {
    /// Reads every disk's record and every descriptor.
    pub(crate) fn read(domain: &Domain) -> Result<Self> {
        let (descriptors, problems) = match domain.store() {
            Some(store) => store.read_all()?,
            None => (Vec::new(), Vec::new()),
        };
        Self::join(domain, descriptors, problems)
    }

    /// Reads every disk's record and nothing else.
    pub(crate) fn of_images(domain: &Domain) -> Result<Self> {
        Self::join(domain, Vec::new(), Vec::new())
    }

    fn join(
        domain: &Domain,
        descriptors: Vec<Descriptor>,
        mut problems: Vec<Problem>,
    ) -> Result<Self> {
        let mut disks: Vec<DiskView> = domain
            .disks()
            .iter()
            .map(|disk| {
                let layers = domain.layers(&disk.name);
                DiskView::read(&disk.name, &disk.image, layers).map_err(Error::on(&disk.name))
            })
            .collect::<Result<_>>()?;
        pending::resolve(&mut disks);
        disks.iter_mut().for_each(DiskView::index);
        problems.extend(disks.iter().flat_map(DiskView::problems));
        Ok(join::join(disks, descriptors, problems))
    }

    /// The disk of a name.
    pub(crate) fn disk(&self, name: &str) -> Result<&DiskView> {
        let found = self.disks.iter().find(|disk| disk.name == name);
        found.ok_or_else(|| Error::UnknownDisk(name.to_owned()))
    }

    /// The checkpoint of a name.
    pub(crate) fn named(&self, name: &str) -> Result<NodeId> {
        self.tree.named(name)
    }

    /// The checkpoint of an identity; `name` is for the error.
    pub(crate) fn find(&self, identity: Identity, name: &str) -> Result<NodeId> {
        self.tree
            .find(identity)
            .ok_or_else(|| Error::NoSuchCheckpoint(name.to_owned()))
    }

    /// Refuses what must not meet an operation that changes the chain, before the first write.
    pub(crate) fn require_changeable(&self) -> Result<()> {
        self.disks.iter().try_for_each(DiskView::require_changeable)
    }

    /// All bitmap names and checkpoint names in use.
    pub(crate) fn names(&self) -> HashSet<String> {
        let bitmaps = self
            .disks
            .iter()
            .flat_map(|disk| &disk.bitmaps)
            .map(|info| &info.name);
        let nodes = self.tree.ids().map(|id| &self.tree.node(id).name);
        bitmaps.chain(nodes).cloned().collect()
    }
}

impl DiskView {
    fn read(name: &str, image: &Arc<Image>, layers: &[Arc<Image>]) -> tidemark_qcow2::Result<Self> {
        let (bitmaps, readable) = match image.bitmaps() {
            Ok(bitmaps) => (bitmaps, true),
            Err(tidemark_qcow2::Error::Corrupt { .. }) => (Vec::new(), false),
            Err(error) => return Err(error),
        };
        let (soundness, record) = match image.chain() {
            Reading::Absent => (Soundness::Absent, None),
            Reading::Current(record) => (Soundness::Current, Some(record)),
            Reading::Stale(record) => (Soundness::Stale, Some(record)),
            Reading::Damaged => (Soundness::Damaged, None),
        };
        Ok(Self {
            name: name.to_owned(),
            image: Arc::clone(image),
            layers: layers.to_vec(),
            soundness,
            directory_is_ours: record.as_ref().is_none_or(|record| {
                let digest = proof::directory_digest(record, bitmaps.iter().cloned());
                digest == record.directory_digest
            }),
            record,
            pending: None,
            named: bitmaps
                .iter()
                .enumerate()
                .map(|(place, info)| (info.name.clone(), place))
                .collect(),
            bitmaps,
            places: HashMap::new(),
            readable,
        })
    }

    /// The entry of a checkpoint on this disk.
    pub(crate) fn entry(&self, identity: Identity) -> Option<&CheckpointEntry> {
        self.record
            .as_ref()?
            .checkpoints
            .get(*self.places.get(&identity)?)
    }

    /// Whether the disk was at hand when a checkpoint was taken, though it took no part: its own
    /// links, from the current one or from any that it has, lead back to it. A disk that was rolled
    /// back behind it, or that was not given then, has no such link, and its older bitmaps then
    /// answer nothing for it.
    pub(crate) fn witnessed(&self, identity: Identity, tree: &Tree) -> bool {
        let Some(record) = &self.record else {
            return false;
        };
        let parent = |at: Identity| match self.entry(at) {
            Some(entry) => entry.parent,
            // One that is in no image proves nothing of the time before it.
            None => {
                let id = tree.find(at).filter(|id| tree.node(*id).in_images)?;
                Some(tree.node(tree.parent(id)?).identity)
            }
        };
        let mut seen = HashSet::new();
        for start in record
            .current
            .into_iter()
            .chain(record.checkpoints.iter().map(|e| e.identity))
        {
            let mut next = Some(start);
            while let Some(at) = next.filter(|at| seen.insert(*at)) {
                if at == identity {
                    return true;
                }
                next = parent(at);
            }
        }
        false
    }

    fn index(&mut self) {
        let entries = self.record.iter().flat_map(|record| &record.checkpoints);
        self.places = entries
            .enumerate()
            .map(|(place, entry)| (entry.identity, place))
            .collect();
    }

    /// What the directory says of a bitmap.
    pub(crate) fn bitmap(&self, name: &str) -> Option<&BitmapInfo> {
        self.bitmaps.get(*self.named.get(name)?)
    }

    /// The state as far as record and directory tell, without a look at bits.
    pub(crate) fn quick_health(&self, entry: &CheckpointEntry) -> Health {
        if !entry.health.is_usable() {
            return entry.health;
        }
        let Some(info) = self.bitmap(&entry.name) else {
            return Health::Missing;
        };
        let recording = matches!(entry.proof, Proof::Recording(_));
        if info.in_use {
            Health::Inconsistent
        } else if recording && !info.auto {
            Health::NotRecording
        } else if entry
            .disk_bytes
            .is_some_and(|bytes| bytes != self.image.size())
        {
            Health::SizeDiffers
        } else {
            entry.health
        }
    }

    /// What the states on this disk rest on.
    pub(crate) fn evidence(&self) -> Evidence {
        match self.soundness {
            Soundness::Stale => Evidence::StaleRecord,
            _ if self.directory_is_ours => Evidence::Record,
            _ => Evidence::ChangedDirectory,
        }
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let disk = self.name.clone();
        match self.soundness {
            Soundness::Stale => problems.push(Problem::StaleRecord { disk }),
            Soundness::Damaged => problems.push(Problem::DamagedRecord { disk }),
            Soundness::Absent | Soundness::Current => {}
        }
        if !self.readable {
            problems.push(Problem::DirectoryUnreadable {
                disk: self.name.clone(),
            });
        }
        problems.extend(
            self.pending
                .as_ref()
                .map(|pending| pending.problem(&self.name)),
        );
        problems
    }

    fn require_changeable(&self) -> Result<()> {
        let unsound = |state| {
            Err(Error::RecordUnsound {
                disk: self.name.clone(),
                state,
            })
        };
        match self.soundness {
            Soundness::Stale => return unsound("stale"),
            Soundness::Damaged => return unsound("damaged"),
            Soundness::Absent | Soundness::Current => {}
        }
        let Some(pending) = &self.pending else {
            return Ok(());
        };
        match pending.standing {
            Standing::Finish | Standing::Undo if !self.image.is_writable() => {
                Err(Error::DiskReadOnly(self.name.clone()))
            }
            Standing::Finish | Standing::Undo => Ok(()),
            Standing::Undecided => Err(Error::Undecided {
                disk: self.name.clone(),
                decider: pending.intent.decider.clone(),
                checkpoint: pending.name.clone(),
            }),
            Standing::Backup => Err(Error::PendingBackup {
                checkpoint: pending.name.clone(),
            }),
        }
    }
}
