//! The manifest: what a point is, and what it takes to believe its files.
//!
//! A JSON file, one for each point. Its last key is the BLAKE3 hash of the file itself, with
//! that hash's own digits as zeros.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use tidemark_qcow2::chain::{Identity, ImageUuid};

use super::verify::Defect;
use super::{Error, Result, files, hex};

/// End of a manifest's file name.
pub(super) const SUFFIX: &str = ".manifest.json";
/// Version of the layout of manifests and hash files.
const VERSION: u32 = 1;
/// Largest manifest read.
const MAX_BYTES: u64 = 16 << 20;
const HASH_KEY: &str = "\"blake3\": \"";

/// How much of a disk a target holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of it.
    Full,
    /// What changed since the point that is its backing file.
    Incremental,
}

/// Format of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// qcow2, version 3.
    #[default]
    Qcow2,
    /// A sparse file of the disk's bytes.
    Raw,
}

impl Format {
    /// The name that qemu-img knows it by; also the end of a file name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// One point: the domain's disks at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    #[serde(rename = "tidemark-backup")]
    version: u32,
    /// Place in the order of the directory's points: greater is later.
    pub sequence: u64,
    /// Seconds since the epoch.
    pub created: u64,
    /// Identity of the checkpoint taken with the backup, or of the point itself if there is none.
    #[serde(with = "hex")]
    pub identity: Identity,
    /// Name of the checkpoint; none for a backup without one.
    pub checkpoint: Option<String>,
    /// What was asked to be the base.
    pub since: Option<Since>,
    /// The disks, by name.
    pub disks: Vec<DiskEntry>,
    #[serde(with = "hex")]
    blake3: blake3::Hash,
}

/// The checkpoint that a backup counts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// Its name.
    pub name: String,
    /// Its identity.
    #[serde(with = "hex")]
    pub identity: Identity,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskEntry {
    /// Name in the domain.
    pub disk: String,
    /// Identity of the image that was copied; none if it had no chain record.
    #[serde(with = "hex::optional")]
    pub image: Option<ImageUuid>,
    /// Virtual size at the moment, bytes.
    pub size: u64,
    /// Format of the target.
    pub format: Format,
    /// What the target holds.
    pub mode: Mode,
    /// Why it is full although an increment was asked for.
    pub reason: Option<String>,
    /// The target, a name in the manifest's directory.
    pub path: String,
    /// Bytes of the target's file.
    pub file_bytes: u64,
    /// What shows where the target holds nothing; none if it is full.
    pub backing: Option<Backing>,
    /// Bytes of the disk that the target holds as data.
    pub bytes: u64,
    /// Bytes of disk for each hash: the target's cluster size.
    pub block_size: u64,
    /// The file of hashes, a name in the manifest's directory.
    pub hashes: String,
    /// Hash of the file of hashes.
    #[serde(with = "hex")]
    pub hashes_blake3: blake3::Hash,
    /// Hash of everything in the target that is not the disk's data.
    #[serde(with = "hex")]
    pub layout_blake3: blake3::Hash,
}

/// The target below an increment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// Identity of its point.
    #[serde(with = "hex")]
    pub identity: Identity,
    /// The target, a name in the manifest's directory.
    pub path: String,
    /// Its format.
    pub format: Format,
}

impl Manifest {
    /// A manifest without disks.
    pub(super) fn new(identity: Identity, checkpoint: Option<String>, sequence: u64) -> Self {
        Self {
            version: VERSION,
            sequence,
            created: crate::name::now(),
            identity,
            checkpoint,
            since: None,
            disks: Vec::new(),
            blake3: blake3::Hash::from_bytes([0; 32]),
        }
    }

    /// The point's entry for a disk.
    pub fn disk(&self, name: &str) -> Option<&DiskEntry> {
        self.disks.iter().find(|entry| entry.disk == name)
    }

    /// What a person calls the point: the checkpoint's name, else the identity.
    pub fn label(&self) -> String {
        self.checkpoint
            .clone()
            .unwrap_or_else(|| self.identity.to_string())
    }

    /// The file's text, its own hash in it.
    fn to_text(&self) -> std::result::Result<String, serde_json::Error> {
        let zeros = blake3::Hash::from_bytes([0; 32]);
        let blank = Self {
            blake3: zeros,
            ..self.clone()
        };
        let text = serde_json::to_string_pretty(&blank)? + "\n";
        let hash = blake3::hash(text.as_bytes());
        let at = text.rfind(HASH_KEY).map_or(0, |at| at + HASH_KEY.len());
        let (before, after) = text.split_at(at);
        let rest = after.get(hash.to_hex().len()..).unwrap_or_default();
        Ok(format!("{before}{hash}{rest}"))
    }

    /// The manifest for `target`, written but not yet under its name.
    pub(super) fn stage(&self, target: &Path) -> Result<NamedTempFile> {
        let text = self
            .to_text()
            .map_err(std::io::Error::from)
            .map_err(Error::io("encode", target))?;
        let mut file = files::temporary(target)?;
        file.write_all(text.as_bytes())
            .map_err(Error::io("write", target))?;
        Ok(file)
    }

    /// Reads a manifest and refuses one whose own hash is wrong.
    pub(super) fn load(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(Error::io("read", &path))?;
        Self::parse(&bytes).map_err(|defect| defect.in_file(name).into())
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, Defect> {
        let unreadable = |reason: &str| Defect::Unreadable(reason.to_owned());
        let text = std::str::from_utf8(bytes).map_err(|_| unreadable("it is not text"))?;
        let at = text
            .rfind(HASH_KEY)
            .ok_or_else(|| unreadable("it has no hash of its own"))?;
        let (before, after) = text.split_at(at + HASH_KEY.len());
        let zeros = blake3::Hash::from_bytes([0; 32]).to_hex();
        let (stated, rest) = after
            .split_at_checked(zeros.len())
            .ok_or_else(|| unreadable("it is cut short"))?;
        let mut hasher = blake3::Hasher::new();
        for part in [before, zeros.as_str(), rest] {
            hasher.update(part.as_bytes());
        }
        if hasher.finalize().to_hex().as_str() != stated {
            return Err(Defect::Checksum);
        }
        let manifest: Self =
            serde_json::from_str(text).map_err(|error| unreadable(&error.to_string()))?;
        if manifest.version != VERSION {
            return Err(unreadable("it is of a version that is not known"));
        }
        manifest.check().map_err(unreadable)?;
        Ok(manifest)
    }

    /// The hash proves that nobody changed it by accident, not that nobody made it up.
    fn check(&self) -> std::result::Result<(), &'static str> {
        for entry in &self.disks {
            let backing = entry.backing.as_ref().map(|backing| &backing.path);
            let mut names = [&entry.path, &entry.hashes].into_iter().chain(backing);
            if !names.all(|name| is_plain(name)) {
                return Err("it names a file outside its directory");
            }
            if !entry.block_size.is_power_of_two() || !(512..=2 << 20).contains(&entry.block_size) {
                return Err("its block size cannot be");
            }
            if (entry.mode == Mode::Incremental) != entry.backing.is_some() {
                return Err("its mode and its backing file contradict each other");
            }
        }
        Ok(())
    }
}

/// Whether a path is a single name.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_of_a_manifest_is_noticed() {
        let manifest = Manifest::new(Identity([7; 16]), Some("monday".to_owned()), 3);
        let text = manifest.to_text().unwrap();
        let read = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!((read.identity, read.sequence), (manifest.identity, 3));
        for index in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[index] ^= 1;
            assert!(Manifest::parse(&bytes).is_err(), "byte {index}");
        }
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["", ".", "..", "a/b", "/a", "a/", "./a"] {
            assert!(!is_plain(name), "{name:?}");
        }
        assert!(is_plain("monday.vda.qcow2"));
    }
}
