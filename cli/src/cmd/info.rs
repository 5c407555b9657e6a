//! `info`: what an image says of itself. Reads no bitmap data.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};
use tidemark_qcow2::Storage;
use tidemark_qcow2::format::header::{autoclear, compatible, incompatible};

use crate::answer::{bitmap_flags, chain};
use crate::exit::{Exit, Failure, Outcome};
use crate::facts::{self, Facts};
use crate::open::{Format, Share};
use crate::out::{Out, say, warn};
use crate::size::human;
use crate::snapshots;

/// Describe an image: size, format, bitmaps, snapshots, and its chain of checkpoints
#[derive(Args, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    /// Image to describe
    image: PathBuf,
}

impl Info {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let storage = self.share.storage(&self.image)?;
        let facts = facts::read(&self.image, &storage)?;
        let file = FileFacts::read(&self.image, &storage)?;
        for problem in &facts.problems {
            warn(format_args!("{problem}"));
        }
        if !out.is_json() {
            return crate::cmd::info_text::print(out, &self.image, &facts, &file);
        }
        let mut answer = describe(&self.image, &facts, &file);
        let ours = json!({
            "unsteady": self.share.is_held(&self.image),
            "chain": chain::describe(&facts),
            "problems": facts.problems,
        });
        answer.insert("tidemark".into(), ours);
        out.json(&Value::Object(answer))?;
        Ok(Exit::Done)
    }
}

/// What the file system says.
pub(crate) struct FileFacts {
    pub(crate) bytes: u64,
    pub(crate) allocated: u64,
}

impl FileFacts {
    fn read(path: &Path, storage: &impl Storage) -> Outcome<Self> {
        use std::os::unix::fs::MetadataExt;
        let failed = |error: std::io::Error| Failure::io(path, "look at file", &error);
        let metadata = std::fs::metadata(path).map_err(failed)?;
        Ok(Self {
            bytes: storage.len().map_err(failed)?.next_multiple_of(512),
            allocated: metadata.blocks() * 512,
        })
    }
}

/// The keys of `qemu-img info --output=json`.
fn describe(path: &Path, facts: &Facts, file: &FileFacts) -> Map<String, Value> {
    let name = path.display().to_string();
    let mut answer = Map::new();
    answer.insert(
        "children".into(),
        json!([{
            "name": "file",
            "info": {
                "children": [],
                "virtual-size": file.bytes,
                "filename": name,
                "format": "file",
                "actual-size": file.allocated,
                "format-specific": { "type": "file", "data": {} },
                "dirty-flag": false,
            },
        }]),
    );
    if let Some(format) = &facts.backing_format
        && facts.backing_name.is_some()
    {
        answer.insert("backing-filename-format".into(), json!(format));
    }
    if !facts.snapshots.is_empty() {
        let list = facts.snapshots.iter().map(snapshots::to_json).collect();
        answer.insert("snapshots".into(), Value::Array(list));
    }
    answer.insert("virtual-size".into(), facts.header.disk_bytes.into());
    answer.insert("filename".into(), json!(name));
    answer.insert(
        "cluster-size".into(),
        facts.header.geometry.cluster_bytes().into(),
    );
    answer.insert("format".into(), json!("qcow2"));
    answer.insert("actual-size".into(), file.allocated.into());
    answer.insert(
        "format-specific".into(),
        json!({ "type": "qcow2", "data": specific(facts) }),
    );
    if let Some(backing) = &facts.backing_name {
        answer.insert(
            "full-backing-filename".into(),
            json!(full_name(path, backing)),
        );
        answer.insert("backing-filename".into(), json!(backing));
    }
    if facts.header.encryption != 0 {
        answer.insert("encrypted".into(), json!(true));
    }
    answer.insert("dirty-flag".into(), facts.has(incompatible::DIRTY).into());
    answer
}

fn specific(facts: &Facts) -> Value {
    let header = &facts.header;
    let mut data = Map::new();
    let is_old = header.geometry.version == 2;
    data.insert("compat".into(), json!(if is_old { "0.10" } else { "1.1" }));
    data.insert("compression-type".into(), json!(compression(facts)));
    if !is_old {
        let lazy = header.compatible & compatible::LAZY_REFCOUNTS != 0;
        data.insert("lazy-refcounts".into(), lazy.into());
        if !facts.bitmaps.is_empty() {
            let list = facts.bitmaps.iter().map(|bitmap| {
                json!({
                    "flags": bitmap_flags(bitmap.in_use, bitmap.auto),
                    "name": bitmap.text(),
                    "granularity": bitmap.granularity.bytes(),
                })
            });
            data.insert("bitmaps".into(), list.collect());
        }
    }
    data.insert(
        "refcount-bits".into(),
        header.geometry.refcount_bits().into(),
    );
    if facts.has(incompatible::DATA_FILE) {
        if let Some(name) = &facts.data_file {
            data.insert("data-file".into(), json!(name));
        }
        let raw = header.autoclear & autoclear::RAW_DATA_FILE != 0;
        data.insert("data-file-raw".into(), raw.into());
    }
    if let Some(encryption) = &facts.encryption {
        data.insert("encrypt".into(), encryption.clone());
    }
    if !is_old {
        data.insert("corrupt".into(), facts.has(incompatible::CORRUPT).into());
        data.insert(
            "extended-l2".into(),
            facts.has(incompatible::EXTENDED_L2).into(),
        );
    }
    Value::Object(data)
}

pub(crate) fn compression(facts: &Facts) -> &'static str {
    if facts.header.compression_type == 1 {
        "zstd"
    } else {
        "zlib"
    }
}

/// The backing file as somebody in the present directory would call it.
pub(crate) fn full_name(image: &Path, backing: &str) -> String {
    let is_protocol = backing
        .split('/')
        .next()
        .is_some_and(|head| head.contains(':'));
    match image.parent() {
        Some(parent) if !is_protocol && parent != Path::new("") => {
            parent.join(backing).display().to_string()
        }
        _ => backing.to_owned(),
    }
}

/// One line about the file, for people.
pub(crate) fn file_line(out: &mut Out, file: &FileFacts) -> Outcome<()> {
    say!(
        out,
        "    file length: {} ({} bytes)",
        human(file.bytes),
        file.bytes
    )?;
    say!(out, "    disk size: {}", human(file.allocated))
}
