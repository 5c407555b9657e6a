//! Reinstating the descriptor of a checkpoint: no bitmap is touched.

use tidemark_qcow2::chain::{Health, Identity};

use super::draft::Part;

use crate::settle::settle;
use crate::view::{DiskView, View, identity_of_name};
use crate::{Checkpoint, CreateFlags, Descriptor, Domain, Error, NodeId, Result, fold};

impl Domain {
    /// Stores the descriptor of a checkpoint that was, parents first. With
    /// [`CreateFlags::CURRENT`] it becomes current in the tree; which bitmap records does not
    /// change until the next creation.
    ///
    /// # Errors
    /// [`Error::NoStore`]; [`Error::Xml`] without name or creation time; [`Error::SelfParent`],
    /// [`Error::UnknownParent`], [`Error::Cycle`]; [`Error::Disagrees`] when the images know
    /// another moment or parent of that name, and [`Error::BrokenBitmap`] when a bitmap that it
    /// counts on does not serve, unless [`CreateFlags::NO_VALIDATE`] is set.
    pub fn redefine(&self, descriptor: &Descriptor, flags: CreateFlags) -> Result<Checkpoint> {
        (flags | CreateFlags::REDEFINE).check()?;
        let store = self.store().ok_or(Error::NoStore)?;
        let required = |missing: bool, field| match missing {
            true => Err(Error::Xml(format!("a redefinition needs <{field}>"))),
            false => Ok(()),
        };
        required(descriptor.name.is_empty(), "name")?;
        required(descriptor.created.is_none(), "creationTime")?;
        crate::name::check(&descriptor.name)?;
        let _turn = self.changing()?;
        let view = View::read(self)?;
        let known = view.tree.named(&descriptor.name).ok();
        let parent = check_parent(&view, descriptor, known)?;
        let identity = choose_identity(&view, descriptor, known)?;
        if !flags.contains(CreateFlags::NO_VALIDATE) {
            validate(self, &view, descriptor, identity, parent)?;
        }
        let makes_current = flags.contains(CreateFlags::CURRENT);
        if makes_current {
            view.require_changeable()?;
        }
        let whole = Descriptor {
            identity: Some(identity),
            ..descriptor.clone()
        };
        store.write(&whole)?;
        if makes_current {
            settle(&view)?;
            self.make_current(&view, identity)?;
        }
        Ok(Checkpoint::new(self, identity, descriptor.name.clone()))
    }

    /// Makes a checkpoint current, in the tree only: which bitmap records does not change until the
    /// next creation. It also ends a dispute between disks about who is current.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`]; [`Error::NoDisks`] when none is writable; as for every change,
    /// [`Error::RecordUnsound`], [`Error::Undecided`], [`Error::PendingBackup`]; [`Error::Image`].
    pub fn set_current(&self, name: &str) -> Result<()> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        let id = view.named(name)?;
        view.require_changeable()?;
        settle(&view)?;
        self.make_current(&view, view.tree.node(id).identity)
    }

    /// Says on every writable disk who is current. A disk without a record gets one. A disk that
    /// has no part in it and cannot witness it names its nearest ancestor.
    fn make_current(&self, view: &View, identity: Identity) -> Result<()> {
        let writable: Vec<_> = self
            .disks()
            .iter()
            .filter(|disk| disk.image.is_writable())
            .collect();
        if writable.is_empty() {
            return Err(Error::NoDisks);
        }
        for disk in writable {
            let known = current_on(view, view.disk(&disk.name)?, identity);
            let part = Part::new(disk, None)?;
            let write = part.image.update(|update| {
                let mut record = update.record().cloned().unwrap_or(part.fresh);
                record.current = known;
                update.set_record(Some(record));
                Ok(())
            });
            write.map_err(Error::on(&disk.name))?;
        }
        Ok(())
    }
}

/// Whom a disk may name when `identity` becomes current.
fn current_on(view: &View, disk: &DiskView, identity: Identity) -> Option<Identity> {
    let id = view.tree.find(identity);
    let in_images = id.is_some_and(|id| view.tree.node(id).in_images);
    let empty = disk
        .record
        .as_ref()
        .is_none_or(|record| record.checkpoints.is_empty());
    if !in_images || empty || disk.entry(identity).is_some() || disk.witnessed(identity, &view.tree)
    {
        return Some(identity);
    }
    let mut lineage = view.tree.lineage(id?).map(|id| view.tree.node(id).identity);
    lineage.find(|identity| disk.entry(*identity).is_some())
}

fn check_parent(
    view: &View,
    descriptor: &Descriptor,
    known: Option<NodeId>,
) -> Result<Option<NodeId>> {
    let Some(name) = &descriptor.parent else {
        return Ok(None);
    };
    if *name == descriptor.name {
        return Err(Error::SelfParent(name.clone()));
    }
    let parent = view.tree.named(name).map_err(|_| Error::UnknownParent {
        name: descriptor.name.clone(),
        parent: name.clone(),
    })?;
    if known.is_some_and(|known| view.tree.is_in_lineage(known, parent)) {
        return Err(Error::Cycle {
            name: descriptor.name.clone(),
            parent: name.clone(),
        });
    }
    Ok(Some(parent))
}

/// The identity is the images' where they have the checkpoint; else the description's; else new.
fn choose_identity(
    view: &View,
    descriptor: &Descriptor,
    known: Option<NodeId>,
) -> Result<Identity> {
    let Some(node) = known.map(|id| view.tree.node(id)) else {
        return match descriptor.identity {
            Some(identity) => Ok(identity),
            None => Identity::random().map_err(Error::Random),
        };
    };
    match descriptor.identity {
        Some(identity) if identity == node.identity => Ok(identity),
        Some(_) if node.in_images => Err(Error::Disagrees {
            name: descriptor.name.clone(),
            field: "identity",
        }),
        Some(identity) => Ok(identity),
        None if node.identity == identity_of_name(&node.name) => {
            Identity::random().map_err(Error::Random)
        }
        None => Ok(node.identity),
    }
}

fn validate(
    domain: &Domain,
    view: &View,
    descriptor: &Descriptor,
    identity: Identity,
    parent: Option<NodeId>,
) -> Result<()> {
    let name = &descriptor.name;
    let in_images = view
        .tree
        .find(identity)
        .filter(|id| view.tree.node(*id).in_images);
    if in_images.is_some_and(|id| view.tree.parent(id) != parent) {
        return Err(Error::Disagrees {
            name: name.clone(),
            field: "parent",
        });
    }
    for described in descriptor.disks.iter().flatten().filter(|disk| disk.bitmap) {
        // A disk that was detached since is tolerated.
        if domain.disk(&described.name).is_err() {
            continue;
        }
        let disk = view.disk(&described.name)?;
        let health = match (disk.entry(identity), disk.bitmap(name)) {
            (Some(entry), _) => {
                fold::judge(&disk.image, entry).map_err(Error::on(&described.name))?
            }
            (None, Some(info)) if disk.record.is_none() => crate::infer::health(info),
            _ => Health::Missing,
        };
        let inferred = health == Health::Inferred;
        if !health.is_usable() && !inferred {
            return Err(Error::BrokenBitmap {
                name: name.clone(),
                disk: described.name.clone(),
                health,
            });
        }
    }
    Ok(())
}
