//! Joining what the disks and the descriptors say into one tree.

use std::collections::{HashMap, HashSet};

use tidemark_qcow2::chain::Identity;

use super::{CurrentState, DiskView, View};
use crate::{Descriptor, Node, Problem, Tree};

/// Steps that a half-done deletion is followed through; it moves children by one generation.
const MAX_HALF_DONE_STEPS: usize = 64;

pub(super) fn join(
    disks: Vec<DiskView>,
    descriptors: Vec<Descriptor>,
    mut problems: Vec<Problem>,
) -> View {
    let mut nodes = Nodes::default();
    for entry in disks
        .iter()
        .filter_map(|disk| disk.record.as_ref())
        .flat_map(|r| &r.checkpoints)
    {
        nodes.see(entry.identity, &entry.name, entry.parent);
    }
    let mut nodes = nodes.settle(&mut problems);
    let descriptors = describe(&mut nodes, descriptors, &mut problems);
    let (mut tree, found) = Tree::new(nodes);
    problems.extend(found);
    let current = agree_on_current(&disks, &tree, &mut problems);
    if let CurrentState::Agreed(Some(identity)) = current {
        let id = tree.find(identity);
        tree.set_current(id);
    }
    View {
        disks,
        tree,
        current,
        descriptors,
        problems,
    }
}

/// Checkpoints of the images, with all parents that disks name.
#[derive(Default)]
struct Nodes {
    order: Vec<(Identity, String)>,
    parents: HashMap<Identity, Vec<Option<Identity>>>,
}

impl Nodes {
    fn see(&mut self, identity: Identity, name: &str, parent: Option<Identity>) {
        let parents = self.parents.entry(identity).or_insert_with(|| {
            self.order.push((identity, name.to_owned()));
            Vec::new()
        });
        if !parents.contains(&parent) {
            parents.push(parent);
        }
    }

    fn name_of(&self, identity: Identity) -> String {
        let found = self.order.iter().find(|(other, _)| *other == identity);
        found.map_or_else(|| identity.to_string(), |(_, name)| name.clone())
    }

    fn settle(self, problems: &mut Vec<Problem>) -> Vec<Node> {
        let mut settled: HashMap<Identity, Option<Identity>> = self
            .parents
            .iter()
            .filter_map(|(identity, parents)| match parents.as_slice() {
                [parent] => Some((*identity, *parent)),
                _ => None,
            })
            .collect();
        for (identity, name) in &self.order {
            if settled.contains_key(identity) {
                continue;
            }
            let parents = &self.parents[identity];
            let chosen = parents
                .iter()
                .copied()
                .find(|parent| leads_to_all(*parent, parents, &settled));
            problems.push(match chosen {
                Some(parent) => Problem::ParentSkipped {
                    checkpoint: name.clone(),
                    parent: parent.map_or_else(String::new, |parent| self.name_of(parent)),
                },
                None => Problem::ParentsDiffer {
                    checkpoint: name.clone(),
                },
            });
            settled.insert(*identity, chosen.flatten());
        }
        let parent = |identity| settled.get(identity).copied().flatten();
        self.order
            .iter()
            .map(|(identity, name)| Node {
                identity: *identity,
                name: name.clone(),
                parent: parent(identity),
                metadata: false,
                in_images: true,
            })
            .collect()
    }
}

/// Whether the walk up from `parent` meets every other parent that was named: then some disks
/// merely do not know the checkpoints between.
fn leads_to_all(
    parent: Option<Identity>,
    named: &[Option<Identity>],
    settled: &HashMap<Identity, Option<Identity>>,
) -> bool {
    let Some(first) = parent else { return false };
    let mut met = HashSet::new();
    let mut at = Some(first);
    for _ in 0..MAX_HALF_DONE_STEPS {
        met.insert(at);
        let Some(next) = at.and_then(|identity| settled.get(&identity)) else {
            break;
        };
        at = *next;
    }
    named.iter().all(|other| met.contains(other))
}

/// Finds the checkpoint of each descriptor; a descriptor without one becomes a checkpoint itself.
fn describe(
    nodes: &mut Vec<Node>,
    descriptors: Vec<Descriptor>,
    problems: &mut Vec<Problem>,
) -> HashMap<Identity, Descriptor> {
    let by_identity: HashMap<Identity, usize> = nodes
        .iter()
        .enumerate()
        .map(|(index, node)| (node.identity, index))
        .collect();
    let mut by_name: HashMap<String, Identity> = nodes
        .iter()
        .map(|node| (node.name.clone(), node.identity))
        .collect();
    let mut found = HashMap::new();
    let mut alone = Vec::new();
    for descriptor in descriptors {
        let named = by_name.get(&descriptor.name).copied();
        let identity = match (descriptor.identity, named) {
            (Some(identity), _) if by_identity.contains_key(&identity) => identity,
            (Some(_), Some(_)) => {
                problems.push(Problem::DescriptorOfAnother {
                    checkpoint: descriptor.name,
                });
                continue;
            }
            (None, Some(identity)) => identity,
            (identity, None) => {
                let identity = identity.unwrap_or_else(|| identity_of_name(&descriptor.name));
                alone.push(identity);
                identity
            }
        };
        if let Some(index) = by_identity.get(&identity) {
            nodes[*index].metadata = true;
        }
        found.insert(identity, descriptor);
    }
    for identity in &alone {
        by_name.insert(found[identity].name.clone(), *identity);
    }
    for identity in alone {
        let descriptor = &found[&identity];
        let parent = descriptor.parent.as_ref();
        nodes.push(Node {
            identity,
            name: descriptor.name.clone(),
            parent: parent.map(|name| {
                by_name
                    .get(name)
                    .copied()
                    .unwrap_or_else(|| identity_of_name(name))
            }),
            metadata: true,
            in_images: false,
        });
    }
    found
}

/// The identity of a checkpoint that has nothing but a name: FNV-1a of 128 bits. It is never
/// written anywhere.
pub(crate) fn identity_of_name(name: &str) -> Identity {
    let hash = name.bytes().fold(
        0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128,
        |hash, byte| {
            (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
        },
    );
    Identity(hash.to_be_bytes())
}

/// A disk that skipped the newest checkpoints names an older one: that is no contradiction. One
/// that has the newest and names another is.
fn agree_on_current(disks: &[DiskView], tree: &Tree, problems: &mut Vec<Problem>) -> CurrentState {
    let records: Vec<_> = disks
        .iter()
        .filter_map(|disk| Some((disk, disk.record.as_ref()?)))
        .collect();
    let known: HashSet<_> = records
        .iter()
        .filter_map(|(_, record)| tree.find(record.current?))
        .collect();
    let mut unknown = HashSet::new();
    for (disk, record) in &records {
        if let Some(identity) = record
            .current
            .filter(|identity| tree.find(*identity).is_none())
        {
            problems.push(Problem::CurrentUnknown {
                disk: disk.name.clone(),
                identity,
            });
            unknown.insert(identity);
        }
    }
    let deepest = known.iter().copied().find(|id| {
        let lineage: HashSet<_> = tree.lineage(*id).collect();
        known.iter().all(|other| lineage.contains(other))
    });
    let state = match deepest {
        Some(id) => {
            let identity = tree.node(id).identity;
            let agrees = records.iter().all(|(_, record)| {
                record.current == Some(identity) || record.checkpoint(identity).is_none()
            });
            if agrees {
                CurrentState::Agreed(Some(identity))
            } else {
                CurrentState::Disputed
            }
        }
        None if !known.is_empty() || unknown.len() > 1 => CurrentState::Disputed,
        None => CurrentState::Agreed(unknown.into_iter().next()),
    };
    if state == CurrentState::Disputed {
        problems.push(Problem::CurrentDiffers);
    }
    state
}
