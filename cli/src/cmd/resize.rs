//! `resize`: another size for the disk.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::{Preallocation, Shrink};

use crate::creation;
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Format, Gates};
use crate::out::{Out, say};
use crate::size;

/// Give the disk another size; its bitmaps follow
#[derive(Args, Debug)]
pub(crate) struct Resize {
    #[command(flatten)]
    format: Format,
    /// Allow a smaller size: what lies behind it is lost
    #[arg(long)]
    shrink: bool,
    /// Put what the disk gains in place at once: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = parse_preallocation)]
    preallocation: Preallocation,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Image that is changed
    image: PathBuf,
    /// New size; with + or - before it, how much is added or taken away
    #[arg(allow_hyphen_values = true)]
    size: String,
}

impl Resize {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let wanted = Wanted::parse(&self.size).map_err(Failure::usage)?;
        let image = self.gates.write(&self.image)?;
        let old = image.size();
        let new = wanted.applied_to(old).ok_or_else(|| {
            let path = self.image.display();
            Failure::usage(format!(
                "{path}: {} from {old} bytes is no multiple of 512 above zero",
                self.size
            ))
        })?;
        if new < old && !self.shrink {
            return Err(Failure::new(format!(
                "{}: {new} bytes are less than the {old} that the disk has, whose end would be lost; \
                 add --shrink",
                self.image.display()
            )));
        }
        if self.preallocation == Preallocation::Off {
            let shrink = match self.shrink {
                true => Shrink::Allowed,
                false => Shrink::Refused,
            };
            image.resize(new, shrink)?;
        } else if new < old {
            let path = self.image.display();
            return Err(Failure::usage(format!(
                "{path}: --preallocation is for a disk that grows"
            )));
        } else {
            image.grow(new, self.preallocation)?;
        }
        image.close()?;
        if out.is_json() {
            out.json(&json!({
                "image": self.image.display().to_string(),
                "old-size": old,
                "virtual-size": new,
            }))?;
        } else if !self.quiet {
            say!(out, "{}: {} bytes", self.image.display(), new)?;
        }
        Ok(Exit::Done)
    }
}

fn parse_preallocation(name: &str) -> Result<Preallocation, String> {
    let modes = "there are off, metadata, falloc and full";
    creation::preallocation(name).ok_or_else(|| modes.to_owned())
}

/// A size as qemu-img takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Exactly(u64),
    More(u64),
    Less(u64),
}

impl Wanted {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_at_checked(1) {
            Some(("+", rest)) => size::parse(rest).map(Self::More),
            Some(("-", rest)) => size::parse(rest).map(Self::Less),
            _ => size::parse(text).map(Self::Exactly),
        }
    }

    /// The size that a disk of `old` bytes would have, if a disk can have it.
    fn applied_to(self, old: u64) -> Option<u64> {
        let size = match self {
            Self::Exactly(size) => Some(size),
            Self::More(bytes) => old.checked_add(bytes),
            Self::Less(bytes) => old.checked_sub(bytes),
        };
        size.filter(|&size| size > 0 && size.is_multiple_of(512))
    }
}

#[cfg(test)]
mod tests {
    use super::Wanted;

    #[test]
    fn signs_and_units_are_understood() {
        let applied = |text: &str| Wanted::parse(text).ok()?.applied_to(1 << 20);
        assert_eq!(applied("2M"), Some(2 << 20));
        assert_eq!(applied("+512K"), Some(3 << 19));
        assert_eq!(applied("-512K"), Some(1 << 19));
        assert_eq!(applied("1000"), None);
        assert_eq!(applied("-1M"), None);
        assert_eq!(applied("-2M"), None);
        assert_eq!(applied("+-1"), None);
        assert_eq!(applied(""), None);
    }
}
