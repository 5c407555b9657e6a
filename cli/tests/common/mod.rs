//! Running the built command.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

pub(crate) mod serving;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};

/// What the command answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    /// The JSON on stdout.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// Panics unless the exit code is `code`; a failure must be one line.
    pub(crate) fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        if code == 1 || code > 3 {
            assert_eq!(self.stderr.lines().count(), 1, "one line: {}", self.stderr);
            assert!(self.stderr.starts_with("tidemark: "), "{}", self.stderr);
        }
        self
    }
}

/// A folder in which the command is run, so that names are short.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the command; arguments are split at spaces.
    pub(crate) fn run(&self, line: &str) -> Answer {
        self.run_args(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub(crate) fn run_args(&self, args: &[&str]) -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_tidemark"))
            .args(args)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Answer {
            code: output
                .status
                .code()
                .expect("the command is not killed by a signal"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs a command that must work.
    pub(crate) fn ok(&self, line: &str) -> String {
        self.run(line).ends_with(0).stdout
    }

    /// Runs a command that must work, and answers JSON.
    pub(crate) fn json(&self, line: &str) -> Value {
        self.run(&format!("{line} --output json"))
            .ends_with(0)
            .json()
    }

    /// Runs qemu-img here, so that its answer has the same file names.
    pub(crate) fn qemu_img(&self, args: &[&str]) -> (i32, Value) {
        let output = Command::new("qemu-img")
            .args(args)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output.status.code().unwrap(), json)
    }

    /// Makes an image with qemu-img.
    pub(crate) fn create(&self, name: &str, size: u64, opts: &[(&str, &str)]) -> PathBuf {
        let path = self.path(name);
        qemu_img::create(&path, size, opts);
        path
    }

    /// Guest writes through qemu-io.
    pub(crate) fn write(&self, name: &str, commands: &[&str]) {
        qemu_io::commands(&self.path(name), commands);
    }
}

/// Whether `value` has exactly these keys at least; all of them always.
pub(crate) fn has_keys(value: &Value, keys: &[&str]) {
    let object = value
        .as_object()
        .unwrap_or_else(|| panic!("an object: {value}"));
    for key in keys {
        assert!(object.contains_key(*key), "no {key} in {value}");
    }
}

/// The same JSON without one key.
pub(crate) fn without(mut value: Value, key: &str) -> Value {
    value
        .as_object_mut()
        .expect("an object")
        .remove(key)
        .expect("the key is there");
    value
}

/// Asserts that two answers agree, key by key.
pub(crate) fn assert_same(what: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let keys = |map: &serde_json::Map<String, Value>| {
                let mut keys: Vec<String> = map.keys().cloned().collect();
                keys.sort();
                keys
            };
            assert_eq!(keys(ours), keys(theirs), "keys of {what}");
            for (key, value) in ours {
                assert_same(&format!("{what}.{key}"), value, &theirs[key]);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(
                ours.len(),
                theirs.len(),
                "length of {what}: {ours:?} {theirs:?}"
            );
            for (number, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                assert_same(&format!("{what}[{number}]"), ours, theirs);
            }
        }
        _ => assert_eq!(ours, theirs, "{what}"),
    }
}

/// The bytes of the disk in an image.
pub(crate) fn content(path: &Path) -> Vec<u8> {
    qemu_img::convert_to_raw(path)
}

/// The map without what we do not look at: an offset that is not there is null, and a hole of the
/// host file below an allocated cluster is data.
pub(crate) fn comparable_map(map: &Value) -> Value {
    let mut merged: Vec<Value> = Vec::new();
    for entry in map.as_array().unwrap() {
        let mut entry = entry.clone();
        let object = entry.as_object_mut().unwrap();
        object.entry("offset").or_insert(Value::Null);
        if object["data"] == true {
            object.insert("zero".into(), json!(false));
        }
        match merged.last_mut() {
            Some(last) if continues(last, &entry) => {
                let length = last["length"].as_u64().unwrap() + entry["length"].as_u64().unwrap();
                last["length"] = json!(length);
            }
            _ => merged.push(entry),
        }
    }
    Value::Array(merged)
}

fn continues(last: &Value, next: &Value) -> bool {
    let end = |entry: &Value| Some(entry["offset"].as_u64()? + entry["length"].as_u64()?);
    let keys = ["depth", "present", "zero", "data", "compressed"];
    keys.iter().all(|key| last[key] == next[key]) && end(last) == next["offset"].as_u64()
}
