//! What must hold for the repository as a whole: licences, the minimum Rust version, and that
//! everything public is documented and tried.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Licences that may be combined with MIT OR Apache-2.0 without further duties.
const ACCEPTED: [&str; 12] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "NCSA",
];

#[test]
fn every_dependency_has_a_licence_that_fits_ours() {
    let packages = packages();
    for package in &packages {
        let licence = package["license"]
            .as_str()
            .unwrap_or_default()
            .replace('/', " OR ");
        // Each part of a conjunction needs one accepted alternative.
        let fits = licence.split(" AND ").all(|part| {
            part.trim_matches(['(', ')'])
                .split(" OR ")
                .any(|one| ACCEPTED.contains(&one.trim().trim_matches(['(', ')'])))
        });
        assert!(fits, "{}: {licence:?}", package["name"]);
    }
    println!("{} packages", packages.len());
    assert!(packages.len() > 20);
}

#[test]
fn no_dependency_needs_a_newer_rust_than_we_state() {
    let version = |text: &str| -> Vec<u32> {
        let parts = text.split('.').map(|part| part.parse().unwrap_or_default());
        // 1.88 is 1.88.0.
        parts.chain(std::iter::repeat(0)).take(3).collect()
    };
    let packages = packages();
    let ours = packages
        .iter()
        .find(|package| package["name"] == "tidemark-qcow2")
        .unwrap();
    let stated = ours["rust_version"].as_str().unwrap();
    for package in &packages {
        if let Some(needed) = package["rust_version"].as_str() {
            assert!(
                version(needed) <= version(stated),
                "{} needs {needed}",
                package["name"]
            );
        }
    }
}

/// Names that the crates export at their root.
fn exported(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    for statement in source.split(';') {
        let Some(at) = statement.find("pub use ") else {
            continue;
        };
        let list = &statement[at + 8..];
        let list = list.rsplit_once("::").map_or(list, |(path, last)| {
            if path.contains('{') {
                list.split_once('{').unwrap().1
            } else {
                last
            }
        });
        let words = list.split(['{', '}', ',']).map(str::trim);
        names.extend(
            words
                .filter(|word| word.chars().next().is_some_and(char::is_uppercase))
                .map(ToOwned::to_owned),
        );
    }
    names
}

fn texts(folder: &Path, ending: &str, into: &mut String) {
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            texts(&path, ending, into);
        } else if path.extension().is_some_and(|found| found == ending) {
            into.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_exported_type_is_in_the_documentation_and_in_a_test() {
    let mut documents = String::new();
    texts(&root().join("docs"), "md", &mut documents);
    let mut tests = String::new();
    for folder in [
        "bitmap",
        "qcow2",
        "checkpoint",
        "nbd",
        "cli",
        "fuzz",
        "fixtures",
        "benches",
    ] {
        texts(&root().join(folder).join("tests"), "rs", &mut tests);
    }
    texts(&root().join("cli/src"), "rs", &mut tests);
    let word = |text: &str, name: &str| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|found| found == name)
    };
    let mut gaps = Vec::new();
    let mut count = 0;
    for library in ["bitmap", "qcow2", "checkpoint", "nbd"] {
        let source = std::fs::read_to_string(root().join(library).join("src/lib.rs")).unwrap();
        for name in exported(&source) {
            count += 1;
            if !word(&documents, &name) {
                gaps.push(format!("{library}::{name} is in no document"));
            }
            if !word(&tests, &name) {
                gaps.push(format!("{library}::{name} is in no test"));
            }
        }
    }
    println!("{count} exported types");
    assert!(count > 40, "the list shrank: {count}");
    assert!(gaps.is_empty(), "{gaps:#?}");
}
