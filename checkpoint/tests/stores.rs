//! The store of descriptors: what others wrote stays, several processes at once do no harm, and
//! what a dead writer left is cleared away.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::{create, domain_with, media};
use tidemark_checkpoint::{
    CreateFlags, DeleteFlags, Descriptor, DomainOptions, ListFlags, ListOptions, Store,
};

const PROCESSES: usize = 4;
const EACH: usize = 30;

fn stored(folder: &std::path::Path) -> DomainOptions {
    DomainOptions {
        store: Some(Store::new(folder)),
        ..DomainOptions::default()
    }
}

#[test]
fn elements_of_others_survive_every_rewrite() {
    let folder = tempfile::tempdir().unwrap();
    let domain = domain_with(&media(1), stored(folder.path()));
    for name in ["a", "b", "c"] {
        create(&domain, name);
    }
    let path = folder.path().join("c.xml");
    let foreign = "<owner>them</owner><z:more xmlns:z='urn:z' q='1'>text<z:deep/></z:more>";
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace(
        "</domaincheckpoint>",
        &format!("{foreign}</domaincheckpoint>"),
    );
    fs::write(&path, &text).unwrap();
    // The parent goes, so the descriptor is written anew.
    domain.delete("b", DeleteFlags::NONE).unwrap();
    let after = fs::read_to_string(&path).unwrap();
    assert!(after.contains("<name>a</name>") && !after.contains("<name>b</name>"));
    for element in [
        "<owner>them</owner>",
        "<z:more xmlns:z='urn:z' q='1'>text<z:deep/></z:more>",
    ] {
        assert!(after.contains(element), "{after}");
    }
    let xml = domain
        .lookup("c")
        .unwrap()
        .xml(tidemark_checkpoint::XmlFlags::SECURE)
        .unwrap();
    fs::remove_file(&path).unwrap();
    domain.create_xml(&xml, CreateFlags::REDEFINE).unwrap();
    assert!(fs::read_to_string(&path).unwrap().contains("urn:z"));
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn what_a_dead_writer_staged_is_cleared_away_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let domain = domain_with(&media(1), stored(folder.path()));
    create(&domain, "a");
    let day = SystemTime::now() - Duration::from_secs(86_400);
    for name in [".staged-old", ".staged-new", ".other", "note.txt"] {
        let file = File::create(folder.path().join(name)).unwrap();
        if name != ".staged-new" {
            file.set_modified(day).unwrap();
        }
    }
    assert_eq!(domain.list(ListOptions::default()).unwrap().problems, []);
    create(&domain, "b");
    let left: BTreeSet<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = [".other", ".staged-new", "a.xml", "b.xml", "note.txt"];
    assert_eq!(left, expected.map(ToOwned::to_owned).into());
}

/// What each process does: a line of its own, of which every third goes again.
fn work(folder: &std::path::Path, process: usize) {
    let domain = domain_with(&media(1), stored(folder));
    let mut parent: Option<String> = None;
    for number in 0..EACH {
        let name = format!("p{process}-{number:02}");
        let descriptor = Descriptor {
            name: name.clone(),
            created: Some(1),
            parent: parent.clone(),
            description: Some("x".repeat(5000)),
            ..Descriptor::default()
        };
        let flags = CreateFlags::REDEFINE | CreateFlags::NO_VALIDATE;
        domain.redefine(&descriptor, flags).unwrap();
        if number % 3 == 1 {
            // Its child to be has another parent then.
            domain.delete(&name, DeleteFlags::NONE).unwrap();
        } else {
            parent = Some(name);
        }
        let listing = domain.list(ListOptions::default()).unwrap();
        assert_eq!(listing.problems, [], "a reader never sees half of anything");
    }
}

/// Not a test of its own: the other process of the next one.
#[test]
fn one_of_several_processes() {
    if let Ok(order) = std::env::var("TIDEMARK_STORE_PROCESS") {
        let (process, folder) = order.split_once(' ').unwrap();
        work(std::path::Path::new(folder), process.parse().unwrap());
    }
}

#[test]
fn several_processes_change_one_store_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let children: Vec<_> = (0..PROCESSES)
        .map(|process| {
            Command::new(&program)
                .args(["--exact", "one_of_several_processes", "--nocapture"])
                .env(
                    "TIDEMARK_STORE_PROCESS",
                    format!("{process} {}", folder.path().display()),
                )
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let domain = domain_with(&media(1), stored(folder.path()));
    let all = domain.checkpoints(ListFlags::NONE).unwrap();
    assert_eq!(all.len(), PROCESSES * (EACH - EACH / 3));
    assert_eq!(
        domain.checkpoints(ListFlags::ROOTS).unwrap().len(),
        PROCESSES
    );
    println!("{} descriptors by {PROCESSES} processes", all.len());
}

/// A store that cannot be written refuses a creation before any image is touched.
#[test]
fn a_store_that_cannot_be_written_refuses_before_any_image_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("not-a-directory");
    fs::write(&file, "x").unwrap();
    let media = media(2);
    let before: Vec<_> = media.iter().map(common::Medium::to_bytes).collect();
    let domain = domain_with(&media, stored(&file));
    let error = domain
        .create(&common::spec("a"), CreateFlags::NONE)
        .unwrap_err();
    assert_eq!(
        error.code(),
        tidemark_checkpoint::ErrorCode::OperationFailed,
        "{error}"
    );
    drop(domain);
    assert_eq!(
        media
            .iter()
            .map(common::Medium::to_bytes)
            .collect::<Vec<_>>(),
        before
    );
}
