//! `bitmap list`: reads the directory, and bits only when they are to be counted.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use tidemark_qcow2::chain::{Health, Proof, Reading};
use tidemark_qcow2::{BitmapInfo, Image};

use crate::answer::bitmap_flags;
use crate::exit::{Exit, Outcome};
use crate::open::{Format, Share, read_alone};
use crate::out::{Out, say};
use crate::size::human;

/// List the bitmaps of an image; reads no bits unless asked to count
#[derive(Args, Debug)]
pub(crate) struct List {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    /// Count dirty bytes, and check the bits against the chain's proofs
    #[arg(long)]
    count: bool,
    /// Image to look at
    image: PathBuf,
}

impl List {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let image = read_alone(&self.image, self.share)?;
        let mut rows = Vec::new();
        for info in image.bitmaps()? {
            let state = self.state(&image, &info)?;
            let dirty_bytes = match info.in_use || !self.count {
                true => None,
                false => Some(image.load_bitmap(&info.name)?.dirty_bytes()),
            };
            rows.push((info, state, dirty_bytes));
        }
        if out.is_json() {
            let list = rows.iter().map(|(info, state, dirty_bytes)| {
                json!({
                    "name": info.name,
                    "granularity": info.granularity.bytes(),
                    "flags": bitmap_flags(info.in_use, info.auto),
                    "state": state.as_str(),
                    "dirty-bytes": dirty_bytes,
                })
            });
            out.json(&Value::Array(list.collect()))?;
            return Ok(Exit::Done);
        }
        for (info, state, dirty_bytes) in &rows {
            let granularity = human(info.granularity.bytes());
            let flags = bitmap_flags(info.in_use, info.auto).join(",");
            let dirty = dirty_bytes.map(|bytes| format!(" {} dirty", human(bytes)));
            let (name, state, dirty) = (&info.name, state.as_str(), dirty.unwrap_or_default());
            say!(out, "{name:<24} {granularity:>8} {flags:<6} {state}{dirty}")?;
        }
        Ok(Exit::Done)
    }

    /// The state of a checkpoint's bitmap by its record; of others only whether it is consistent.
    fn state(&self, image: &Image, info: &BitmapInfo) -> Outcome<Health> {
        let record = match image.chain() {
            Reading::Current(record) | Reading::Stale(record) => Some(record),
            Reading::Absent | Reading::Damaged => None,
        };
        let entry = record
            .as_ref()
            .and_then(|record| record.checkpoint_named(&info.name));
        Ok(match entry {
            Some(entry) if self.count => image.judge(entry)?,
            Some(entry) if !entry.health.is_usable() => entry.health,
            _ if info.in_use => Health::Inconsistent,
            Some(entry) if matches!(entry.proof, Proof::Recording(_)) && !info.auto => {
                Health::NotRecording
            }
            Some(entry) => entry.health,
            None => Health::Ok,
        })
    }
}
