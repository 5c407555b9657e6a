//! The same scripts here and on libvirt's test driver, where both mean the same; where they do not,
//! the difference is shown to be what the documentation says.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;

use common::{create, domain_with, media, names, spec};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Domain, DomainOptions, Error, ErrorCode, ListFlags, ListOptions,
    Store, XmlFlags,
};
use tidemark_fixtures::oracle::virsh;
use tidemark_fixtures::random::Random;

/// What a command must answer.
#[derive(Debug)]
enum Expected {
    Done,
    Refused(ErrorCode),
    /// Names in their order.
    Names(Vec<String>),
    /// Names in any order that has parents first.
    Topological(Vec<String>),
    /// Each name with its parent.
    Parents(BTreeSet<(String, Option<String>)>),
}

/// A script that grows while our side carries it out.
struct Script {
    domain: Domain,
    folder: tempfile::TempDir,
    lines: Vec<String>,
    expected: Vec<Expected>,
    files: usize,
}

impl Script {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = DomainOptions {
            store: Some(Store::new(folder.path().join("store"))),
            ..DomainOptions::default()
        };
        Self {
            domain: domain_with(&media(1), options),
            folder,
            lines: Vec::new(),
            expected: Vec::new(),
            files: 0,
        }
    }

    fn say(&mut self, line: String, expected: Expected) {
        self.lines.push(line);
        self.expected.push(expected);
    }

    fn outcome<T>(&mut self, line: String, outcome: Result<T, Error>) {
        let expected = match outcome {
            Ok(_) => Expected::Done,
            Err(error) => Expected::Refused(error.code()),
        };
        self.say(line, expected);
    }

    fn create(&mut self, name: &str) {
        let outcome = self.domain.create(&spec(name), CreateFlags::NONE);
        self.outcome(format!("checkpoint-create-as test {name}"), outcome);
    }

    /// libvirt makes a redefined checkpoint current when its parent is, or when nobody is.
    fn redefine(&mut self, name: &str, parent: Option<&str>) {
        let current = self.domain.current().unwrap();
        let becomes = current.is_none_or(|current| parent == Some(current.name()));
        let parent = parent.map_or_else(String::new, |parent| {
            format!("<parent><name>{parent}</name></parent>")
        });
        let xml = format!(
            "<domaincheckpoint><name>{name}</name>{parent}<creationTime>1525889631</creationTime>\
             <disks><disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>"
        );
        let mut flags = CreateFlags::REDEFINE | CreateFlags::NO_VALIDATE;
        if becomes {
            flags |= CreateFlags::CURRENT;
        }
        let outcome = self.domain.create_xml(&xml, flags);
        self.files += 1;
        let path = self.folder.path().join(format!("{}.xml", self.files));
        std::fs::write(&path, xml).unwrap();
        let path = path.display();
        self.outcome(
            format!("checkpoint-create test --xmlfile {path} --redefine"),
            outcome,
        );
    }

    /// `bits` as libvirt reads them.
    fn delete(&mut self, name: &str, bits: u32) {
        // virsh looks the name up first.
        let outcome = self
            .domain
            .lookup(name)
            .and_then(|checkpoint| checkpoint.delete(DeleteFlags::from_libvirt(bits)?));
        let options = match bits {
            0 => "",
            1 => " --children",
            4 => " --children-only",
            _ => " --children --children-only",
        };
        self.outcome(format!("checkpoint-delete test {name}{options}"), outcome);
    }

    fn look(&mut self, from: Option<&str>) {
        const ROOTS: ListFlags = ListFlags::ROOTS;
        let filters = [
            (ListFlags::NONE, ""),
            (ListFlags::LEAVES, " --leaves"),
            (ListFlags::NO_LEAVES, " --no-leaves"),
            (
                ROOTS,
                if from.is_some() {
                    " --descendants"
                } else {
                    " --roots"
                },
            ),
            (
                ROOTS | ListFlags::LEAVES,
                if from.is_some() {
                    " --descendants --leaves"
                } else {
                    " --roots --leaves"
                },
            ),
            (
                ROOTS | ListFlags::NO_LEAVES,
                if from.is_some() {
                    " --descendants --no-leaves"
                } else {
                    " --roots --no-leaves"
                },
            ),
        ];
        for (flags, words) in filters {
            let listed = match from {
                None => self.domain.checkpoints(flags).unwrap(),
                Some(from) => self.domain.lookup(from).unwrap().children(flags).unwrap(),
            };
            let listed: Vec<String> = names(&listed).into_iter().map(ToOwned::to_owned).collect();
            let start = from.map_or_else(String::new, |from| format!(" --from {from}"));
            let line = format!("checkpoint-list test --name{start}{words}");
            self.say(line.clone(), Expected::Names(listed.clone()));
            self.say(
                format!("{line} --topological"),
                Expected::Topological(listed),
            );
        }
        let listing = self.domain.list(ListOptions::default()).unwrap();
        let parents = listing
            .checkpoints
            .into_iter()
            .map(|info| (info.name, info.parent));
        self.say(
            "checkpoint-list test --parent".to_owned(),
            Expected::Parents(parents.collect()),
        );
    }

    /// Runs the script on libvirt and compares every answer; how many there were.
    fn compare(self) -> usize {
        let session = virsh::session(&self.lines);
        let mut errors = session.errors.into_iter();
        let mut parents = BTreeSet::new();
        for ((line, expected), answer) in self.lines.iter().zip(&self.expected).zip(session.answers)
        {
            let listed: Vec<String> = answer.lines().map(ToOwned::to_owned).collect();
            match expected {
                Expected::Done => assert!(!answer.is_empty(), "{line}: {:?}", errors.next()),
                Expected::Refused(code) => {
                    assert_eq!(answer, "", "{line}");
                    let error = errors.next().unwrap();
                    assert_eq!(class(&error), *code, "{line}: {error}");
                }
                Expected::Names(ours) => assert_eq!(&listed, ours, "{line}"),
                Expected::Topological(ours) => {
                    let sets = [listed.iter(), ours.iter()].map(BTreeSet::from_iter);
                    assert_eq!(sets[0], sets[1], "{line}");
                }
                Expected::Parents(ours) => {
                    parents = answer.lines().skip(2).map(row).collect();
                    assert_eq!(&parents, ours, "{line}");
                }
            }
        }
        drop(parents);
        assert_eq!(errors.next(), None);
        self.lines.len()
    }
}

/// Name, date, time, zone, and the parent if there is one.
fn row(line: &str) -> (String, Option<String>) {
    let mut words = line.split_whitespace().map(ToOwned::to_owned);
    (words.next().unwrap(), words.nth(3))
}

/// The class that an error of virsh begins with.
fn class(error: &str) -> ErrorCode {
    let known = [
        ("invalid argument", ErrorCode::InvalidArg),
        ("Flags ", ErrorCode::InvalidArg),
        ("operation failed", ErrorCode::OperationFailed),
        ("unsupported configuration", ErrorCode::ConfigUnsupported),
        ("Domain checkpoint not found", ErrorCode::NoDomainCheckpoint),
        ("XML document failed to validate", ErrorCode::XmlError),
    ];
    let found = known.iter().find(|(start, _)| error.starts_with(start));
    found
        .unwrap_or_else(|| panic!("an unknown class: {error}"))
        .1
}

/// One of the names, or one that nobody has.
fn pick(script: &Script, random: &mut Random) -> String {
    let all = script.domain.checkpoints(ListFlags::NONE).unwrap();
    let at = usize::try_from(random.within(0..12)).unwrap();
    all.get(at % (all.len() + 1))
        .map_or_else(|| "nobody".to_owned(), |c| c.name().to_owned())
}

#[test]
fn random_scripts_have_the_same_effects_on_libvirts_test_driver() {
    if !virsh::available() {
        return;
    }
    let (mut commands, mut scripts) = (0, 0);
    for seed in 0..common::cases(8) {
        let mut random = Random::new(seed);
        let mut script = Script::new();
        for number in 0..18 {
            match random.within(0..8) {
                0..=2 => script.create(&format!("c{number}")),
                3 => {
                    let taken = pick(&script, &mut random);
                    if taken != "nobody" {
                        script.create(&taken);
                    }
                }
                4 | 5 => {
                    let parent = pick(&script, &mut random);
                    script.redefine(
                        &format!("r{number}"),
                        Some(&parent)
                            .filter(|_| random.within(0..5) > 0)
                            .map(String::as_str),
                    );
                }
                _ => {
                    let target = pick(&script, &mut random);
                    let bits = [0, 1, 4, 5][usize::try_from(random.within(0..4)).unwrap()];
                    script.delete(&target, bits);
                }
            }
            let from = pick(&script, &mut random);
            script.look(None);
            if from != "nobody" {
                script.look(Some(&from));
            }
        }
        commands += script.compare();
        scripts += 1;
    }
    println!("{scripts} scripts of {commands} commands");
    assert!(commands > 2000);
}

/// libvirt's own test of virsh, with the facts that it states.
#[test]
fn libvirts_own_script_holds_here_and_there() {
    if !virsh::available() {
        return;
    }
    let mut script = Script::new();
    for name in ["c1", "c1", "c3", "c2"] {
        script.create(name);
    }
    script.look(None);
    script.look(Some("c1"));
    script.look(Some("c3"));
    let all = script.domain.checkpoints(ListFlags::TOPOLOGICAL).unwrap();
    assert_eq!(names(&all), ["c1", "c3", "c2"]);
    script.delete("c1", 0);
    script.look(None);
    assert_eq!(
        names(&script.domain.checkpoints(ListFlags::ROOTS).unwrap()),
        ["c3"]
    );
    script.delete("c3", 4);
    script.look(None);
    assert_eq!(
        names(&script.domain.checkpoints(ListFlags::LEAVES).unwrap()),
        ["c3"]
    );
    script.delete("c3", 1);
    script.look(None);
    assert!(
        script
            .domain
            .checkpoints(ListFlags::NONE)
            .unwrap()
            .is_empty()
    );
    script.redefine("c2", Some("c3"));
    script.redefine("c3", None);
    script.redefine("c2", Some("c3"));
    script.look(None);
    assert_eq!(script.domain.current().unwrap().unwrap().name(), "c2");
    println!("{} commands", script.compare());
}

/// Each refusal that both have, with the same class.
#[test]
fn refusals_have_the_classes_that_libvirt_gives_them() {
    if !virsh::available() {
        return;
    }
    let mut script = Script::new();
    for name in ["a", "b", "a", "x/y", ".x", "-", "_", "9"] {
        script.create(name);
    }
    script.redefine("c", Some("c"));
    script.redefine("c", Some("nobody"));
    script.redefine("a", Some("b"));
    script.redefine("../c", None);
    for bits in [0, 1, 4, 5] {
        script.delete("nobody", bits & 1);
        script.delete("b", bits | 5);
    }
    let disks = |list: &str| {
        format!("<domaincheckpoint><name>d</name><disks>{list}</disks></domaincheckpoint>")
    };
    let one = "<disk name='vda'/>";
    for xml in [
        disks("<disk name='vdz'/>"),
        disks(&one.repeat(2)),
        disks(""),
        disks("<disk name='vda' checkpoint='maybe'/>"),
        disks("<disk/>"),
        disks("<disk name='vda' checkpoint='no' bitmap='d'/>"),
        "<domaincheckpoint><name>d</name><name>e</name></domaincheckpoint>".to_owned(),
        "<domaincheckpoint><name>d</name><creationTime>soon</creationTime></domaincheckpoint>"
            .to_owned(),
    ] {
        let path = script.folder.path().join(format!("d{}.xml", script.files));
        script.files += 1;
        std::fs::write(&path, &xml).unwrap();
        let outcome = script.domain.create_xml(&xml, CreateFlags::NONE);
        assert!(outcome.is_err(), "{xml}");
        script.outcome(
            format!("checkpoint-create test --xmlfile {}", path.display()),
            outcome,
        );
    }
    println!("{} commands", script.compare());
}

/// What docs/checkpoints.md lists under "Where libvirt differs", seen on both sides.
#[test]
fn every_difference_from_libvirt_is_one_that_is_documented() {
    if !virsh::available() {
        return;
    }
    let options = DomainOptions::default();
    let domain = domain_with(&media(1), options);
    create(&domain, "a");
    create(&domain, "b");
    // CHILDREN_ONLY alone is refused here; there it stands alone.
    let alone = domain.delete("a", DeleteFlags::CHILDREN_ONLY).unwrap_err();
    assert_eq!(alone.code(), ErrorCode::InvalidArg);
    // A group with both bits does not filter here; there it lists nothing.
    let both = domain
        .checkpoints(ListFlags::LEAVES | ListFlags::NO_LEAVES)
        .unwrap();
    assert_eq!(names(&both), ["a", "b"]);
    // METADATA_ONLY leaves the checkpoint in the tree.
    domain.delete("b", DeleteFlags::METADATA_ONLY).unwrap();
    assert!(domain.lookup("b").is_ok());
    // Nothing to record on is refused here.
    let none = "<domaincheckpoint><name>n</name><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>";
    assert!(domain.create_xml(none, CreateFlags::NONE).is_err());
    let lines = [
        "checkpoint-create-as test a",
        "checkpoint-create-as test b",
        "checkpoint-list test --name --leaves --no-leaves",
        "checkpoint-create-as test n --diskspec vda,checkpoint=no",
        "checkpoint-delete test n",
        "checkpoint-delete test b --metadata",
        "checkpoint-list test --name",
        "checkpoint-create-as test b",
        "checkpoint-delete test a --children-only",
        "checkpoint-list test --name",
    ];
    let session = virsh::session(&lines.map(ToOwned::to_owned));
    assert_eq!(session.errors, Vec::<String>::new());
    assert_eq!(session.answers[2], "");
    assert_ne!(session.answers[3], "");
    assert_eq!(session.answers[6], "a", "b vanished with its metadata");
    assert_eq!(session.answers[9], "a", "the children are gone, it stayed");
    println!("5 differences");
}

/// What we export is accepted by libvirt, parents first, and comes back the same.
#[test]
fn an_exported_chain_is_redefined_in_libvirt() {
    if !virsh::available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let domain = domain_with(&media(1), DomainOptions::default());
    for name in ["z", "m", "a", "k"] {
        create(&domain, name);
    }
    domain.set_current("m").unwrap();
    create(&domain, "side");
    let mut lines = Vec::new();
    let mut ours = BTreeSet::new();
    for checkpoint in domain.checkpoints(ListFlags::TOPOLOGICAL).unwrap() {
        let xml = checkpoint.xml(XmlFlags::LIBVIRT | XmlFlags::SIZE).unwrap();
        let path = folder.path().join(checkpoint.name());
        std::fs::write(&path, xml).unwrap();
        lines.push(format!(
            "checkpoint-create test --xmlfile {} --redefine",
            path.display()
        ));
        let parent = checkpoint
            .parent()
            .unwrap()
            .map(|parent| parent.name().to_owned());
        ours.insert((checkpoint.name().to_owned(), parent));
    }
    lines.push("checkpoint-list test --parent".to_owned());
    let session = virsh::session(&lines);
    assert_eq!(session.errors, Vec::<String>::new());
    let theirs: BTreeSet<_> = session
        .answers
        .last()
        .unwrap()
        .lines()
        .skip(2)
        .map(row)
        .collect();
    assert_eq!(theirs, ours);
    println!("{} checkpoints", ours.len());
}
