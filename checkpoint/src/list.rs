//! Which checkpoints a listing names: the flags, truly.

use crate::tree::{NodeId, Tree};
use crate::{ListFlags, Node};

/// The checkpoints of a domain (`from` is `None`) or the children of one, filtered and ordered.
///
/// | call | names |
/// |---|---|
/// | domain, no flag | all |
/// | domain, ROOTS | those without parent |
/// | children, no flag | the direct children |
/// | children, DESCENDANTS | all generations below |
pub fn list(tree: &Tree, from: Option<NodeId>, flags: ListFlags) -> Vec<NodeId> {
    let toggled = flags.contains(ListFlags::ROOTS);
    let mut ids: Vec<NodeId> = match from {
        None if toggled => tree.roots().to_vec(),
        Some(id) if !toggled => tree.children(id).to_vec(),
        _ => tree.walk(from).collect(),
    };
    ids.retain(|&id| passes(tree.node(id), tree.children(id).is_empty(), flags));
    if !flags.contains(ListFlags::TOPOLOGICAL) {
        ids.sort_by(|&a, &b| tree.node(a).name.cmp(&tree.node(b).name));
    }
    ids
}

fn passes(node: &Node, is_leaf: bool, flags: ListFlags) -> bool {
    let group = |yes, no, value: bool| {
        let (yes, no) = (flags.contains(yes), flags.contains(no));
        yes == no || yes == value
    };
    group(ListFlags::LEAVES, ListFlags::NO_LEAVES, is_leaf)
        && group(ListFlags::METADATA, ListFlags::NO_METADATA, node.metadata)
}
