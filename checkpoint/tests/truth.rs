//! The truth tables on real images: trees of any shape, with and without descriptors, on disks
//! that take part or not. Every deletion is carried out on a copy and compared with a model; every
//! survivor must still answer, byte for byte.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Fuse, Medium, content, domain_with, names, on_disks, since, write};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Domain, DomainOptions, ErrorCode, ListFlags, ListOptions, Store,
};
use tidemark_fixtures::random::Random;

const DISKS: [&str; 2] = ["vda", "vdb"];

/// What the contract knows of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    parent: Option<String>,
    metadata: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    entries: BTreeMap<String, Entry>,
    current: Option<String>,
}

impl Model {
    fn children(&self, of: &str) -> Vec<String> {
        let is_child = |entry: &Entry| entry.parent.as_deref() == Some(of);
        let children = self.entries.iter().filter(|(_, entry)| is_child(entry));
        children.map(|(name, _)| name.clone()).collect()
    }

    fn descendants(&self, of: &str) -> BTreeSet<String> {
        let children = self.children(of);
        let below = children.iter().flat_map(|child| self.descendants(child));
        below.chain(children.clone()).collect()
    }

    fn remove(&mut self, name: &str) {
        let gone = self.entries.remove(name).unwrap();
        for entry in self.entries.values_mut() {
            if entry.parent.as_deref() == Some(name) {
                entry.parent.clone_from(&gone.parent);
            }
        }
        if self.current.as_deref() == Some(name) {
            self.current = gone.parent;
        }
    }

    /// The table of the contract; C, M, O as bits 0, 1, 2.
    fn delete(&mut self, name: &str, bits: u32) -> Result<(), ErrorCode> {
        let mut targets = match (bits & 1 != 0, bits & 4 != 0) {
            (false, true) => return Err(ErrorCode::InvalidArg),
            (false, false) => BTreeSet::new(),
            (true, _) => self.descendants(name),
        };
        if bits & 4 == 0 {
            targets.insert(name.to_owned());
        }
        for target in targets {
            match bits & 2 != 0 {
                true => self.entries.get_mut(&target).unwrap().metadata = false,
                false => self.remove(&target),
            }
        }
        Ok(())
    }

    fn lineage(&self) -> BTreeSet<String> {
        let parent = |name: &String| self.entries[name].parent.clone();
        std::iter::successors(self.current.clone(), parent).collect()
    }
}

/// A domain with the model that it must agree with, and what each disk held at each checkpoint.
struct World {
    media: Vec<Medium>,
    folder: tempfile::TempDir,
    model: Model,
    moments: BTreeMap<String, Vec<Vec<u8>>>,
}

fn open(media: &[Medium], folder: &Path) -> Domain {
    let options = DomainOptions {
        store: Some(Store::new(folder)),
        ..DomainOptions::default()
    };
    domain_with(media, options)
}

fn contents(domain: &Domain) -> Vec<Vec<u8>> {
    DISKS.iter().map(|disk| content(domain, disk)).collect()
}

fn scribble(domain: &Domain, random: &mut Random) {
    for disk in DISKS {
        for _ in 0..random.within(0..3) {
            let offset = random.within(0..common::DISK_BYTES - 9000);
            write(
                domain,
                disk,
                offset,
                9000,
                u8::try_from(random.within(1..255)).unwrap(),
            );
        }
    }
}

impl World {
    /// A random tree. Sometimes the newest is left for a branch, sometimes a disk takes no part,
    /// sometimes there is no descriptor. (The first is on all disks, so that all have a base.)
    fn grow(random: &mut Random) -> Self {
        let fuse = Fuse::new();
        let mut world = Self {
            media: (0..2).map(|_| Medium::new(&fuse)).collect(),
            folder: tempfile::tempdir().unwrap(),
            model: Model::default(),
            moments: BTreeMap::new(),
        };
        let domain = open(&world.media, world.folder.path());
        for number in 0..random.within(1..8) {
            let name = format!("n{number}");
            let disks = match random.within(0..4) {
                0 if number > 0 => &DISKS[..1],
                1 if number > 0 => &DISKS[1..],
                _ => &DISKS[..],
            };
            let metadata = !random.one_in(3);
            let flags = if metadata {
                CreateFlags::NONE
            } else {
                CreateFlags::NO_METADATA
            };
            world.moments.insert(name.clone(), contents(&domain));
            domain.create(&on_disks(&name, disks), flags).unwrap();
            let parent = world.model.current.replace(name.clone());
            world.model.entries.insert(name, Entry { parent, metadata });
            scribble(&domain, random);
            if random.one_in(3) {
                world.leave_for_a_branch(&domain, random);
            }
        }
        world
    }

    /// A branch begins at a checkpoint that is on all disks; one that is not may be unknown to a
    /// disk by then.
    fn leave_for_a_branch(&mut self, domain: &Domain, random: &mut Random) {
        let everywhere: Vec<String> = domain
            .list(ListOptions::default())
            .unwrap()
            .checkpoints
            .into_iter()
            .filter(|info| info.disks.len() == 2)
            .map(|info| info.name)
            .collect();
        let chosen = usize::try_from(random.next_u64() % 1000).unwrap() % everywhere.len();
        domain.set_current(&everywhere[chosen]).unwrap();
        self.model.current = Some(everywhere[chosen].clone());
    }

    /// Deletes on a copy of everything and compares; how many answers were compared.
    fn delete_on_a_copy(&self, target: &str, bits: u32, random: &mut Random) -> usize {
        let what = format!("{target} with {bits:03b} of {:?}", self.model);
        let fuse = Fuse::new();
        let media: Vec<Medium> = self.media.iter().map(|medium| medium.copy(&fuse)).collect();
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let domain = open(&media, folder.path());
        let mut model = self.model.clone();
        let expected = model.delete(target, bits);
        let found = domain.delete(target, DeleteFlags::from_bits(bits).unwrap());
        match (expected, found) {
            (Ok(()), Ok(deleted)) => assert_eq!(deleted.warnings, [], "{what}"),
            (Err(code), Err(error)) => assert_eq!(error.code(), code, "{what}"),
            (expected, found) => panic!("{what}: {expected:?} {found:?}"),
        }
        agrees(&domain, &model, &what);
        scribble(&domain, random);
        let mut compared = self.answers(&domain, &model, &what);
        drop(domain);
        let domain = open(&media, folder.path());
        agrees(&domain, &model, &format!("{what}, opened again"));
        compared += self.answers(&domain, &model, &what);
        compared
    }

    /// Law 2 for every ancestor of the current one.
    fn answers(&self, domain: &Domain, model: &Model, what: &str) -> usize {
        let now = contents(domain);
        let lineage = model.lineage();
        let mut compared = 0;
        for name in model.entries.keys() {
            let changes = domain.changed_since(name, Default::default());
            if !lineage.contains(name) {
                assert_eq!(
                    changes.unwrap_err().code(),
                    ErrorCode::CheckpointInconsistent
                );
                continue;
            }
            for ((disk, before), now) in DISKS.iter().zip(&self.moments[name]).zip(&now) {
                match since(domain, name, disk) {
                    Ok(bits) => {
                        common::assert_superset(
                            &bits,
                            before,
                            now,
                            &format!("{what}, since {name}"),
                        );
                        compared += 1;
                    }
                    // Nothing older is left on a disk that took no part.
                    Err(reason) => assert!(
                        !self.has(domain, name, disk),
                        "{what}: {name} {disk}: {reason}"
                    ),
                }
            }
        }
        compared
    }

    fn has(&self, domain: &Domain, name: &str, disk: &str) -> bool {
        let image = &domain.disk(disk).unwrap().image;
        image
            .bitmaps()
            .unwrap()
            .iter()
            .any(|info| info.name == name)
    }
}

/// Tree, current, descriptors, bitmaps and all filters.
fn agrees(domain: &Domain, model: &Model, what: &str) {
    let listing = domain.list(ListOptions::default()).unwrap();
    let found: BTreeMap<String, Entry> = listing
        .checkpoints
        .iter()
        .map(|info| {
            let (parent, metadata) = (info.parent.clone(), info.metadata);
            (info.name.clone(), Entry { parent, metadata })
        })
        .collect();
    assert_eq!(found, model.entries, "{what}");
    let current = domain
        .current()
        .unwrap()
        .map(|current| current.name().to_owned());
    assert_eq!(current, model.current, "{what}");
    for disk in DISKS {
        let bitmaps = domain.disk(disk).unwrap().image.bitmaps().unwrap();
        let known = |name: &String| model.entries.contains_key(name);
        assert!(
            bitmaps.iter().all(|info| known(&info.name)),
            "{what}: a bitmap of nobody"
        );
    }
    let leaf = |name: &str| model.children(name).is_empty();
    type Passes<'a> = &'a dyn Fn(&str, &Entry) -> bool;
    let filters: [(ListFlags, Passes<'_>); 5] = [
        (ListFlags::ROOTS, &|_, entry| entry.parent.is_none()),
        (ListFlags::LEAVES, &|name, _| leaf(name)),
        (ListFlags::NO_LEAVES, &|name, _| !leaf(name)),
        (ListFlags::METADATA, &|_, entry| entry.metadata),
        (ListFlags::NO_METADATA, &|_, entry| !entry.metadata),
    ];
    for (flags, passes) in filters {
        let expected: Vec<&str> = model
            .entries
            .iter()
            .filter(|(name, entry)| passes(name, entry))
            .map(|(name, _)| name.as_str())
            .collect();
        let found = domain.checkpoints(flags).unwrap();
        assert_eq!(names(&found), expected, "{what}");
    }
    assert_eq!(domain.verify().unwrap(), [], "{what}");
}

#[test]
fn all_deletions_of_all_checkpoints_of_random_trees_do_what_the_table_says() {
    let (mut trees, mut deletions, mut compared) = (0, 0, 0);
    for seed in 0..common::cases(4) {
        let mut random = Random::new(seed);
        let world = World::grow(&mut random);
        let domain = open(&world.media, world.folder.path());
        agrees(&domain, &world.model, "as grown");
        compared += world.answers(&domain, &world.model, "as grown");
        drop(domain);
        for target in world.model.entries.keys() {
            for bits in 0..8 {
                compared += world.delete_on_a_copy(target, bits, &mut random);
                deletions += 1;
            }
        }
        trees += 1;
    }
    println!("{trees} trees, {deletions} deletions, {compared} answers compared by their bytes");
    assert!(deletions >= 100 && compared >= 400);
}
