//! `info` for people: the lines of `qemu-img info`, then the chain of checkpoints.

use std::path::Path;

use serde_json::Value;
use tidemark_qcow2::format::chain::{ChainRecord, Reading};
use tidemark_qcow2::format::header::{autoclear, compatible, incompatible};

use crate::answer::{bitmap_flags, chain};
use crate::cmd::info::{FileFacts, compression, file_line, full_name};
use crate::exit::{Exit, Outcome};
use crate::facts::Facts;
use crate::out::{Out, say};
use crate::size::human;
use crate::snapshots;

/// Prints all of it.
pub(crate) fn print(out: &mut Out, path: &Path, facts: &Facts, file: &FileFacts) -> Outcome {
    let bytes = facts.header.disk_bytes;
    say!(out, "image: {}", path.display())?;
    say!(out, "file format: qcow2")?;
    say!(out, "virtual size: {} ({bytes} bytes)", human(bytes))?;
    say!(out, "disk size: {}", human(file.allocated))?;
    if facts.header.encryption != 0 {
        say!(out, "encrypted: yes")?;
    }
    say!(
        out,
        "cluster_size: {}",
        facts.header.geometry.cluster_bytes()
    )?;
    if facts.has(incompatible::DIRTY) {
        say!(out, "cleanly shut down: no")?;
    }
    if let Some(backing) = &facts.backing_name {
        let full = full_name(path, backing);
        if full == *backing {
            say!(out, "backing file: {backing}")?;
        } else {
            say!(out, "backing file: {backing} (actual path: {full})")?;
        }
        if let Some(format) = &facts.backing_format {
            say!(out, "backing file format: {format}")?;
        }
    }
    snapshots::print(out, &facts.snapshots)?;
    specific(out, facts)?;
    say!(out, "Child node '/file':")?;
    say!(out, "    filename: {}", path.display())?;
    say!(out, "    protocol type: file")?;
    file_line(out, file)?;
    checkpoints(out, facts)?;
    Ok(Exit::Done)
}

fn specific(out: &mut Out, facts: &Facts) -> Outcome<()> {
    let header = &facts.header;
    let is_old = header.geometry.version == 2;
    say!(out, "Format specific information:")?;
    say!(out, "    compat: {}", if is_old { "0.10" } else { "1.1" })?;
    say!(out, "    compression type: {}", compression(facts))?;
    if !is_old {
        let lazy = header.compatible & compatible::LAZY_REFCOUNTS != 0;
        say!(out, "    lazy refcounts: {lazy}")?;
    }
    if !is_old && !facts.bitmaps.is_empty() {
        say!(out, "    bitmaps:")?;
        for (number, bitmap) in facts.bitmaps.iter().enumerate() {
            say!(out, "        [{number}]:")?;
            say!(out, "            flags:")?;
            let flags = bitmap_flags(bitmap.in_use, bitmap.auto);
            for (number, flag) in flags.iter().enumerate() {
                say!(out, "                [{number}]: {flag}")?;
            }
            say!(out, "            name: {}", bitmap.text())?;
            say!(
                out,
                "            granularity: {}",
                bitmap.granularity.bytes()
            )?;
        }
    }
    say!(
        out,
        "    refcount bits: {}",
        header.geometry.refcount_bits()
    )?;
    if facts.has(incompatible::DATA_FILE) {
        if let Some(name) = &facts.data_file {
            say!(out, "    data file: {name}")?;
        }
        let raw = header.autoclear & autoclear::RAW_DATA_FILE != 0;
        say!(out, "    data file raw: {raw}")?;
    }
    if let Some(encryption) = &facts.encryption {
        say!(out, "    encrypt:")?;
        nested(out, encryption, 8)?;
    }
    if !is_old {
        say!(out, "    corrupt: {}", facts.has(incompatible::CORRUPT))?;
        say!(
            out,
            "    extended l2: {}",
            facts.has(incompatible::EXTENDED_L2)
        )?;
    }
    Ok(())
}

/// A value as qemu-img prints it for people: one line a key, deeper ones further in.
fn nested<'a>(out: &mut Out, value: &'a Value, indent: usize) -> Outcome<()> {
    let rows: Vec<(String, &'a Value)> = match value {
        Value::Object(object) => {
            let row = |(key, value): (&'a String, &'a Value)| (key.replace('-', " "), value);
            object.iter().map(row).collect()
        }
        Value::Array(list) => {
            let row = |(number, value)| (format!("[{number}]"), value);
            list.iter().enumerate().map(row).collect()
        }
        _ => return Ok(()),
    };
    for (key, value) in rows {
        let margin = " ".repeat(indent);
        match value {
            Value::Object(_) | Value::Array(_) => {
                say!(out, "{margin}{key}:")?;
                nested(out, value, indent + 4)?;
            }
            Value::String(text) => say!(out, "{margin}{key}: {text}")?,
            other => say!(out, "{margin}{key}: {other}")?,
        }
    }
    Ok(())
}

fn checkpoints(out: &mut Out, facts: &Facts) -> Outcome<()> {
    let record = match &facts.chain {
        Reading::Absent => return Ok(()),
        Reading::Damaged => return say!(out, "Checkpoints: the chain record is damaged"),
        Reading::Stale(record) => {
            say!(out, "Checkpoints (an older record, the newest is damaged):")?;
            record
        }
        Reading::Current(record) => {
            say!(out, "Checkpoints:")?;
            record
        }
    };
    say!(out, "    image uuid: {}", record.image)?;
    say!(out, "    scheme: {}", chain::scheme(record.scheme))?;
    if let Some((offset, bytes)) = facts.chain_place() {
        say!(
            out,
            "    header extension: {bytes} bytes at offset {offset}"
        )?;
    }
    for entry in &record.checkpoints {
        let parent = chain::name_of(record, entry.parent).unwrap_or("-");
        let current = if is_current(record, entry) {
            ", current"
        } else {
            ""
        };
        let state = chain::recorded_state(entry, &facts.bitmaps).as_str();
        say!(out, "    {}: parent {parent}, {state}{current}", entry.name)?;
    }
    Ok(())
}

fn is_current(record: &ChainRecord, entry: &chain::Entry) -> bool {
    record.current == Some(entry.identity)
}
