//! The narrator: scenes, sentences, and every comparison that was made.

use std::path::Path;

use serde_json::json;

use super::verdict;
use crate::exit::Outcome;
use crate::out::{Out, say};

/// What has been told so far.
pub(super) struct Story<'a> {
    out: &'a mut Out,
    scene: usize,
    held: usize,
    failed: Vec<String>,
}

/// Tells one sentence.
macro_rules! tell {
    ($story:expr, $($arg:tt)*) => { $story.sentence(&format!($($arg)*)) };
}
pub(super) use tell;

impl<'a> Story<'a> {
    pub(super) fn new(out: &'a mut Out) -> Self {
        Self {
            out,
            scene: 0,
            held: 0,
            failed: Vec::new(),
        }
    }

    /// A new scene begins.
    pub(super) fn scene(&mut self, title: &str) -> Outcome<()> {
        self.scene += 1;
        if self.out.is_json() {
            return Ok(());
        }
        let number = self.scene;
        say!(self.out, "\n{number}. {title}")
    }

    /// One sentence of it.
    pub(super) fn sentence(&mut self, text: &str) -> Outcome<()> {
        if self.out.is_json() {
            return Ok(());
        }
        say!(self.out, "   {text}")
    }

    /// A comparison: what must be true, and whether it is.
    pub(super) fn compare(&mut self, what: &str, holds: bool) -> Outcome<()> {
        if holds {
            self.held += 1;
            return self.sentence(&format!("[ok] {what}"));
        }
        self.failed.push(what.to_owned());
        self.sentence(&format!("[FAILED] {what}"))
    }

    /// The end: how many comparisons held.
    pub(super) fn end(self, kept: Option<&Path>) -> Outcome {
        let (held, failed) = (self.held, self.failed.len());
        let kept = kept.map(|path| path.display().to_string());
        if self.out.is_json() {
            self.out.json(&json!({
                "comparisons": held + failed,
                "failed": self.failed,
                "directory": kept,
            }))?;
            return Ok(verdict(failed));
        }
        say!(
            self.out,
            "\n{} comparisons, {failed} failed.",
            held + failed
        )?;
        match kept {
            Some(path) => say!(self.out, "Everything is kept in {path}")?,
            None => say!(
                self.out,
                "The files are gone; `tidemark demo DIR` keeps them."
            )?,
        }
        Ok(verdict(failed))
    }
}
