//! A second opinion: qemu-img, where it is installed.

use std::path::Path;
use std::process::{Command, Stdio};

use super::guest::Model;
use super::story::{Story, tell};
use crate::exit::Outcome;

/// qemu-img on this machine.
pub(super) struct Qemu {
    version: Option<String>,
}

impl Qemu {
    pub(super) fn find() -> Self {
        let output = Command::new("qemu-img")
            .arg("--version")
            .stdin(Stdio::null())
            .output();
        let text = output.ok().filter(|output| output.status.success());
        let version = text.and_then(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .map(ToOwned::to_owned)
        });
        Self { version }
    }

    pub(super) fn introduce(&self, story: &mut Story<'_>) -> Outcome<()> {
        match &self.version {
            Some(version) => tell!(story, "Second opinion on the way: {version}."),
            None => tell!(
                story,
                "qemu-img is not installed: no second opinion on the way."
            ),
        }
    }

    /// Its check of an image: `worst` is 0 for spotless, 3 when leaked clusters are allowed.
    pub(super) fn check(&self, story: &mut Story<'_>, image: &Path, worst: i32) -> Outcome<()> {
        if self.version.is_none() {
            return Ok(());
        }
        let code = self.run(&["check", "-q", "-f", "qcow2"], &[image]);
        let fine = code == Some(0) || code == Some(worst);
        let found = match code {
            Some(0) => "nothing wrong",
            Some(3) => "leaked clusters and nothing else",
            _ => "damage",
        };
        let name = file_name(image);
        story.compare(&format!("qemu-img check of {name} finds {found}"), fine)
    }

    /// What it reads from a backup, its backing files included.
    pub(super) fn convert(
        &self,
        story: &mut Story<'_>,
        backup: &Path,
        scratch: &Path,
        expected: &Model,
    ) -> Outcome<()> {
        if self.version.is_none() {
            return Ok(());
        }
        let code = self.run(&["convert", "-f", "qcow2", "-O", "raw"], &[backup, scratch]);
        let same =
            code == Some(0) && std::fs::read(scratch).is_ok_and(|bytes| bytes == expected.bytes);
        let _ = std::fs::remove_file(scratch);
        let name = file_name(backup);
        story.compare(
            &format!("qemu-img convert of {name} alone gives the same bytes"),
            same,
        )
    }

    fn run(&self, args: &[&str], files: &[&Path]) -> Option<i32> {
        Command::new("qemu-img")
            .args(args)
            .args(files)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok()?
            .code()
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
