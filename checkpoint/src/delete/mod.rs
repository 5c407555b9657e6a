//! Deleting checkpoints: bitmaps are folded, so every one that survives still answers.
//!
//! C = CHILDREN, M = METADATA_ONLY, O = CHILDREN_ONLY.
//!
//! | C M O | effect |
//! |---|---|
//! | 0 0 0 | this one: its bitmap is folded, its children move to its parent; if current, the parent becomes current |
//! | 0 0 1, 0 1 1 | refused |
//! | 0 1 0 | its descriptor; it lives on without metadata |
//! | 1 0 0 | the whole subtree; if current was inside, the parent becomes current |
//! | 1 0 1 | the descendants; if current was below, this one becomes current |
//! | 1 1 0 | the descriptors of the whole subtree |
//! | 1 1 1 | the descriptors of the descendants |
//!
//! One update an image. A deletion that stopped between two images is finished by repeating it.

mod plan;

use std::collections::HashSet;

use tidemark_qcow2::chain::{ChainRecord, Health, Identity};

pub use plan::{DeletePlan, plan};

use crate::fold::{Findings, Loss, fold_out};
use crate::settle::{record_of, settle};
use crate::tree::NodeId;
use crate::view::{DiskView, View};
use crate::{DeleteFlags, Domain, Error, Result};

/// What a deletion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Names of the checkpoints that are gone.
    pub checkpoints: Vec<String>,
    /// Names of those whose descriptor is gone.
    pub descriptors: Vec<String>,
    /// Bitmaps that were not whole.
    pub warnings: Vec<DeleteWarning>,
}

/// A bitmap that was not whole when its checkpoint was deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("disk '{disk}': the bitmap of '{checkpoint}' was {}{}", health.as_str(), match moved_to {
    Some(heir) => format!("; '{heir}' cannot serve an incremental any more"),
    None => String::new(),
})]
pub struct DeleteWarning {
    /// The disk.
    pub disk: String,
    /// The deleted checkpoint.
    pub checkpoint: String,
    /// What was wrong with its bitmap.
    pub health: Health,
    /// Who bears the loss now: its predecessor in recording order.
    pub moved_to: Option<String>,
}

impl Domain {
    /// Deletes a checkpoint by name, or what the flags say.
    ///
    /// # Errors
    /// Before anything is written: [`Error::FlagConflict`], [`Error::NoSuchCheckpoint`],
    /// [`Error::DiskReadOnly`], [`Error::RecordUnsound`], [`Error::Undecided`],
    /// [`Error::PendingBackup`]. Later, [`Error::Image`] and [`Error::Store`]: repeat it.
    pub fn delete(&self, name: &str, flags: DeleteFlags) -> Result<Deleted> {
        delete(self, flags, |view| view.named(name))
    }

    /// Deletes all but the `keep` newest checkpoints, oldest first. The current one always stays.
    ///
    /// # Errors
    /// As [`Self::delete`].
    pub fn prune(&self, keep: usize) -> Result<Deleted> {
        let _turn = self.changing()?;
        let view = View::read(self)?;
        let plan = plan::plan_prune(&view.tree, &oldest_first(&view), keep);
        carry_out(self, &view, &plan)
    }
}

/// Deletes what `find` finds.
pub(crate) fn delete(
    domain: &Domain,
    flags: DeleteFlags,
    find: impl FnOnce(&View) -> Result<NodeId>,
) -> Result<Deleted> {
    flags.check()?;
    let _turn = domain.changing()?;
    let view = View::read(domain)?;
    let plan = plan::plan(&view.tree, find(&view)?, flags)?;
    carry_out(domain, &view, &plan)
}

/// By time where it is known; among equals as the tree and the records have it.
fn oldest_first(view: &View) -> Vec<NodeId> {
    let mut ids: Vec<NodeId> = view.tree.walk(None).collect();
    ids.sort_by_key(|id| {
        let identity = view.tree.node(*id).identity;
        let recorded = view
            .disks
            .iter()
            .find_map(|disk| disk.entry(identity)?.created);
        recorded.or_else(|| view.descriptors.get(&identity)?.created)
    });
    ids
}

fn carry_out(domain: &Domain, view: &View, plan: &DeletePlan) -> Result<Deleted> {
    let changes = Changes::new(view, plan);
    let touched: Vec<&DiskView> = view
        .disks
        .iter()
        .filter(|disk| changes.touch(disk.record.as_ref()))
        .collect();
    if !touched.is_empty() {
        view.require_changeable()?;
    }
    if let Some(disk) = touched.iter().find(|disk| !disk.image.is_writable()) {
        return Err(Error::DiskReadOnly(disk.name.clone()));
    }
    let mut deleted = Deleted::default();
    if !touched.is_empty() {
        settle(view)?;
    }
    for disk in touched {
        let losses = changes
            .apply(disk)
            .and_then(|losses| crate::anchor::sweep(&disk.image).map(|()| losses))
            .map_err(Error::on(&disk.name))?;
        deleted
            .warnings
            .extend(losses.into_iter().map(|loss| DeleteWarning {
                disk: disk.name.clone(),
                checkpoint: loss.checkpoint,
                health: loss.health,
                moved_to: loss.moved_to,
            }));
    }
    let names = |ids: &[NodeId]| {
        ids.iter()
            .map(|id| view.tree.node(*id).name.clone())
            .collect()
    };
    deleted.checkpoints = names(&plan.vanish);
    deleted.descriptors = names(&plan.descriptors);
    update_descriptors(domain, view, plan)?;
    Ok(deleted)
}

fn update_descriptors(domain: &Domain, view: &View, plan: &DeletePlan) -> Result<()> {
    let Some(store) = domain.store() else {
        return Ok(());
    };
    for (child, parent) in &plan.reparent {
        let identity = view.tree.node(*child).identity;
        let Some(descriptor) = view.descriptors.get(&identity) else {
            continue;
        };
        let mut moved = descriptor.clone();
        moved.parent = parent.map(|parent| view.tree.node(parent).name.clone());
        store.write(&moved)?;
    }
    for id in &plan.descriptors {
        store.remove(&view.tree.node(*id).name)?;
    }
    Ok(())
}

/// A plan in terms of identities, as records have them.
struct Changes<'a> {
    view: &'a View,
    gone: HashSet<Identity>,
}

impl<'a> Changes<'a> {
    fn new(view: &'a View, plan: &DeletePlan) -> Self {
        let gone = plan
            .vanish
            .iter()
            .map(|id| view.tree.node(*id).identity)
            .collect();
        Self { view, gone }
    }

    /// Whether anything in the record would change.
    fn touch(&self, record: Option<&ChainRecord>) -> bool {
        let goes = |identity: &Identity| self.gone.contains(identity);
        record.is_some_and(|record| {
            record.current.as_ref().is_some_and(goes)
                || record
                    .checkpoints
                    .iter()
                    .any(|entry| goes(&entry.identity) || entry.parent.as_ref().is_some_and(goes))
        })
    }

    fn apply(&self, disk: &DiskView) -> crate::fold::Result<Vec<Loss>> {
        let Some(record) = record_of(&disk.image) else {
            return Ok(Vec::new());
        };
        let involved = self.involved(&record);
        let findings = Findings::of(&disk.image, &record, |entry| {
            involved.contains(&entry.identity)
        })?;
        disk.image.update(|update| {
            let Some(mut record) = update.record().cloned() else {
                return Ok(Vec::new());
            };
            let before = record.clone();
            let losses = fold_out(update, &mut record, &self.gone, &findings)?;
            for entry in &mut record.checkpoints {
                entry.parent = entry.parent.and_then(|parent| self.heir(&before, parent));
            }
            record.current = record
                .current
                .and_then(|current| self.heir(&before, current));
            update.set_record(Some(record));
            Ok(losses)
        })
    }

    /// What goes, and the predecessors that inherit.
    fn involved(&self, record: &ChainRecord) -> HashSet<Identity> {
        let mut involved = self.gone.clone();
        for pair in record.checkpoints.windows(2) {
            if let [before, after] = pair
                && self.gone.contains(&after.identity)
            {
                involved.insert(before.identity);
            }
        }
        involved
    }

    /// The nearest ancestor, from `id` up, that a link may name where only a description leads to
    /// it: one that the disk has itself, or one that is in no image either. Any other would make
    /// the disk a witness of a time that it may not have seen.
    fn above_description(&self, record: &ChainRecord, id: NodeId) -> Option<Identity> {
        let tree = &self.view.tree;
        let mut above = tree.lineage(id).map(|id| tree.node(id));
        above
            .find(|node| !node.in_images || record.checkpoint(node.identity).is_some())
            .map(|node| node.identity)
    }

    /// The checkpoint itself, or the nearest ancestor that stays: by the disk's own links, where it
    /// has them, for they tell what it was at hand for.
    fn heir(&self, record: &ChainRecord, identity: Identity) -> Option<Identity> {
        let tree = &self.view.tree;
        let mut at = identity;
        while self.gone.contains(&at) {
            at = match (record.checkpoint(at), tree.find(at)) {
                (Some(entry), _) => entry.parent?,
                (None, Some(id)) if tree.node(id).in_images => tree.node(tree.parent(id)?).identity,
                (None, Some(id)) => self.above_description(record, tree.parent(id)?)?,
                (None, None) => return None,
            };
        }
        Some(at)
    }
}
