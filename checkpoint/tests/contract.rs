//! The interface of the proposal, row by row: every operation, every flag, every refusal with the
//! class that libvirt's vocabulary has for it; and the same while guests write.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tidemark_fixtures::random::Random;

use common::{Medium, create, domain, domain_with, media, names, on_disks, spec};
use tidemark_checkpoint::{
    Checkpoint, CreateFlags, CreateSpec, DeleteFlags, DiskDelta, Domain, DomainOptions, ErrorCode,
    ListFlags, ListOptions, SinceOptions, Store, XmlFlags,
};

/// A chain `a`, `b` with descriptors, and a foreign bitmap `theirs`; opened as `read_only` says.
struct World {
    media: Vec<Medium>,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            media: media(2),
            folder: tempfile::tempdir().unwrap(),
        };
        let domain = world.open(false);
        create(&domain, "a");
        create(&domain, "b");
        let image = &domain.disk("vda").unwrap().image;
        image
            .update(|update| {
                let bits = update.blank(tidemark_bitmap::Granularity::DEFAULT)?;
                update.put("theirs", bits, false)
            })
            .unwrap();
        common::close(domain);
        world
    }

    fn open(&self, read_only: bool) -> Domain {
        let options = DomainOptions {
            store: Some(Store::new(self.folder.path())),
            definition: Some("<domain><graphics type='vnc' passwd='x'/></domain>".to_owned()),
            read_only,
        };
        domain_with(&self.media, options)
    }

    /// Everything that a refusal must leave alone.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let mut files: Vec<_> = std::fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let descriptors = files.iter().map(|file| std::fs::read(file).unwrap());
        let images = self.media.iter().map(Medium::to_bytes);
        descriptors.chain(images).collect()
    }
}

type Call = fn(&Domain) -> Result<String, tidemark_checkpoint::Error>;

fn joined(checkpoints: Vec<Checkpoint>) -> String {
    names(&checkpoints).join(" ")
}

/// Reading operations: what they answer on a writable and on a read-only handle.
const READS: [(&str, Call, &str); 18] = [
    (
        "LookupByName",
        |d| Ok(d.lookup("a")?.name().to_owned()),
        "a",
    ),
    (
        "ListCheckpoints(0)",
        |d| Ok(joined(d.checkpoints(ListFlags::NONE)?)),
        "a b",
    ),
    (
        "ListCheckpoints(ROOTS)",
        |d| Ok(joined(d.checkpoints(ListFlags::ROOTS)?)),
        "a",
    ),
    (
        "ListCheckpoints(LEAVES)",
        |d| Ok(joined(d.checkpoints(ListFlags::LEAVES)?)),
        "b",
    ),
    (
        "ListCheckpoints(NO_LEAVES)",
        |d| Ok(joined(d.checkpoints(ListFlags::NO_LEAVES)?)),
        "a",
    ),
    (
        "ListCheckpoints(METADATA)",
        |d| Ok(joined(d.checkpoints(ListFlags::METADATA)?)),
        "a b",
    ),
    (
        "ListCheckpoints(NO_METADATA)",
        |d| Ok(joined(d.checkpoints(ListFlags::NO_METADATA)?)),
        "",
    ),
    (
        "a count is the length",
        |d| Ok(d.checkpoints(ListFlags::NONE)?.len().to_string()),
        "2",
    ),
    (
        "ListChildren(0)",
        |d| Ok(joined(d.lookup("a")?.children(ListFlags::NONE)?)),
        "b",
    ),
    (
        "ListChildren(DESCENDANTS | TOPOLOGICAL)",
        |d| {
            Ok(joined(d.lookup("a")?.children(
                ListFlags::DESCENDANTS | ListFlags::TOPOLOGICAL,
            )?))
        },
        "b",
    ),
    (
        "GetParent",
        |d| {
            Ok(d.lookup("b")?
                .parent()?
                .map_or_else(String::new, |p| p.name().to_owned()))
        },
        "a",
    ),
    (
        "GetParent of a root",
        |d| Ok(d.lookup("a")?.parent()?.is_none().to_string()),
        "true",
    ),
    (
        "GetDomain",
        |d| Ok(d.lookup("a")?.domain().disks().len().to_string()),
        "2",
    ),
    ("HasCurrent", |d| Ok(d.has_current()?.to_string()), "true"),
    (
        "Current",
        |d| {
            Ok(d.current()?
                .map_or_else(String::new, |c| c.name().to_owned()))
        },
        "b",
    ),
    (
        "IsCurrent",
        |d| {
            Ok(format!(
                "{} {}",
                d.lookup("a")?.is_current()?,
                d.lookup("b")?.is_current()?
            ))
        },
        "false true",
    ),
    (
        "HasMetadata",
        |d| Ok(d.lookup("a")?.has_metadata()?.to_string()),
        "true",
    ),
    (
        "GetXMLDesc(0) keeps secrets",
        |d| {
            Ok(d.lookup("a")?
                .xml(XmlFlags::NONE)?
                .contains("passwd")
                .to_string())
        },
        "false",
    ),
];

#[test]
fn reading_operations_answer_alike_on_every_handle_and_write_nothing() {
    let world = World::new();
    let before = world.bytes();
    for read_only in [false, true] {
        for (what, call, expected) in READS {
            let domain = world.open(read_only);
            assert_eq!(call(&domain).unwrap(), expected, "{what}");
        }
    }
    assert_eq!(world.bytes(), before);
    println!("{} calls", READS.len() * 2);
}

fn created(domain: &Domain, spec: &CreateSpec) -> Result<String, tidemark_checkpoint::Error> {
    Ok(domain.create(spec, CreateFlags::NONE)?.name().to_owned())
}

fn from_xml(
    domain: &Domain,
    inner: &str,
    flags: CreateFlags,
) -> Result<String, tidemark_checkpoint::Error> {
    let xml = format!("<domaincheckpoint>{inner}</domaincheckpoint>");
    Ok(domain.create_xml(&xml, flags)?.name().to_owned())
}

const REDEFINE: CreateFlags = CreateFlags::REDEFINE;

/// Refusals, each with its class.
const REFUSALS: [(&str, ErrorCode, Call); 33] = [
    ("no such name", ErrorCode::NoDomainCheckpoint, |d| {
        Ok(d.lookup("x")?.name().into())
    }),
    ("children of nobody", ErrorCode::NoDomainCheckpoint, |d| {
        d.list_from("x", ListOptions::default())
            .map(|_| String::new())
    }),
    ("delete nobody", ErrorCode::NoDomainCheckpoint, |d| {
        d.delete("x", DeleteFlags::NONE).map(|_| String::new())
    }),
    ("since nobody", ErrorCode::NoDomainCheckpoint, |d| {
        d.changed_since("x", SinceOptions::default())
            .map(|_| String::new())
    }),
    ("make nobody current", ErrorCode::NoDomainCheckpoint, |d| {
        d.set_current("x").map(|()| String::new())
    }),
    ("a name twice", ErrorCode::OperationFailed, |d| {
        created(d, &spec("a"))
    }),
    ("a foreign bitmap's name", ErrorCode::OperationFailed, |d| {
        created(d, &spec("theirs"))
    }),
    ("a path as a name", ErrorCode::XmlError, |d| {
        created(d, &spec("../a"))
    }),
    ("a hidden name", ErrorCode::XmlError, |d| {
        created(d, &spec(".a"))
    }),
    ("an unknown disk", ErrorCode::ConfigUnsupported, |d| {
        created(d, &on_disks("c", &["vdz"]))
    }),
    ("a disk twice", ErrorCode::ConfigUnsupported, |d| {
        created(d, &on_disks("c", &["vda", "vda"]))
    }),
    ("no disk", ErrorCode::ConfigUnsupported, |d| {
        created(d, &on_disks("c", &[]))
    }),
    ("every disk left out", ErrorCode::ConfigUnsupported, |d| {
        from_xml(
            d,
            "<name>c</name><disks><disk name='vda' checkpoint='no'/></disks>",
            CreateFlags::NONE,
        )
    }),
    ("text that is not XML", ErrorCode::XmlError, |d| {
        d.create_xml("<domaincheckpoint", CreateFlags::NONE)
            .map(|c| c.name().into())
    }),
    ("another kind of XML", ErrorCode::XmlError, |d| {
        d.create_xml("<domainsnapshot/>", CreateFlags::NONE)
            .map(|c| c.name().into())
    }),
    ("a bitmap of another name", ErrorCode::XmlError, |d| {
        from_xml(
            d,
            "<name>c</name><disks><disk name='vda' bitmap='d'/></disks>",
            CreateFlags::NONE,
        )
    }),
    ("CURRENT alone", ErrorCode::InvalidArg, |d| {
        from_xml(d, "<name>c</name>", CreateFlags::CURRENT)
    }),
    ("NO_VALIDATE alone", ErrorCode::InvalidArg, |d| {
        from_xml(d, "<name>c</name>", CreateFlags::NO_VALIDATE)
    }),
    ("NO_METADATA with REDEFINE", ErrorCode::InvalidArg, |d| {
        from_xml(
            d,
            "<name>a</name><creationTime>1</creationTime>",
            REDEFINE | CreateFlags::NO_METADATA,
        )
    }),
    (
        "REDEFINE without a description",
        ErrorCode::InvalidArg,
        |d| d.create(&spec("c"), REDEFINE).map(|c| c.name().into()),
    ),
    (
        "REDEFINE of what a backup prepares",
        ErrorCode::InvalidArg,
        |d| d.prepare(&spec("c"), REDEFINE).map(|c| c.name().into()),
    ),
    ("REDEFINE without a name", ErrorCode::XmlError, |d| {
        from_xml(d, "<creationTime>1</creationTime>", REDEFINE)
    }),
    ("REDEFINE without a time", ErrorCode::XmlError, |d| {
        from_xml(d, "<name>a</name>", REDEFINE)
    }),
    ("its own parent", ErrorCode::InvalidArg, |d| {
        redefined(d, "c", "c")
    }),
    ("a parent that is not there", ErrorCode::InvalidArg, |d| {
        redefined(d, "c", "x")
    }),
    ("a cycle", ErrorCode::InvalidArg, |d| redefined(d, "a", "b")),
    (
        "a parent the images deny",
        ErrorCode::CheckpointInconsistent,
        |d| from_xml(d, "<name>b</name><creationTime>1</creationTime>", REDEFINE),
    ),
    (
        "a bitmap that is not there",
        ErrorCode::CheckpointInconsistent,
        |d| {
            let disks = "<disks><disk name='vda'/></disks>";
            from_xml(
                d,
                &format!("<name>c</name><creationTime>1</creationTime>{disks}"),
                REDEFINE,
            )
        },
    ),
    ("INACTIVE", ErrorCode::InvalidArg, |d| {
        d.lookup("a")?.xml(XmlFlags::INACTIVE)
    }),
    ("UPDATE_CPU", ErrorCode::InvalidArg, |d| {
        d.lookup("a")?.xml(XmlFlags::UPDATE_CPU)
    }),
    ("CHILDREN_ONLY alone", ErrorCode::InvalidArg, |d| {
        d.delete("a", DeleteFlags::CHILDREN_ONLY)
            .map(|_| String::new())
    }),
    (
        "CHILDREN_ONLY with METADATA_ONLY",
        ErrorCode::InvalidArg,
        |d| {
            d.delete("a", DeleteFlags::CHILDREN_ONLY | DeleteFlags::METADATA_ONLY)
                .map(|_| String::new())
        },
    ),
    (
        "a disk that is not there",
        ErrorCode::ConfigUnsupported,
        |d| d.disk("vdz").map(|disk| disk.name.clone()),
    ),
];

fn redefined(
    domain: &Domain,
    name: &str,
    parent: &str,
) -> Result<String, tidemark_checkpoint::Error> {
    let parent = format!("<parent><name>{parent}</name></parent>");
    from_xml(
        domain,
        &format!("<name>{name}</name><creationTime>1</creationTime>{parent}"),
        REDEFINE,
    )
}

#[test]
fn every_refusal_has_its_class_and_changes_nothing() {
    let world = World::new();
    let before = world.bytes();
    for (what, code, call) in REFUSALS {
        let domain = world.open(false);
        let error = call(&domain).expect_err(what);
        assert_eq!(error.code(), code, "{what}: {error}");
        assert!(!code.as_str().is_empty());
        drop(domain);
        assert!(world.bytes() == before, "{what} left a trace");
    }
    println!("{} refusals", REFUSALS.len());
}

/// What a read-only handle refuses, whatever the images would let happen.
const DENIED: [(&str, Call); 13] = [
    ("create", |d| created(d, &spec("c"))),
    ("prepare", |d| {
        d.prepare(&spec("c"), CreateFlags::NONE)
            .map(|c| c.name().into())
    }),
    ("redefine", |d| {
        from_xml(d, "<name>a</name><creationTime>1</creationTime>", REDEFINE)
    }),
    ("delete", |d| {
        d.delete("a", DeleteFlags::NONE).map(|_| String::new())
    }),
    ("delete metadata", |d| {
        d.delete("a", DeleteFlags::METADATA_ONLY)
            .map(|_| String::new())
    }),
    ("delete by handle", |d| {
        d.lookup("a")?
            .delete(DeleteFlags::NONE)
            .map(|_| String::new())
    }),
    ("prune", |d| d.prune(1).map(|_| String::new())),
    ("set current", |d| {
        d.set_current("a").map(|()| String::new())
    }),
    ("adopt", |d| d.adopt(true).map(|_| String::new())),
    ("recover", |d| d.recover().map(|_| String::new())),
    ("undo", |d| d.undo_undecided().map(|()| String::new())),
    ("convert", |d| {
        d.set_scheme(tidemark_qcow2::chain::Scheme::Cumulative)
            .map(|()| String::new())
    }),
    ("SECURE", |d| d.lookup("a")?.xml(XmlFlags::SECURE)),
];

#[test]
fn a_read_only_handle_denies_every_change_and_every_secret() {
    let world = World::new();
    let before = world.bytes();
    let domain = world.open(true);
    for (what, call) in DENIED {
        let error = call(&domain).expect_err(what);
        assert_eq!(error.code(), ErrorCode::OperationDenied, "{what}: {error}");
    }
    drop(domain);
    assert!(world.bytes() == before);
    println!("{} denials", DENIED.len());
}

#[test]
fn every_single_bit_without_a_meaning_is_refused_by_every_flag_type() {
    let (mut known, mut refused) = (0, 0);
    for bit in (0..32).map(|shift| 1_u32 << shift) {
        let outcomes = [
            ListFlags::from_bits(bit).map(ListFlags::bits),
            CreateFlags::from_bits(bit).map(CreateFlags::bits),
            DeleteFlags::from_bits(bit).map(DeleteFlags::bits),
            XmlFlags::from_bits(bit).map(XmlFlags::bits),
        ];
        for outcome in outcomes {
            match outcome {
                Ok(bits) => {
                    assert_eq!(bits, bit);
                    known += 1;
                }
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::InvalidArg);
                    refused += 1;
                }
            }
        }
    }
    println!("{known} flags with a meaning, {refused} refused");
    assert_eq!(known + refused, 128);
    assert_eq!(known, 6 + 4 + 3 + 6);
}

#[test]
fn an_image_of_version_2_is_refused_as_a_format_that_cannot_take_part() {
    let options = tidemark_qcow2::CreateOptions {
        version: 2,
        ..tidemark_qcow2::CreateOptions::new(1 << 20)
    };
    let storage = Box::new(tidemark_qcow2::MemoryStorage::new());
    let image = tidemark_qcow2::Image::create(storage, &options, Default::default()).unwrap();
    let disk = tidemark_checkpoint::Disk {
        name: "vda".to_owned(),
        image: std::sync::Arc::new(image),
    };
    let domain = Domain::new(vec![disk], DomainOptions::default()).unwrap();
    let error = domain.create(&spec("a"), CreateFlags::NONE).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConfigUnsupported, "{error}");
}

/// Somebody changes the chain; every listing is a chain all the same, never half of a change.
#[test]
fn one_listing_is_one_moment_while_others_change_the_chain() {
    let media = media(2);
    let domain = domain(&media);
    create(&domain, "0");
    let done = AtomicBool::new(false);
    let listings = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    let listing = domain.list(ListOptions::default()).unwrap();
                    let all = &listing.checkpoints;
                    assert_eq!(listing.problems, []);
                    let current: Vec<_> = all.iter().filter(|info| info.current).collect();
                    assert_eq!(current.len(), 1, "exactly one is current");
                    let roots = all.iter().filter(|info| info.parent.is_none()).count();
                    assert_eq!(roots, 1);
                    for info in all {
                        assert_eq!(info.disks.len(), 2, "{} is on all disks", info.name);
                        let parent = info.parent.as_ref();
                        assert!(parent.is_none_or(|p| all.iter().any(|other| other.name == *p)));
                    }
                    listings.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for number in 1..40 {
            create(&domain, &number.to_string());
            if number % 3 == 0 {
                let target = (number - 2).to_string();
                domain.delete(&target, DeleteFlags::NONE).unwrap();
            }
        }
        while listings.load(Ordering::Relaxed) < 20 {
            thread::yield_now();
        }
        done.store(true, Ordering::Release);
    });
    println!("{} listings", listings.into_inner());
}

type Write = (&'static str, u64, u64);

/// A guest that writes until `done`: what, in which epoch it was issued, and where.
fn guest(
    domain: &Domain,
    disk: &'static str,
    seed: u64,
    epoch: &AtomicU64,
    done: &AtomicBool,
) -> Vec<Write> {
    let image = &domain.disk(disk).unwrap().image;
    let (mut written, mut random) = (Vec::new(), Random::new(seed));
    while !done.load(Ordering::Acquire) {
        let offset = random.within(0..common::DISK_BYTES - 600);
        written.push((disk, epoch.load(Ordering::SeqCst), offset));
        image.write(&[0x5a; 600], offset).unwrap();
        thread::sleep(Duration::from_micros(50));
    }
    written
}

/// Images that this process has open for a guest: what was written after a checkpoint was there is
/// in every answer since it, whatever else happened to the chain meanwhile.
#[test]
fn the_chain_changes_under_writing_guests_and_no_write_is_missed() {
    let media = media(2);
    let domain = domain(&media);
    create(&domain, "0");
    let (epoch, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let writes: Vec<Write> = thread::scope(|scope| {
        let guests: Vec<_> = [("vda", 1_u64), ("vda", 3), ("vdb", 7)]
            .into_iter()
            .map(|(disk, seed)| {
                let (domain, epoch, done) = (&domain, &epoch, &done);
                scope.spawn(move || guest(domain, disk, seed, epoch, done))
            })
            .collect();
        for number in 1..30_u64 {
            create(&domain, &number.to_string());
            epoch.store(number, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(2));
            match number % 4 {
                0 => drop(
                    domain
                        .delete(&(number - 2).to_string(), DeleteFlags::NONE)
                        .unwrap(),
                ),
                1 => drop(domain.lookup("0").unwrap().xml(XmlFlags::SIZE).unwrap()),
                _ => {}
            }
        }
        done.store(true, Ordering::Release);
        guests
            .into_iter()
            .flat_map(|guest| guest.join().unwrap())
            .collect()
    });
    let mut compared = 0;
    for checkpoint in domain.checkpoints(ListFlags::NONE).unwrap() {
        let number: u64 = checkpoint.name().parse().unwrap();
        for change in checkpoint.changed_since(SinceOptions::default()).unwrap() {
            let DiskDelta::Incremental(bits) = &change.delta else {
                panic!("{}", change.disk)
            };
            for (_, _, offset) in writes
                .iter()
                .filter(|(disk, at, _)| *disk == change.disk && *at >= number)
            {
                let seen = bits.test(*offset) && bits.test(offset + 599);
                assert!(seen, "a write at {offset} is missing since {number}");
                compared += 1;
            }
        }
    }
    println!("{} writes, {compared} looked up", writes.len());
    assert!(compared > 1000);
    assert_eq!(domain.verify().unwrap(), []);
}
