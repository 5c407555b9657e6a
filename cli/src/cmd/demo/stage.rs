//! What the scenes share: the disk, its backups, and what must be true of them.

use std::path::PathBuf;

use tidemark_checkpoint::backup::{self, BackupOptions, Mode};
use tidemark_checkpoint::{DiskDelta, ListOptions, SinceOptions};

use super::guest::{Act, Guest, Model};
use super::outside::Qemu;
use super::story::{Story, tell};
use crate::domain::{Access, Disks, Open};
use crate::exit::Outcome;
use crate::facts;
use crate::open::{Gates, Share};
use crate::size::human;

/// A point that can be restored: name of its checkpoint, what the disk held, its backup.
pub(super) struct Point {
    pub(super) name: &'static str,
    pub(super) model: Model,
    pub(super) file: String,
}

/// Where everything is, and what must be true.
pub(super) struct Stage {
    pub(super) disk: PathBuf,
    pub(super) metadata: PathBuf,
    pub(super) backups: PathBuf,
    pub(super) scratch: PathBuf,
    pub(super) model: Model,
    pub(super) points: Vec<Point>,
    pub(super) qemu: Qemu,
}

impl Stage {
    /// A session of the guest, from power on to shutdown.
    pub(super) fn guest(&mut self, acts: &[Act]) -> Outcome<()> {
        let mut guest = Guest::start(&self.disk, &mut self.model)?;
        for act in acts {
            guest.act(*act)?;
        }
        guest.stop()
    }

    pub(super) fn domain(&self) -> Outcome<Open> {
        let disks = Disks::only(self.disk.clone(), Some(self.metadata.clone()));
        disks.open(&Access::Copy(Gates::default()))
    }

    /// A checkpoint and a backup since another one, in one transaction.
    pub(super) fn backup(
        &mut self,
        story: &mut Story<'_>,
        name: &'static str,
        since: Option<&str>,
    ) -> Outcome<()> {
        let open = self.domain()?;
        let before = since.and_then(|since| self.point(since)).cloned();
        if let (Some(since), Some(before)) = (since, &before) {
            self.compare_changes(story, &open, since, before)?;
        }
        let report = backup::backup(
            &open.domain,
            &BackupOptions {
                to: self.backups.clone(),
                checkpoint: Some(name.to_owned()),
                since: since.map(ToOwned::to_owned),
                ..BackupOptions::default()
            },
        )?;
        open.close()?;
        for disk in &report.disks {
            let wanted = if since.is_some() {
                Mode::Incremental
            } else {
                Mode::Full
            };
            let mode = crate::cmd::backup::mode(disk.mode);
            let what = format!("backup '{name}' is {mode}: {} copied", human(disk.bytes));
            story.compare(&what, disk.mode == wanted)?;
            let model = self.model.clone();
            self.points.push(Point {
                name,
                model,
                file: disk.path.clone(),
            });
        }
        Ok(())
    }

    /// The bitmaps against the bytes: what changed must be marked.
    pub(super) fn compare_changes(
        &self,
        story: &mut Story<'_>,
        open: &Open,
        since: &str,
        before: &Model,
    ) -> Outcome<()> {
        let changes = open
            .domain
            .lookup(since)?
            .changed_since(SinceOptions::default())?;
        for change in &changes {
            let DiskDelta::Incremental(bitmap) = &change.delta else {
                story.compare(&format!("what changed since '{since}' is known"), false)?;
                continue;
            };
            let (marked, exact) = (human(bitmap.dirty_bytes()), self.model.difference(before));
            let what = format!(
                "since '{since}' {} differ, {marked} are marked, none is missed",
                human(exact)
            );
            story.compare(&what, self.model.is_covered(before, bitmap))?;
        }
        Ok(())
    }

    /// Where the chain lives in the image.
    pub(super) fn show_chain(&self, story: &mut Story<'_>) -> Outcome<()> {
        let storage = Share::default().storage(&self.disk)?;
        let facts = facts::read(&self.disk, &storage)?;
        if let Some((offset, bytes)) = facts.chain_place() {
            tell!(
                story,
                "The chain lives in the image: a header extension of {} at offset {offset}.",
                human(u64::try_from(bytes).unwrap_or(0))
            )?;
        }
        drop(storage);
        let open = Disks::default().with_image(self.disk.clone());
        let open = open.open(&Access::Look(Share::default()))?;
        let options = ListOptions {
            judge: true,
            sizes: true,
            ..ListOptions::default()
        };
        for info in open.domain.list(options)?.checkpoints {
            let changed = info.disks.first().and_then(|disk| disk.dirty_bytes);
            let changed = changed.map_or_else(|| "?".to_owned(), human);
            tell!(story, "changed since '{}': at most {changed}", info.name)?;
        }
        Ok(())
    }

    pub(super) fn point(&self, name: &str) -> Option<&Model> {
        self.points
            .iter()
            .find(|point| point.name == name)
            .map(|point| &point.model)
    }
}
