//! The tree of checkpoints: who is whose parent. Pure, and without recursion: a chain of ten
//! thousand is a tree too.

use std::collections::HashMap;

use tidemark_qcow2::chain::Identity;

use crate::{Error, Problem, Result};

/// A checkpoint's place in one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) usize);

/// What the tree needs to know of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Identity, by which parents are named.
    pub identity: Identity,
    /// Name.
    pub name: String,
    /// Parent, which need not be in the tree.
    pub parent: Option<Identity>,
    /// Whether there is a descriptor outside the images.
    pub metadata: bool,
    /// Whether any image has it. One that is in no image lives and dies with its descriptor.
    pub in_images: bool,
}

/// All checkpoints of a domain at one moment.
///
/// Invariant: following parents ends. A parent that is not there and a cycle make roots, and a
/// [`Problem`] each.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: Vec<Node>,
    parents: Vec<Option<NodeId>>,
    children: Vec<Vec<NodeId>>,
    roots: Vec<NodeId>,
    by_identity: HashMap<Identity, NodeId>,
    by_name: HashMap<String, Vec<NodeId>>,
    current: Option<NodeId>,
}

impl Tree {
    /// Joins the nodes. Of two with one identity the first counts.
    pub fn new(nodes: impl IntoIterator<Item = Node>) -> (Self, Vec<Problem>) {
        let mut tree = Self::default();
        for node in nodes {
            if tree.by_identity.contains_key(&node.identity) {
                continue;
            }
            let id = NodeId(tree.nodes.len());
            tree.by_identity.insert(node.identity, id);
            tree.by_name.entry(node.name.clone()).or_default().push(id);
            tree.nodes.push(node);
        }
        let mut problems = tree.shared_names();
        problems.extend(tree.join_parents());
        problems.extend(tree.cut_cycles());
        tree.join_children();
        (tree, problems)
    }

    fn shared_names(&self) -> Vec<Problem> {
        let mut names: Vec<_> = self
            .by_name
            .iter()
            .filter(|(_, ids)| ids.len() > 1)
            .map(|(name, _)| name)
            .collect();
        names.sort();
        names
            .into_iter()
            .map(|name| Problem::NameShared { name: name.clone() })
            .collect()
    }

    fn join_parents(&mut self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for node in &self.nodes {
            let parent = node
                .parent
                .and_then(|parent| self.by_identity.get(&parent).copied());
            if node.parent.is_some() && parent.is_none() {
                problems.push(Problem::ParentUnknown {
                    checkpoint: node.name.clone(),
                });
            }
            self.parents.push(parent);
        }
        problems
    }

    /// Every member of a cycle becomes a root: which link is the wrong one cannot be known.
    fn cut_cycles(&mut self) -> Vec<Problem> {
        let mut walked_in = vec![usize::MAX; self.nodes.len()];
        let mut problems = Vec::new();
        for start in 0..self.nodes.len() {
            let mut at = Some(NodeId(start));
            while let Some(id) = at.filter(|id| walked_in[id.0] == usize::MAX) {
                walked_in[id.0] = start;
                at = self.parents[id.0];
            }
            let Some(entry) = at.filter(|id| walked_in[id.0] == start) else {
                continue;
            };
            let mut names = Vec::new();
            let mut member = entry;
            while let Some(next) = self.parents[member.0].take() {
                names.push(self.nodes[member.0].name.clone());
                member = next;
            }
            problems.push(Problem::Cycle { checkpoints: names });
        }
        problems
    }

    fn join_children(&mut self) {
        self.children = vec![Vec::new(); self.nodes.len()];
        let mut by_name: Vec<_> = (0..self.nodes.len()).map(NodeId).collect();
        by_name.sort_by(|a, b| self.nodes[a.0].name.cmp(&self.nodes[b.0].name));
        for id in by_name {
            match self.parents[id.0] {
                Some(parent) => self.children[parent.0].push(id),
                None => self.roots.push(id),
            }
        }
    }

    /// Makes a checkpoint, or none, the current one.
    pub fn set_current(&mut self, current: Option<NodeId>) {
        self.current = current;
    }

    /// The current checkpoint: the parent of the next.
    pub fn current(&self) -> Option<NodeId> {
        self.current
    }

    /// How many checkpoints there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A checkpoint.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// All checkpoints, in no order.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// The parent; `None` for a root.
    pub fn parent(&self, id: NodeId) -> Option<NodeId> {
        self.parents[id.0]
    }

    /// The direct children, by name.
    pub fn children(&self, id: NodeId) -> &[NodeId] {
        &self.children[id.0]
    }

    /// Those without parent, by name.
    pub fn roots(&self) -> &[NodeId] {
        &self.roots
    }

    /// The checkpoint of an identity.
    pub fn find(&self, identity: Identity) -> Option<NodeId> {
        self.by_identity.get(&identity).copied()
    }

    /// The checkpoint of a name.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`], or [`Error::Ambiguous`] if two moments carry it.
    pub fn named(&self, name: &str) -> Result<NodeId> {
        match self.by_name.get(name).map(Vec::as_slice) {
            Some([id]) => Ok(*id),
            None | Some([]) => Err(Error::NoSuchCheckpoint(name.to_owned())),
            Some(_) => Err(Error::Ambiguous(name.to_owned())),
        }
    }

    /// Whether any checkpoint carries the name.
    pub fn has_name(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The checkpoint, its parent, and so on to the root.
    pub fn lineage(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(id), |id| self.parents[id.0])
    }

    /// Whether `ancestor` is `id` or one of its ancestors.
    pub fn is_in_lineage(&self, ancestor: NodeId, id: NodeId) -> bool {
        self.lineage(id).any(|each| each == ancestor)
    }

    /// All generations below a checkpoint, or everything, parents before children. Lazy: stopping
    /// early costs nothing.
    pub fn walk(&self, below: Option<NodeId>) -> Walk<'_> {
        let first = below.map_or(self.roots(), |id| self.children(id));
        Walk {
            tree: self,
            open: vec![first.iter()],
        }
    }
}

/// Checkpoints in topological order; see [`Tree::walk`].
#[derive(Clone, Debug)]
pub struct Walk<'a> {
    tree: &'a Tree,
    open: Vec<std::slice::Iter<'a, NodeId>>,
}

impl Walk<'_> {
    /// Generations between the starting point and the checkpoint that came last; 1 for a direct
    /// child.
    pub fn depth(&self) -> usize {
        self.open.len().saturating_sub(1)
    }
}

impl Iterator for Walk<'_> {
    type Item = NodeId;

    fn next(&mut self) -> Option<NodeId> {
        loop {
            match self.open.last_mut()?.next() {
                Some(&id) => {
                    self.open.push(self.tree.children(id).iter());
                    return Some(id);
                }
                None => {
                    self.open.pop();
                }
            }
        }
    }
}
