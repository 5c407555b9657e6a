//! The story, scene by scene.

use std::path::Path;

use tidemark_checkpoint::DeleteFlags;
use tidemark_checkpoint::backup::{self, Format, RestoreOptions};
use tidemark_qcow2::{CreateOptions, FileStorage, Image, OpenOptions};

use super::guest::{Act, Guest, Model, data, open, read_disk};
use super::outside::Qemu;
use super::stage::Stage;
use super::story::{Story, tell};
use crate::domain::{Access, Disks};
use crate::exit::{Failure, Outcome};
use crate::open::Share;
use crate::size::human;

const DISK_BYTES: u64 = 48 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Plays the whole story in `directory`.
pub(super) fn play(story: &mut Story<'_>, directory: &Path) -> Outcome<()> {
    let mut stage = Stage {
        disk: directory.join("disk.qcow2"),
        metadata: directory.join("metadata"),
        backups: directory.join("backups"),
        scratch: directory.join("scratch.raw"),
        model: Model::new(usize::try_from(DISK_BYTES).unwrap_or(0)),
        points: Vec::new(),
        qemu: Qemu::find(),
    };
    stage.create(story)?;
    stage.full_backup(story)?;
    stage.increments(story)?;
    stage.middle_deletion(story)?;
    stage.lost_metadata(story)?;
    stage.crash(story)?;
    stage.after_the_crash(story)?;
    stage.restore_everything(story)
}

impl Stage {
    fn create(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("A disk, and a guest that writes to it")?;
        self.qemu.introduce(story)?;
        let storage = FileStorage::create(&self.disk)
            .map_err(|error| Failure::io(&self.disk, "create", &error))?;
        let options = CreateOptions::new(DISK_BYTES);
        Image::create(Box::new(storage), &options, OpenOptions::default())?.close()?;
        tell!(story, "disk.qcow2 holds a disk of {}.", human(DISK_BYTES))?;
        self.guest(&[
            Act::Write(0, 6 * MIB, 1),
            Act::Write(10 * MIB + 3 * KIB, 2 * MIB, 2),
            Act::Write(30 * MIB, 5 * MIB, 3),
        ])?;
        tell!(
            story,
            "The guest wrote 13 MiB in three places. No bitmap records yet."
        )
    }

    fn full_backup(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("Checkpoint 'monday', with a full backup in the same transaction")?;
        self.backup(story, "monday", None)?;
        tell!(
            story,
            "From that moment a bitmap in the image records what changes."
        )?;
        self.show_chain(story)
    }

    fn increments(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("A day later: writes, zeroes and discards, and an incremental backup")?;
        self.guest(&[
            Act::Write(MIB + 700, 90 * KIB, 4),
            Act::Write(20 * MIB, MIB, 5),
            Act::Zero(31 * MIB, 512 * KIB),
            Act::Discard(33 * MIB, MIB),
        ])?;
        self.backup(story, "tuesday", Some("monday"))?;
        story.scene("Another day, another increment")?;
        self.guest(&[
            Act::Write(MIB, 4 * KIB, 6),
            Act::Write(40 * MIB, 700 * KIB, 7),
        ])?;
        self.backup(story, "wednesday", Some("tuesday"))
    }

    fn middle_deletion(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("'tuesday' is deleted from the middle of the chain")?;
        let before = self.point("monday").cloned();
        let open = self.domain()?;
        open.domain.delete("tuesday", DeleteFlags::NONE)?;
        tell!(
            story,
            "Its bitmap was folded into that of 'monday': nothing is forgotten."
        )?;
        if let Some(before) = before {
            self.compare_changes(story, &open, "monday", &before)?;
        }
        open.close()
    }

    fn lost_metadata(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("The metadata directory is lost")?;
        std::fs::remove_dir_all(&self.metadata)
            .map_err(|error| Failure::io(&self.metadata, "remove", &error))?;
        tell!(
            story,
            "All descriptors outside the image are gone. What does the image know?"
        )?;
        let open = Disks::default().with_image(self.disk.clone());
        let rebuilt = open
            .open(&Access::Look(Share::default()))?
            .domain
            .rebuild(false)?;
        for info in &rebuilt.checkpoints {
            let parent = info.parent.as_deref().unwrap_or("nobody");
            let current = if info.current { ", current" } else { "" };
            let state = info
                .disks
                .first()
                .map_or("missing", |disk| disk.health.as_str());
            tell!(
                story,
                "{}: child of {parent}, bitmap {state}{current}",
                info.name
            )?;
        }
        let names: Vec<&str> = rebuilt
            .checkpoints
            .iter()
            .map(|info| info.name.as_str())
            .collect();
        let parents: Vec<Option<&str>> = rebuilt
            .checkpoints
            .iter()
            .map(|info| info.parent.as_deref())
            .collect();
        let whole = names == ["monday", "wednesday"]
            && parents == [None, Some("monday")]
            && rebuilt.problems.is_empty();
        story.compare(
            "the chain was rebuilt from the image alone, without a guess",
            whole,
        )?;
        self.show_chain(story)
    }

    fn crash(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("A crash in the middle of writing")?;
        let old = self.model.clone();
        let mut guest = Guest::start(&self.disk, &mut self.model)?;
        guest.act(Act::Write(5 * MIB + 100, 3 * KIB, 8))?;
        guest.act(Act::Write(25 * MIB, 300 * KIB, 9))?;
        guest.flush()?;
        tell!(story, "303 KiB are written and flushed: they must survive.")?;
        let (offset, length) = (27 * MIB, 200 * KIB);
        guest.act(Act::Write(offset, length, 10))?;
        tell!(
            story,
            "200 KiB are written and not flushed: they may survive or not."
        )?;
        let exact = guest.marked("wednesday")?;
        guest.crash();
        tell!(story, "The machine is gone; nobody closed the image.")?;

        let found = read_disk(&self.disk)?;
        let unsteady = |bytes: &[u8]| {
            let start = usize::try_from(offset).unwrap_or(0);
            bytes
                .iter()
                .skip(start)
                .take(usize::try_from(length).unwrap_or(0))
                .copied()
                .collect()
        };
        let (was, is): (Vec<u8>, Vec<u8>) = (unsteady(&old.bytes), unsteady(&found.bytes));
        let new = data(10, length);
        let torn = is
            .iter()
            .zip(&was)
            .zip(&new)
            .all(|((is, was), new)| is == was || is == new);
        story.compare("what was not flushed is old or new, and nothing else", torn)?;
        let start = usize::try_from(offset).unwrap_or(0);
        for (at, byte) in is.iter().enumerate() {
            if let Some(place) = self.model.bytes.get_mut(start + at) {
                *place = *byte;
            }
        }
        story.compare(
            "everything that was flushed is there, byte for byte",
            found == self.model,
        )?;
        self.qemu.check(story, &self.disk, 3)?;
        let image = open(&self.disk, false)?;
        let after = image.load_bitmap("wednesday")?;
        let (kept, exact) = (human(after.dirty_bytes()), human(exact));
        tell!(
            story,
            "The bitmap marked {exact} before the crash and marks {kept} after it:"
        )?;
        tell!(
            story,
            "it says too much, never too little, and QEMU can use it as it is."
        )?;
        let before = self.point("wednesday").cloned();
        let covered = before.is_some_and(|before| self.model.is_covered(&before, &after));
        story.compare("every byte that changed is still marked", covered)
    }

    fn after_the_crash(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("The next backup is incremental all the same")?;
        self.guest(&[Act::Write(45 * MIB, 64 * KIB, 11)])?;
        self.backup(story, "thursday", Some("wednesday"))
    }

    fn restore_everything(&mut self, story: &mut Story<'_>) -> Outcome<()> {
        story.scene("Every point is restored and compared")?;
        let verification = backup::verify(&self.backups)?;
        let bytes = human(verification.bytes);
        let what = format!("all hashes of the backups are right ({bytes} read)");
        story.compare(&what, verification.is_sound())?;
        for point in &self.points {
            let to = self
                .disk
                .with_file_name(format!("restored-{}.qcow2", point.name));
            backup::restore(&RestoreOptions {
                from: self.backups.clone(),
                disk: "vda".to_owned(),
                at: Some(point.name.to_owned()),
                to: to.clone(),
                format: Format::Qcow2,
            })?;
            let same = read_disk(&to)? == point.model;
            let what = format!("'{}' is restored byte for byte", point.name);
            story.compare(&what, same)?;
            let file = self.backups.join(&point.file);
            self.qemu
                .convert(story, &file, &self.scratch, &point.model)?;
        }
        self.qemu.check(story, &self.disk, 3)
    }
}
