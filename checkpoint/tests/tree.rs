//! Truth tables of listing and deletion against models that are too simple to be wrong.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tidemark_checkpoint::delete::plan;
use tidemark_checkpoint::list::list;
use tidemark_checkpoint::{DeleteFlags, ListFlags, Node, NodeId, Problem, Tree};
use tidemark_qcow2::chain::Identity;

/// A checkpoint of the model: number, parent, whether it has a descriptor, whether in images.
#[derive(Clone, Debug)]
struct Model {
    parents: BTreeMap<u8, Option<u8>>,
    metadata: BTreeSet<u8>,
    in_images: BTreeSet<u8>,
    current: Option<u8>,
}

fn identity(number: u8) -> Identity {
    Identity([number; 16])
}

impl Model {
    fn tree(&self) -> Tree {
        let nodes = self.parents.iter().map(|(number, parent)| Node {
            identity: identity(*number),
            name: format!("n{number:03}"),
            parent: parent.map(identity),
            metadata: self.metadata.contains(number),
            in_images: self.in_images.contains(number),
        });
        let (mut tree, problems) = Tree::new(nodes);
        assert!(problems.is_empty());
        let current = self
            .current
            .and_then(|current| tree.find(identity(current)));
        tree.set_current(current);
        tree
    }

    fn children(&self, of: u8) -> BTreeSet<u8> {
        self.parents
            .iter()
            .filter(|(_, parent)| **parent == Some(of))
            .map(|(n, _)| *n)
            .collect()
    }

    fn descendants(&self, of: u8) -> BTreeSet<u8> {
        let children = self.children(of);
        let below = children.iter().flat_map(|child| self.descendants(*child));
        below.chain(children.iter().copied()).collect()
    }

    fn remove(&mut self, number: u8) {
        let parent = self.parents.remove(&number).unwrap();
        for other in self
            .parents
            .values_mut()
            .filter(|other| **other == Some(number))
        {
            *other = parent;
        }
        if self.current == Some(number) {
            self.current = parent;
        }
        self.metadata.remove(&number);
        self.in_images.remove(&number);
    }

    /// The contract's table, word for word.
    fn delete(&mut self, number: u8, c: bool, m: bool, o: bool) -> Result<(), ()> {
        let subtree: BTreeSet<u8> = self
            .descendants(number)
            .into_iter()
            .chain([number])
            .collect();
        let targets = match (c, o) {
            (false, false) => BTreeSet::from([number]),
            (false, true) => return Err(()),
            (true, false) => subtree,
            (true, true) => self.descendants(number),
        };
        for target in targets {
            if m && self.in_images.contains(&target) {
                self.metadata.remove(&target);
            } else {
                self.remove(target);
            }
        }
        Ok(())
    }
}

fn models() -> impl Strategy<Value = Model> {
    proptest::collection::vec(
        (any::<prop::sample::Index>(), any::<bool>(), 0..4_u8),
        1..24,
    )
    .prop_flat_map(|seeds| {
        let count = seeds.len();
        (Just(seeds), proptest::option::of(0..count))
    })
    .prop_map(|(seeds, current)| {
        let mut model = Model {
            parents: BTreeMap::new(),
            metadata: BTreeSet::new(),
            in_images: BTreeSet::new(),
            current: current.map(|current| u8::try_from(current).unwrap()),
        };
        for (number, (parent, metadata, roots)) in (0_u8..).zip(&seeds) {
            let is_root = number == 0 || *roots == 0;
            let parent =
                (!is_root).then(|| u8::try_from(parent.index(usize::from(number))).unwrap());
            model.parents.insert(number, parent);
            if *metadata {
                model.metadata.insert(number);
            }
            // Where there is no descriptor there must be an image that has it.
            if !*metadata || *roots < 3 {
                model.in_images.insert(number);
            }
        }
        model
    })
}

/// Carries out a plan on the model's data.
fn apply(model: &Model, tree: &Tree, target: u8, flags: DeleteFlags) -> Result<Model, ()> {
    let number = |id: NodeId| tree.node(id).identity.0[0];
    let plan = plan(tree, tree.find(identity(target)).unwrap(), flags).map_err(|_| ())?;
    let mut after = model.clone();
    for id in &plan.vanish {
        after.parents.remove(&number(*id));
        after.in_images.remove(&number(*id));
        after.metadata.remove(&number(*id));
    }
    for id in &plan.descriptors {
        after.metadata.remove(&number(*id));
    }
    for (child, parent) in &plan.reparent {
        after.parents.insert(number(*child), parent.map(number));
    }
    if let Some(current) = plan.current {
        after.current = current.map(number);
    }
    Ok(after)
}

proptest! {
    #[test]
    fn all_eight_deletions_have_the_effects_of_the_table(
        model in models(),
        target in any::<prop::sample::Index>(),
    ) {
        let target = u8::try_from(target.index(model.parents.len())).unwrap();
        let tree = model.tree();
        for bits in 0..8_u32 {
            let mut expected = model.clone();
            let outcome =
                expected.delete(target, bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
            let found = apply(&model, &tree, target, DeleteFlags::from_bits(bits).unwrap());
            match found {
                Ok(found) => {
                    prop_assert!(outcome.is_ok(), "{bits:03b}");
                    prop_assert_eq!(&found.parents, &expected.parents, "{:03b}", bits);
                    prop_assert_eq!(&found.metadata, &expected.metadata, "{:03b}", bits);
                    prop_assert_eq!(found.current, expected.current, "{:03b}", bits);
                }
                Err(()) => prop_assert!(outcome.is_err(), "{bits:03b}"),
            }
        }
    }

    #[test]
    fn every_combination_of_list_flags_names_what_brute_force_names(
        model in models(),
        from in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let from = from.map(|from| u8::try_from(from.index(model.parents.len())).unwrap());
        let tree = model.tree();
        for bits in 0..64_u32 {
            let flags = ListFlags::from_bits(bits).unwrap();
            let ids = list(&tree, from.map(|from| tree.find(identity(from)).unwrap()), flags);
            let found: Vec<u8> = ids.iter().map(|id| tree.node(*id).identity.0[0]).collect();
            let start: BTreeSet<u8> = match (from, bits & 1 != 0) {
                (None, false) => model.parents.keys().copied().collect(),
                (None, true) => {
                    model.parents.iter().filter(|(_, p)| p.is_none()).map(|(n, _)| *n).collect()
                }
                (Some(from), false) => model.children(from),
                (Some(from), true) => model.descendants(from),
            };
            let expected: BTreeSet<u8> = start
                .into_iter()
                .filter(|number| {
                    let leaf = model.children(*number).is_empty();
                    let metadata = model.metadata.contains(number);
                    let one = |yes: u32, no: u32, value: bool| {
                        match (bits & yes != 0, bits & no != 0) {
                            (true, false) => value,
                            (false, true) => !value,
                            _ => true,
                        }
                    };
                    one(1 << 1, 1 << 2, leaf) && one(1 << 3, 1 << 4, metadata)
                })
                .collect();
            prop_assert_eq!(&found.iter().copied().collect::<BTreeSet<_>>(), &expected);
            prop_assert_eq!(found.len(), expected.len(), "nothing is named twice");
            if bits & (1 << 5) != 0 {
                for (at, number) in found.iter().enumerate() {
                    let parent = model.parents[number];
                    let parent_at = found.iter().position(|other| Some(*other) == parent);
                    prop_assert!(parent_at.is_none_or(|parent_at| parent_at < at));
                }
            } else {
                prop_assert!(found.is_sorted(), "by name");
            }
        }
    }
}

fn node(number: u16, parent: Option<u16>) -> Node {
    let identity = |number: u16| {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        Identity(bytes)
    };
    Node {
        identity: identity(number),
        name: format!("n{number:05}"),
        parent: parent.map(identity),
        metadata: true,
        in_images: true,
    }
}

#[test]
fn a_chain_of_ten_thousand_is_listed_and_deleted_without_recursion() {
    const DEEP: u16 = 10_000;
    let nodes = (0..DEEP).map(|number| node(number, number.checked_sub(1)));
    let (mut tree, problems) = Tree::new(nodes.rev());
    assert!(problems.is_empty());
    let root = tree.named("n00000").unwrap();
    let leaf = tree.named("n09999").unwrap();
    tree.set_current(Some(leaf));
    assert_eq!(tree.roots(), [root]);
    assert_eq!(
        list(&tree, None, ListFlags::TOPOLOGICAL).len(),
        usize::from(DEEP)
    );
    assert_eq!(
        list(&tree, Some(root), ListFlags::DESCENDANTS).len(),
        usize::from(DEEP - 1)
    );
    assert_eq!(list(&tree, None, ListFlags::LEAVES), [leaf]);
    assert_eq!(
        tree.walk(Some(root)).take(3).count(),
        3,
        "a lazy walk stops early"
    );
    assert!(tree.is_in_lineage(root, leaf));
    let all = plan(&tree, root, DeleteFlags::CHILDREN).unwrap();
    assert_eq!(all.vanish.len(), usize::from(DEEP));
    assert_eq!(all.current, Some(None));
    let middle = tree.named("n05000").unwrap();
    let one = plan(&tree, middle, DeleteFlags::NONE).unwrap();
    assert_eq!((one.vanish.len(), one.reparent.len()), (1, 1));
}

#[test]
fn members_of_a_cycle_become_roots_and_are_named() {
    let nodes = [
        node(1, Some(3)),
        node(2, Some(1)),
        node(3, Some(2)),
        node(4, Some(3)),
    ];
    let (tree, problems) = Tree::new(nodes);
    assert!(matches!(&problems[..], [Problem::Cycle { checkpoints }] if checkpoints.len() == 3));
    assert_eq!(tree.roots().len(), 3);
    assert_eq!(tree.walk(None).count(), 4, "all are still there, once");
}

#[test]
fn a_checkpoint_whose_parent_is_not_there_is_a_detached_root() {
    let (tree, problems) = Tree::new([node(1, Some(9)), node(2, Some(1))]);
    assert!(matches!(&problems[..], [Problem::ParentUnknown { .. }]));
    assert_eq!(tree.roots().len(), 1);
}
