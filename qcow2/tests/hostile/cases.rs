//! The table of docs/hostile.md: every case has a fixture or a test of the name that stands there,
//! and every verdict is the one that the engine gives.
//!
//! `TIDEMARK_BLESS=1` writes the verdicts anew, and lists images that no case names at the end.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use tidemark_fixtures::hostile::{HostileImage, hostile_images};
use tidemark_qcow2::check::check;
use tidemark_qcow2::{Error, MemoryStorage};

use crate::probe::{guarded, read_everything, write_open};

const HEAD: &str =
    "| case | fixture or test | reading | writing | check |\n|---|---|---|---|---|\n";
const FURTHER: &str = "## Further images\n";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn refusal(error: &Error) -> &'static str {
    match error {
        Error::Corrupt { .. } => "corrupt",
        Error::Unsupported { .. } => "unsupported",
        _ => "error",
    }
}

/// What reading, writing and check answer, as the last three cells of a row.
fn verdict(image: &HostileImage) -> String {
    let seen = read_everything(&image.bytes).unwrap();
    let reading = match (&seen.opened, seen.unreadable) {
        (Ok(()), false) => "reads",
        (Ok(()), true) => "reads in part",
        (Err(error), _) => refusal(error),
    };
    let (opened, _) = write_open(&image.bytes, |_| ()).unwrap();
    let writing = opened.as_ref().map_or_else(refusal, |()| "opens");
    let storage = MemoryStorage::from_bytes(image.bytes.clone());
    let check = guarded(|| check(Box::new(storage))).unwrap();
    let check = match check.map(|report| report.exit_code()) {
        Ok(0) => "clean",
        Ok(2) => "corruptions",
        Ok(3) => "leaks",
        Ok(_) => "cannot be checked",
        Err(_) => "refused",
    };
    format!("{reading} | {writing} | {check}")
}

/// A case of the table and the names of its fixtures and tests.
struct Case {
    title: String,
    names: Vec<String>,
}

/// The cases of one table. Rows of one title, one after the other, are one case.
fn cases(rows: &[&str]) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let names = cells[1].split('`').skip(1).step_by(2).map(str::to_owned);
        match cases.last_mut() {
            Some(case) if case.title == cells[0] => case.names.extend(names),
            _ => cases.push(Case {
                title: cells[0].to_owned(),
                names: names.collect(),
            }),
        }
    }
    cases
}

/// Whether `name` is `path::function` of a test that exists.
fn is_test(name: &str) -> bool {
    let Some((path, function)) = name.split_once("::") else {
        return false;
    };
    let text = std::fs::read_to_string(root().join(path)).unwrap_or_default();
    let mut before = "";
    for line in text.lines().map(str::trim) {
        let named = line
            .strip_prefix("fn ")
            .and_then(|rest| rest.split_once('('));
        if named.is_some_and(|(found, _)| found == function) {
            return before == "#[test]";
        }
        before = line;
    }
    false
}

/// The rows of a case: names of equal verdicts share one.
fn rows(case: &Case, images: &[HostileImage], named: &mut BTreeSet<String>) -> String {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for name in &case.names {
        let fits = |image: &&HostileImage| match name.strip_suffix('*') {
            Some(start) => image.name.starts_with(start),
            None => image.name == *name,
        };
        let found: Vec<&HostileImage> = images.iter().filter(fits).collect();
        named.extend(found.iter().map(|image| image.name.clone()));
        let mut verdicts: Vec<String> = found.iter().map(|image| verdict(image)).collect();
        verdicts.dedup();
        let text = match verdicts.as_slice() {
            [] if is_test(name) => "in the test | | ".to_owned(),
            [] => panic!("{}: neither a fixture nor a test: {name:?}", case.title),
            [one] => one.clone(),
            _ => "one by one | | ".to_owned(),
        };
        match groups.iter_mut().find(|(known, _)| *known == text) {
            Some((_, names)) => names.push(name),
            None => groups.push((text, vec![name])),
        }
    }
    let mut out = String::new();
    for (verdict, names) in groups {
        let names = names.join("`, `");
        writeln!(out, "| {} | `{names}` | {verdict} |", case.title).unwrap();
    }
    out
}

/// The document with the verdicts of the engine, and how many cases it has.
fn generated(document: &str) -> (String, usize) {
    let images = hostile_images();
    let mut named = BTreeSet::new();
    let mut count = 0;
    let mut out = String::new();
    let kept = document.split(FURTHER).next().unwrap_or_default();
    let mut table: Vec<&str> = Vec::new();
    for line in kept.lines().chain([""]) {
        if line.starts_with('|') {
            table.push(line);
            continue;
        }
        if let [_, _, lines @ ..] = table.as_slice() {
            out += HEAD;
            for case in cases(lines) {
                count += 1;
                out += &rows(&case, &images, &mut named);
            }
        }
        table.clear();
        out += line;
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    write!(
        out,
        "\n\n{FURTHER}\nNo case asks for them; what must hold for all holds for them.\n\n{HEAD}"
    )
    .unwrap();
    for image in images.iter().filter(|image| !named.contains(&image.name)) {
        let category = format!("{:?}", image.category);
        writeln!(
            out,
            "| {category} | `{}` | {} |",
            image.name,
            verdict(image)
        )
        .unwrap();
    }
    (out, count)
}

#[test]
fn every_case_of_the_document_has_its_fixture_or_test_and_its_verdict() {
    let path = root().join("docs/hostile.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (generated, count) = generated(&document);
    println!("{count} cases, {} images", hostile_images().len());
    assert!(count >= 100, "the table shrank: {count} cases");
    if std::env::var_os("TIDEMARK_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
        return;
    }
    for (old, new) in document.lines().zip(generated.lines()) {
        assert_eq!(
            old, new,
            "a verdict changed: TIDEMARK_BLESS=1 writes it, if it is right"
        );
    }
    assert_eq!(document.lines().count(), generated.lines().count());
}

#[test]
fn a_case_without_a_fixture_or_test_is_noticed() {
    for name in [
        "no such image",
        "qcow2/tests/hostile/cases.rs::no_such_test",
    ] {
        let document = format!("{HEAD}| nothing | `{name}` | | | |\n");
        assert!(std::panic::catch_unwind(|| generated(&document)).is_err());
    }
    assert!(is_test(
        "qcow2/tests/hostile/cases.rs::a_case_without_a_fixture_or_test_is_noticed"
    ));
    assert!(!is_test("qcow2/tests/hostile/cases.rs::generated"));
}
