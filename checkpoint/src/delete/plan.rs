//! What a deletion means for the tree: pure, decided before anything is written.

use std::collections::HashSet;

use crate::tree::{NodeId, Tree};
use crate::{DeleteFlags, Result};

/// The effects of one deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeletePlan {
    /// Whose descriptor goes.
    pub descriptors: Vec<NodeId>,
    /// Who leaves the tree, and the images where they have it.
    pub vanish: Vec<NodeId>,
    /// Who gets another parent: the nearest ancestor that stays.
    pub reparent: Vec<(NodeId, Option<NodeId>)>,
    /// Who is current afterwards, if that changes.
    pub current: Option<Option<NodeId>>,
}

/// Reads the flags: C = CHILDREN, M = METADATA_ONLY, O = CHILDREN_ONLY.
///
/// | C M O | descriptors gone | bitmaps folded |
/// |---|---|---|
/// | 0 0 0 | this one's | this one's |
/// | 0 0 1, 0 1 1 | invalid | |
/// | 0 1 0 | this one's | none |
/// | 1 0 0 | the whole subtree's | the whole subtree's |
/// | 1 0 1 | the descendants' | the descendants' |
/// | 1 1 0 | the whole subtree's | none |
/// | 1 1 1 | the descendants' | none |
///
/// In every case the children of what vanished move to, and a current checkpoint that vanished
/// hands over to, the nearest ancestor that stays.
///
/// # Errors
/// [`crate::Error::FlagConflict`] for the two invalid combinations.
pub fn plan(tree: &Tree, target: NodeId, flags: DeleteFlags) -> Result<DeletePlan> {
    flags.check()?;
    let mut affected = Vec::new();
    if !flags.contains(DeleteFlags::CHILDREN_ONLY) {
        affected.push(target);
    }
    if flags.contains(DeleteFlags::CHILDREN) {
        affected.extend(tree.walk(Some(target)));
    }
    let metadata_only = flags.contains(DeleteFlags::METADATA_ONLY);
    // A checkpoint that is in no image is nothing but its descriptor.
    let vanish = affected
        .iter()
        .copied()
        .filter(|&id| !metadata_only || !tree.node(id).in_images);
    Ok(plan_for(tree, affected.clone(), vanish.collect()))
}

/// The plan for keeping only the `keep` newest, in the order given, oldest first. The current one
/// always stays.
pub(crate) fn plan_prune(tree: &Tree, oldest_first: &[NodeId], keep: usize) -> DeletePlan {
    let surplus = oldest_first.len().saturating_sub(keep);
    let gone: Vec<NodeId> = oldest_first
        .iter()
        .copied()
        .take(surplus)
        .filter(|&id| tree.current() != Some(id))
        .collect();
    plan_for(tree, gone.clone(), gone)
}

fn plan_for(tree: &Tree, descriptors: Vec<NodeId>, vanish: Vec<NodeId>) -> DeletePlan {
    let gone: HashSet<NodeId> = vanish.iter().copied().collect();
    // Topological order: a vanished parent has handed on its own heir before its children ask.
    let mut heirs = vec![None; tree.len()];
    let mut reparent = Vec::new();
    if !gone.is_empty() {
        for id in tree.walk(None) {
            let parent = tree.parent(id);
            let heir = parent.and_then(|parent| {
                if gone.contains(&parent) {
                    heirs[parent.0]
                } else {
                    Some(parent)
                }
            });
            heirs[id.0] = heir;
            if heir != parent && !gone.contains(&id) {
                reparent.push((id, heir));
            }
        }
    }
    let current = tree
        .current()
        .filter(|id| gone.contains(id))
        .map(|id| heirs[id.0]);
    DeletePlan {
        descriptors: descriptors
            .into_iter()
            .filter(|&id| tree.node(id).metadata)
            .collect(),
        vanish,
        reparent,
        current,
    }
}
