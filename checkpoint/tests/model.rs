//! Random histories of a domain against copies of its disks: whatever is created, deleted,
//! branched, crashed and reopened, what every surviving checkpoint says of "changed since" is a
//! superset of the byte difference.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;

use common::{DISK_BYTES, close, content, domain_with, on_disks};
use proptest::prelude::*;
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, DiskDelta, Domain, DomainOptions, ErrorCode, ListFlags, ListOptions,
    SinceOptions, Store, XmlFlags,
};
use tidemark_qcow2::chain::{Identity, Scheme};

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

#[derive(Clone, Debug)]
enum Step {
    Write {
        disk: usize,
        offset: u64,
        len: usize,
        value: u8,
    },
    Flush {
        disk: usize,
    },
    Create {
        disks: Vec<usize>,
    },
    Delete {
        which: prop::sample::Index,
        flags: u32,
    },
    MakeCurrent {
        which: prop::sample::Index,
    },
    Prepare {
        commit: bool,
        killed: bool,
    },
    Prune {
        keep: usize,
    },
    Convert {
        cumulative: bool,
    },
    Adopt,
    Remember {
        disk: usize,
    },
    RollBack {
        disk: usize,
    },
    Reopen {
        closed: bool,
    },
}

fn steps(disks: usize) -> impl Strategy<Value = Step> {
    let any_index = any::<prop::sample::Index>;
    prop_oneof![
        8 => (0..disks, 0..DISK_BYTES - 70_000, 1..70_000_usize, any::<u8>())
            .prop_map(|(disk, offset, len, value)| Step::Write { disk, offset, len, value }),
        2 => (0..disks).prop_map(|disk| Step::Flush { disk }),
        5 => proptest::sample::subsequence((0..disks).collect::<Vec<_>>(), 1..=disks)
            .prop_map(|disks| Step::Create { disks }),
        3 => (any_index(), 0..8_u32).prop_map(|(which, flags)| Step::Delete { which, flags }),
        1 => any_index().prop_map(|which| Step::MakeCurrent { which }),
        1 => (any::<bool>(), any::<bool>())
            .prop_map(|(commit, killed)| Step::Prepare { commit, killed }),
        1 => (0..4_usize).prop_map(|keep| Step::Prune { keep }),
        1 => any::<bool>().prop_map(|cumulative| Step::Convert { cumulative }),
        1 => Just(Step::Adopt),
        2 => (0..disks).prop_map(|disk| Step::Remember { disk }),
        2 => (0..disks).prop_map(|disk| Step::RollBack { disk }),
        3 => any::<bool>().prop_map(|closed| Step::Reopen { closed }),
    ]
}

/// Contents of all disks at the moment of each checkpoint.
type Moments = HashMap<Identity, Vec<Vec<u8>>>;

struct Run {
    media: Vec<common::Medium>,
    directory: tempfile::TempDir,
    domain: Option<Domain>,
    moments: Moments,
    created: usize,
    /// Images as they were once, for a roll back.
    remembered: HashMap<usize, common::Medium>,
    doubtful: bool,
}

impl Run {
    fn new(disks: usize) -> Self {
        let media = common::media(disks);
        let directory = tempfile::tempdir().unwrap();
        let mut run = Self {
            media,
            directory,
            domain: None,
            moments: HashMap::new(),
            created: 0,
            remembered: HashMap::new(),
            doubtful: false,
        };
        run.open();
        run
    }

    fn open(&mut self) {
        let store = Some(Store::new(self.directory.path()));
        let options = DomainOptions {
            store,
            ..DomainOptions::default()
        };
        self.domain = Some(domain_with(&self.media, options));
    }

    fn domain(&self) -> &Domain {
        self.domain.as_ref().unwrap()
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        let domain = self.domain();
        domain
            .disks()
            .iter()
            .map(|disk| content(domain, &disk.name))
            .collect()
    }

    fn next_name(&mut self) -> String {
        self.created += 1;
        format!("c{}", self.created)
    }

    fn pick(&self, which: &prop::sample::Index) -> Option<tidemark_checkpoint::Checkpoint> {
        let all = self.domain().checkpoints(ListFlags::NONE).unwrap();
        (!all.is_empty()).then(|| all[which.index(all.len())].clone())
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Write {
                disk,
                offset,
                len,
                value,
            } => {
                let image = &self.domain().disks()[*disk].image;
                image.write(&vec![*value; *len], *offset).unwrap();
            }
            Step::Flush { disk } => self.domain().disks()[*disk].image.flush().unwrap(),
            Step::Create { disks } => {
                let names: Vec<_> = disks.iter().map(|disk| DISKS[*disk]).collect();
                let spec = on_disks(&self.next_name(), &names);
                let before = self.contents();
                if let Some(checkpoint) =
                    self.settle_for(|domain| domain.create(&spec, CreateFlags::NONE))
                {
                    self.moments.insert(checkpoint.identity(), before);
                }
            }
            Step::Delete { which, flags } => {
                let flags = DeleteFlags::from_bits(*flags).unwrap();
                if let Some(checkpoint) = self.pick(which) {
                    match checkpoint.delete(flags) {
                        Ok(deleted) => assert_eq!(deleted.warnings, []),
                        Err(error) => assert_eq!(error.code(), ErrorCode::InvalidArg),
                    }
                }
            }
            Step::MakeCurrent { which } => {
                if let Some(checkpoint) = self.pick(which) {
                    let xml = checkpoint.xml(XmlFlags::SECURE).unwrap();
                    let flags = CreateFlags::REDEFINE | CreateFlags::CURRENT;
                    self.settle_for(|domain| domain.create_xml(&xml, flags));
                    self.doubtful |= self.media.len() > 1;
                }
            }
            Step::Prepare { commit, killed } => self.prepare(*commit, *killed),
            Step::Prune { keep } => drop(self.domain().prune(*keep).unwrap()),
            Step::Convert { cumulative } => {
                let scheme = if *cumulative {
                    Scheme::Cumulative
                } else {
                    Scheme::Intervals
                };
                self.domain().set_scheme(scheme).unwrap();
            }
            Step::Adopt => drop(self.domain().adopt(false).unwrap()),
            Step::Remember { disk } => {
                self.domain().disks()[*disk].image.flush().unwrap();
                self.remembered
                    .insert(*disk, self.media[*disk].copy(&common::Fuse::new()));
            }
            Step::RollBack { disk } => self.roll_back(*disk),
            Step::Reopen { closed } => {
                let domain = self.domain.take().unwrap();
                if *closed {
                    close(domain);
                } else {
                    drop(domain);
                }
                self.open();
            }
        }
    }

    fn roll_back(&mut self, disk: usize) {
        if let Some(old) = self.remembered.get(&disk) {
            self.domain = None;
            self.media[disk] = old.copy(&common::Fuse::new());
            self.doubtful = true;
            self.open();
        }
    }

    /// After a roll back, or when a branch is left that some disks took no part in, disks may
    /// contradict each other, or not know of each other: then, and only then, an operation may be
    /// refused for it.
    fn settle_for<R>(
        &self,
        operation: impl FnOnce(&Domain) -> Result<R, tidemark_checkpoint::Error>,
    ) -> Option<R> {
        match operation(self.domain()) {
            Ok(done) => Some(done),
            Err(error) => {
                assert!(self.doubtful, "{error}");
                assert_eq!(error.code(), ErrorCode::CheckpointInconsistent, "{error}");
                let all = self.domain().checkpoints(ListFlags::NONE).unwrap();
                if let Some(any) = all.first() {
                    self.domain().set_current(any.name()).unwrap();
                }
                None
            }
        }
    }

    fn prepare(&mut self, commit: bool, killed: bool) {
        let names = &DISKS[..self.media.len()];
        let spec = on_disks(&self.next_name(), names);
        let before = self.contents();
        let prepared = self.settle_for(|domain| domain.prepare(&spec, CreateFlags::NONE));
        let Some(mut tentative) = prepared else {
            return;
        };
        common::write(self.domain(), "vda", 12_345, 100, 0xaa);
        if killed {
            drop(tentative);
            self.domain = None;
            self.open();
            tentative = self.domain().tentative().unwrap().unwrap();
        }
        if commit {
            let checkpoint = tentative.commit().unwrap();
            self.moments.insert(checkpoint.identity(), before);
        } else {
            tentative.abandon().unwrap();
        }
    }

    fn examine(&self) {
        let domain = self.domain();
        let now = self.contents();
        let options = ListOptions {
            sizes: true,
            judge: true,
            ..ListOptions::default()
        };
        let listing = domain.list(options).unwrap();
        assert!(
            self.doubtful || listing.problems.is_empty(),
            "{:?}",
            listing.problems
        );
        for checkpoint in domain.checkpoints(ListFlags::NONE).unwrap() {
            let changes = match checkpoint.changed_since(SinceOptions::default()) {
                Ok(changes) => changes,
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::CheckpointInconsistent, "{error}");
                    continue;
                }
            };
            let before = &self.moments[&checkpoint.identity()];
            for ((change, before), now) in changes.iter().zip(before).zip(&now) {
                match &change.delta {
                    DiskDelta::Incremental(bits) => {
                        common::assert_superset(bits, before, now, checkpoint.name());
                    }
                    DiskDelta::Full { reason } => {
                        let excused = self.doubtful || change.base.is_none();
                        assert!(excused, "{}: {reason}", checkpoint.name());
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_surviving_checkpoint_knows_a_superset_of_what_changed(
        (disks, history) in (1..=3_usize)
            .prop_flat_map(|disks| (Just(disks), prop::collection::vec(steps(disks), 1..40))),
    ) {
        let mut run = Run::new(disks);
        for step in &history {
            run.take(step);
            run.examine();
        }
        if run.doubtful {
            return Ok(());
        }
        prop_assert_eq!(run.domain().verify().unwrap(), []);
        let rebuilt = run.domain().rebuild(false).unwrap();
        prop_assert_eq!(rebuilt.problems, []);
        let listed = run.domain().list(ListOptions::default()).unwrap();
        let in_images = listed.checkpoints.iter().map(|info| (&info.name, &info.parent, info.current));
        let mut found: Vec<_> =
            rebuilt.checkpoints.iter().map(|info| (&info.name, &info.parent, info.current)).collect();
        found.sort();
        prop_assert_eq!(found, in_images.collect::<Vec<_>>());
    }
}

#[test]
fn a_disk_that_was_rolled_back_behind_a_checkpoint_is_full_since_it() {
    let mut run = Run::new(2);
    run.take(&Step::Create { disks: vec![0, 1] });
    run.take(&Step::Remember { disk: 0 });
    run.take(&Step::Write {
        disk: 0,
        offset: 4096,
        len: 10,
        value: 36,
    });
    run.take(&Step::Create { disks: vec![0, 1] });
    run.take(&Step::RollBack { disk: 0 });
    run.examine();
    let reason = common::since(run.domain(), "c2", "vda").unwrap_err();
    assert_eq!(reason, tidemark_checkpoint::FullReason::NotWitnessed);
    assert!(common::since(run.domain(), "c2", "vdb").is_ok());
    assert!(common::since(run.domain(), "c1", "vda").is_ok());
    // Later checkpoints do not make anybody forget.
    run.take(&Step::Create { disks: vec![0, 1] });
    run.examine();
    assert!(common::since(run.domain(), "c2", "vda").is_err());
    assert!(common::since(run.domain(), "c3", "vda").is_ok());
    run.domain().delete("c3", DeleteFlags::NONE).unwrap();
    run.examine();
    assert!(common::since(run.domain(), "c2", "vda").is_err());
}

#[test]
fn a_moment_is_durable_also_on_disks_that_take_no_part() {
    let mut run = Run::new(2);
    run.take(&Step::Create { disks: vec![0, 1] });
    run.take(&Step::Write {
        disk: 1,
        offset: 0,
        len: 1,
        value: 36,
    });
    run.take(&Step::Create { disks: vec![0] });
    run.take(&Step::Reopen { closed: false });
    run.examine();
}

#[test]
fn files_behave_as_memory_does() {
    use tidemark_qcow2::{CreateOptions, FileStorage, Image, OpenOptions, Sharing};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let storage = FileStorage::create(&path).unwrap();
    let options = CreateOptions::new(DISK_BYTES);
    Image::create(Box::new(storage), &options, OpenOptions::default())
        .unwrap()
        .close()
        .unwrap();
    let open = || {
        let storage = FileStorage::open(&path, true, Sharing::Exclusive).unwrap();
        let options = OpenOptions {
            writable: true,
            ..OpenOptions::default()
        };
        let image = std::sync::Arc::new(Image::open(Box::new(storage), options).unwrap());
        let disk = tidemark_checkpoint::Disk {
            name: "vda".to_owned(),
            image,
        };
        Domain::new(vec![disk], DomainOptions::default()).unwrap()
    };
    let domain = open();
    common::create(&domain, "a");
    let before = content(&domain, "vda");
    common::write(&domain, "vda", 70_000, 3000, 1);
    common::create(&domain, "b");
    close(domain);
    let domain = open();
    domain.delete("b", DeleteFlags::NONE).unwrap();
    let bits = common::since(&domain, "a", "vda").unwrap();
    common::assert_superset(&bits, &before, &content(&domain, "vda"), "file");
    assert_eq!(domain.rebuild(false).unwrap().checkpoints.len(), 1);
}
