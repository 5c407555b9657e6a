//! What a listing says of each checkpoint.

use std::collections::HashMap;

use tidemark_qcow2::chain::{Health, Identity};

use crate::view::{DiskView, View};
use crate::{
    DescribedDisk, Descriptor, Domain, Error, ListFlags, NodeId, Problem, Result, SinceOptions,
    delta, fold, infer, list,
};

/// How much a listing looks at. The default reads no bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Filter and order.
    pub flags: ListFlags,
    /// Prove every bitmap by its bits; otherwise the state is what record and directory say.
    pub judge: bool,
    /// Fill in [`DiskState::dirty_bytes`].
    pub sizes: bool,
}

/// What remembers a checkpoint's moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A dirty bitmap: a checkpoint of the chain.
    #[default]
    Bitmap,
    /// An internal snapshot that somebody took: what changed since is told by the mapping tables.
    Snapshot,
}

impl Kind {
    /// The spelling used by the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Snapshot => "snapshot",
        }
    }
}

/// What the state of a checkpoint on a disk rests on, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// The chain record, and nobody else changed the directory.
    Record,
    /// The chain record; somebody else changed the directory.
    ChangedDirectory,
    /// An older chain record, for the newer is damaged.
    StaleRecord,
    /// The mapping tables of the image.
    Mapping,
    /// Nothing but a descriptor outside the image.
    Descriptor,
    /// No record; older recording bitmaps contain the newer ones.
    Inclusion,
    /// No record; numbers in the names.
    NameOrder,
    /// No record, and nothing that tells an order.
    NameOnly,
}

impl Evidence {
    /// The spelling used by the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::ChangedDirectory => "record, directory changed",
            Self::StaleRecord => "older record",
            Self::Mapping => "mapping tables",
            Self::Descriptor => "descriptor",
            Self::Inclusion => "inclusion of contents",
            Self::NameOrder => "numbers in names",
            Self::NameOnly => "name",
        }
    }

    /// Whether it is a guess that says so.
    pub const fn is_inferred(self) -> bool {
        matches!(self, Self::Inclusion | Self::NameOrder | Self::NameOnly)
    }
}

/// A checkpoint on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskState {
    /// Name of the disk.
    pub disk: String,
    /// What is known about its bitmap there.
    pub health: Health,
    /// Whether that was inferred, without a record.
    pub inferred: bool,
    /// What it rests on.
    pub evidence: Evidence,
    /// Whether its bitmap records now.
    pub recording: bool,
    /// Bytes that changed on the disk since the checkpoint, an upper bound; `None` when not asked
    /// for, or when the disk must be full.
    pub dirty_bytes: Option<u64>,
}

/// A checkpoint as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Name.
    pub name: String,
    /// What remembers its moment.
    pub kind: Kind,
    /// Identity; `None` when it was inferred and has none yet.
    pub identity: Option<Identity>,
    /// Name of the parent; `None` for a root.
    pub parent: Option<String>,
    /// Whether it is the current one.
    pub current: bool,
    /// Whether there is a descriptor outside the images.
    pub metadata: bool,
    /// Seconds since the epoch, if known.
    pub created: Option<u64>,
    /// Free text of the descriptor.
    pub description: Option<String>,
    /// The disks that have it, or should, by name.
    pub disks: Vec<DiskState>,
}

/// A listing with what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The checkpoints, filtered and ordered.
    pub checkpoints: Vec<CheckpointInfo>,
    /// Findings of the whole domain, whatever the filter.
    pub problems: Vec<Problem>,
}

impl Domain {
    /// Lists checkpoints with all there is to say about them; one consistent set.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Store`].
    pub fn list(&self, options: ListOptions) -> Result<Listing> {
        self.list_below(None, options)
    }

    /// Lists the children of a checkpoint, or with [`ListFlags::DESCENDANTS`] all below it.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`]; [`Error::Image`]; [`Error::Store`].
    pub fn list_from(&self, name: &str, options: ListOptions) -> Result<Listing> {
        self.list_below(Some(name), options)
    }

    fn list_below(&self, from: Option<&str>, options: ListOptions) -> Result<Listing> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let from = from.map(|name| view.named(name)).transpose()?;
        let ids = list::list(&view.tree, from, options.flags);
        Ok(Listing {
            checkpoints: describe(&view, &ids, options)?,
            problems: view.problems,
        })
    }
}

/// Describes checkpoints of a view.
pub(crate) fn describe(
    view: &View,
    ids: &[NodeId],
    options: ListOptions,
) -> Result<Vec<CheckpointInfo>> {
    let sizes = match options.sizes {
        true => view
            .disks
            .iter()
            .map(sizes_of)
            .collect::<Result<Vec<_>>>()?,
        false => vec![HashMap::new(); view.disks.len()],
    };
    let mut infos = Vec::with_capacity(ids.len());
    for &id in ids {
        let node = view.tree.node(id);
        let descriptor = view.descriptors.get(&node.identity);
        let mut disks = Vec::new();
        for (disk, sizes) in view.disks.iter().zip(&sizes) {
            let state = state_on(view, disk, id, options.judge)?;
            disks.extend(state.map(|state| DiskState {
                dirty_bytes: sizes.get(&node.identity).copied(),
                ..state
            }));
        }
        let entry = view.disks.iter().find_map(|disk| disk.entry(node.identity));
        infos.push(CheckpointInfo {
            name: node.name.clone(),
            kind: Kind::Bitmap,
            identity: Some(node.identity),
            parent: view
                .tree
                .parent(id)
                .map(|parent| view.tree.node(parent).name.clone()),
            current: view.tree.current() == Some(id),
            metadata: node.metadata,
            created: entry
                .and_then(|entry| entry.created)
                .or(descriptor.and_then(|descriptor| descriptor.created)),
            description: descriptor.and_then(|descriptor| descriptor.description.clone()),
            disks,
        });
    }
    Ok(infos)
}

/// The state on one disk; `None` when the disk has nothing to do with the checkpoint.
fn state_on(view: &View, disk: &DiskView, id: NodeId, judged: bool) -> Result<Option<DiskState>> {
    let node = view.tree.node(id);
    let state = |health, evidence, recording| DiskState {
        disk: disk.name.clone(),
        health,
        inferred: health == Health::Inferred,
        evidence,
        recording,
        dirty_bytes: None,
    };
    if let Some(entry) = disk.entry(node.identity) {
        let health = match judged {
            true => fold::judge(&disk.image, entry).map_err(Error::on(&disk.name))?,
            false => disk.quick_health(entry),
        };
        let recording = fold::is_recording(entry) && health != Health::NotRecording;
        return Ok(Some(state(health, disk.evidence(), recording)));
    }
    let described = view
        .descriptors
        .get(&node.identity)
        .and_then(|descriptor| descriptor.disks.as_ref())
        .and_then(|disks| disks.iter().find(|described| described.name == disk.name))
        .is_some_and(|described| described.bitmap);
    if !described {
        return Ok(None);
    }
    Ok(Some(
        match disk.bitmap(&node.name).filter(|_| disk.record.is_none()) {
            Some(info) => state(infer::health(info), Evidence::Descriptor, info.auto),
            None => state(Health::Missing, Evidence::Descriptor, false),
        },
    ))
}

fn sizes_of(disk: &DiskView) -> Result<HashMap<Identity, u64>> {
    delta::sizes(disk).map_err(Error::on(&disk.name))
}

/// The descriptor of a checkpoint; where there is none, what the images know.
pub(crate) fn descriptor(view: &View, id: NodeId, sizes: bool) -> Result<Descriptor> {
    let options = ListOptions::default();
    let info = describe(view, &[id], options)?.pop();
    let node = view.tree.node(id);
    let mut descriptor = view
        .descriptors
        .get(&node.identity)
        .cloned()
        .unwrap_or_default();
    descriptor.name.clone_from(&node.name);
    descriptor.identity = Some(node.identity);
    descriptor.parent = view
        .tree
        .parent(id)
        .map(|parent| view.tree.node(parent).name.clone());
    if let Some(info) = info {
        descriptor.created = descriptor.created.or(info.created);
        if descriptor.disks.is_none() {
            let disk = |disk: &DiskView| DescribedDisk {
                name: disk.name.clone(),
                bitmap: info.disks.iter().any(|state| state.disk == disk.name),
                changed_bytes: None,
                image: disk.record.as_ref().map(|record| record.image),
            };
            descriptor.disks = Some(view.disks.iter().map(disk).collect());
        }
    }
    if sizes {
        fill_sizes(view, id, &mut descriptor)?;
    }
    Ok(descriptor)
}

fn fill_sizes(view: &View, id: NodeId, descriptor: &mut Descriptor) -> Result<()> {
    for described in descriptor
        .disks
        .iter_mut()
        .flatten()
        .filter(|disk| disk.bitmap)
    {
        let Ok(disk) = view.disk(&described.name) else {
            continue;
        };
        let change = delta::on_disk(view, disk, id, SinceOptions::default())?;
        described.changed_bytes = match change.delta {
            delta::DiskDelta::Incremental(bits) => Some(bits.dirty_bytes()),
            delta::DiskDelta::Full { .. } => None,
        };
    }
    Ok(())
}
