//! The chain from the images alone, with the evidence for every part of it.
//!
//! Strongest first: the record with an unchanged directory; the record with a changed one, each
//! name judged alone; without a record, inclusion of contents among recording bitmaps; without a
//! record and with disabled bitmaps, names. The last two are inferred and labelled so.

use std::collections::{BTreeMap, HashMap, HashSet};

use tidemark_qcow2::chain::{Health, Scheme};

use crate::delta::DiskDelta;
use crate::describe::{Evidence, describe};
use crate::infer::{self, Inferred};
use crate::view::{DiskView, View};
use crate::{
    CheckpointInfo, DiskState, Domain, Error, Kind, ListOptions, NodeId, Problem, Result, snapshots,
};

/// What the images tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The checkpoints, parents before children.
    pub checkpoints: Vec<CheckpointInfo>,
    /// What contradicts, is missing, or belongs to nobody.
    pub problems: Vec<Problem>,
}

impl Domain {
    /// Rebuilds the chain without a look at descriptors. Writes nothing.
    ///
    /// With `trust_inferred`, changed bytes are told also for disabled bitmaps without a record.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn rebuild(&self, trust_inferred: bool) -> Result<Rebuilt> {
        let _turn = self.reading();
        rebuild(&View::of_images(self)?, trust_inferred)
    }
}

/// Rebuilds from a view of the images alone.
pub(crate) fn rebuild(view: &View, trust_inferred: bool) -> Result<Rebuilt> {
    let ids: Vec<NodeId> = view.tree.walk(None).collect();
    let options = ListOptions {
        judge: true,
        sizes: true,
        ..ListOptions::default()
    };
    let mut checkpoints = describe(view, &ids, options)?;
    let mut problems = view.problems.clone();
    let mut inferences = Vec::new();
    for disk in view.disks.iter().filter(|disk| disk.record.is_none()) {
        let inferred =
            infer::infer(&disk.name, &disk.image, &disk.bitmaps).map_err(Error::on(&disk.name))?;
        inferences.extend(inferred.map(|inferred| (disk, inferred)));
    }
    let kinship = Kinship::of(inferences.iter().map(|(_, inferred)| inferred));
    for (disk, inferred) in &inferences {
        add(&mut checkpoints, disk, inferred, &kinship, trust_inferred)?;
        problems.extend(inferred.problems.iter().cloned());
    }
    if kinship.contradictory {
        problems.push(Problem::OrdersDiffer);
    }
    infer_current(view, &mut checkpoints, !inferences.is_empty());
    problems.extend(findings(view, &checkpoints));
    for disk in &view.disks {
        snapshots::add(&mut checkpoints, &mut problems, disk)?;
    }
    Ok(Rebuilt {
        checkpoints,
        problems,
    })
}

/// Who follows whom among inferred checkpoints, as far as no disk objects.
#[derive(Debug, Default)]
pub(crate) struct Kinship {
    position: HashMap<String, usize>,
    parents: HashMap<String, String>,
    /// Whether two disks have two names in opposite order.
    contradictory: bool,
}

impl Kinship {
    pub(crate) fn of<'a>(inferences: impl Iterator<Item = &'a Inferred>) -> Self {
        // Where nothing tells an order, every name stands alone.
        let orders: Vec<Vec<&str>> = inferences
            .flat_map(|inferred| {
                let names: Vec<&str> = inferred
                    .order
                    .iter()
                    .map(|info| info.name.as_str())
                    .collect();
                match inferred.ordered {
                    true => vec![names],
                    false => names.into_iter().map(|name| vec![name]).collect(),
                }
            })
            .collect();
        let Some(merged) = merge(&orders) else {
            return Self {
                contradictory: true,
                ..Self::default()
            };
        };
        let position: HashMap<String, usize> = merged
            .iter()
            .enumerate()
            .map(|(at, name)| ((*name).to_owned(), at))
            .collect();
        let mut parents: HashMap<String, String> = HashMap::new();
        for pair in orders.iter().flat_map(|order| order.windows(2)) {
            let [parent, child] = pair else { continue };
            let known = parents
                .entry((*child).to_owned())
                .or_insert_with(|| (*parent).to_owned());
            if position[*parent] > position[known.as_str()] {
                (*parent).clone_into(known);
            }
        }
        Self {
            position,
            parents,
            contradictory: false,
        }
    }

    /// The parent of an inferred checkpoint, if anything tells it.
    pub(crate) fn parent(&self, name: &str) -> Option<&String> {
        self.parents.get(name)
    }

    /// Its place in the order of age.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.position.get(name).copied()
    }
}

/// Joins several orders into one that contradicts none; `None` if they contradict each other.
fn merge<'a>(orders: &[Vec<&'a str>]) -> Option<Vec<&'a str>> {
    let mut waits_for: BTreeMap<&str, usize> = BTreeMap::new();
    let mut followers: HashMap<&str, Vec<&'a str>> = HashMap::new();
    let mut names: BTreeMap<&'a str, ()> = BTreeMap::new();
    for order in orders {
        for name in order {
            names.insert(name, ());
            waits_for.entry(name).or_default();
        }
        for pair in order.windows(2) {
            let [before, after] = pair else { continue };
            followers.entry(before).or_default().push(after);
            *waits_for.entry(after).or_default() += 1;
        }
    }
    let mut ready: Vec<&'a str> = names
        .keys()
        .copied()
        .filter(|name| waits_for[name] == 0)
        .rev()
        .collect();
    let mut merged = Vec::new();
    while let Some(name) = ready.pop() {
        merged.push(name);
        for follower in followers.get(name).into_iter().flatten() {
            let waits = waits_for.entry(follower).or_default();
            *waits = waits.saturating_sub(1);
            if *waits == 0 {
                ready.push(follower);
            }
        }
    }
    (merged.len() == names.len()).then_some(merged)
}

/// Adds what one disk's bitmaps suggest to the checkpoints known so far.
fn add(
    checkpoints: &mut Vec<CheckpointInfo>,
    disk: &DiskView,
    inferred: &Inferred,
    kinship: &Kinship,
    trust_inferred: bool,
) -> Result<()> {
    let places: HashMap<String, usize> = checkpoints
        .iter()
        .enumerate()
        .map(|(place, known)| (known.name.clone(), place))
        .collect();
    let mut of_all: Option<Option<u64>> = None;
    for info in &inferred.order {
        let health = infer::health(info);
        let safe = inferred.evidence == Evidence::Inclusion || trust_inferred;
        let dirty_bytes = match (safe && health == Health::Inferred, of_all) {
            (false, _) => None,
            (true, Some(known)) => known,
            (true, None) => {
                let found = infer::changed_since(disk, &info.name, trust_inferred)
                    .map_err(Error::on(&disk.name))?;
                let bytes = match found {
                    DiskDelta::Incremental(bits) => Some(bits.dirty_bytes()),
                    DiskDelta::Full { .. } => None,
                };
                // Of intervals only the union of all is right, whoever is asked for.
                of_all = (inferred.scheme == Scheme::Intervals).then_some(bytes);
                bytes
            }
        };
        let state = DiskState {
            disk: disk.name.clone(),
            health,
            inferred: true,
            evidence: inferred.evidence,
            recording: info.auto,
            dirty_bytes,
        };
        let known = places.get(&info.name).copied();
        match known.and_then(|place| checkpoints.get_mut(place)) {
            Some(known) => known.disks.push(state),
            None => checkpoints.push(CheckpointInfo {
                name: info.name.clone(),
                kind: Kind::Bitmap,
                identity: None,
                parent: kinship.parent(&info.name).cloned(),
                current: false,
                metadata: false,
                created: None,
                description: None,
                disks: vec![state],
            }),
        }
    }
    checkpoints.sort_by_key(|info| match info.identity {
        Some(_) => None,
        None => Some(kinship.position(&info.name).unwrap_or(usize::MAX)),
    });
    for known in checkpoints {
        known.disks.sort_by(|a, b| a.disk.cmp(&b.disk));
    }
    Ok(())
}

/// Without any record the only leaf is current.
fn infer_current(view: &View, checkpoints: &mut [CheckpointInfo], any_inferred: bool) {
    if !any_inferred || view.disks.iter().any(|disk| disk.record.is_some()) {
        return;
    }
    let parents: Vec<Option<String>> = checkpoints.iter().map(|info| info.parent.clone()).collect();
    let is_parent = |name: &str| parents.iter().flatten().any(|parent| parent == name);
    let mut leaves: Vec<_> = checkpoints
        .iter_mut()
        .filter(|info| !is_parent(&info.name))
        .collect();
    if let [leaf] = leaves.as_mut_slice() {
        leaf.current = true;
    }
}

/// Bitmaps that do not serve, and bitmaps of nobody.
pub(crate) fn findings(view: &View, checkpoints: &[CheckpointInfo]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for info in checkpoints {
        for state in info.disks.iter().filter(|state| !state.health.is_usable()) {
            problems.push(Problem::BadBitmap {
                disk: state.disk.clone(),
                checkpoint: info.name.clone(),
                health: state.health,
            });
        }
    }
    for disk in view.disks.iter().filter(|disk| disk.record.is_some()) {
        let tentative = disk.pending.as_ref().map(|pending| pending.name.as_str());
        let known: HashSet<&str> = disk
            .record
            .iter()
            .flat_map(|record| &record.checkpoints)
            .map(|entry| entry.name.as_str())
            .collect();
        let foreign = disk.bitmaps.iter().filter(|info| {
            !known.contains(info.name.as_str()) && tentative != Some(info.name.as_str())
        });
        problems.extend(foreign.map(|info| Problem::Foreign {
            disk: disk.name.clone(),
            bitmap: info.name.clone(),
        }));
    }
    problems
}
