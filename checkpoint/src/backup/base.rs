//! Full or incremental: decided for each disk alone.

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::Image;
use tidemark_qcow2::chain::{Identity, ImageUuid, Reading};

use super::catalogue::{Catalogue, Link};
use super::manifest::Backing;
use super::{Error, Result};
use crate::{DiskChange, DiskDelta};

/// Targets in one backing chain: as many as the engine opens.
const MAX_LINKS: usize = 127;

/// How one disk is copied.
#[derive(Debug)]
pub(super) enum Plan {
    /// All of it, with the reason if an increment was asked for.
    Full(Option<String>),
    /// What changed since the target that is below.
    Incremental {
        /// That target.
        backing: Backing,
        /// What changed.
        changed: Bitmap,
    },
}

impl Plan {
    /// Decides for the disk of `image`. An image that counts its changes from a moment that this
    /// directory does not hold is full.
    pub(super) fn choose(
        catalogue: &Catalogue,
        image: &Image,
        change: Option<DiskChange>,
    ) -> Result<Self> {
        let full = |reason: String| Ok(Self::Full(Some(reason)));
        let Some(change) = change else {
            return Ok(Self::Full(None));
        };
        let changed = match change.delta {
            DiskDelta::Incremental(bits) => bits,
            DiskDelta::Full { reason } => return full(reason.to_string()),
        };
        let Some((identity, name)) = change.base else {
            return full("nothing tells which checkpoint its bitmap counts from".to_owned());
        };
        let link = match find_base(catalogue, image, &change.disk, identity, &name) {
            Ok(link) => link,
            Err(reason) => return full(reason),
        };
        match catalogue.chain(link) {
            Ok(links) if links.len() >= MAX_LINKS => {
                return full(format!("{MAX_LINKS} backups build on each other already"));
            }
            Ok(_) => {}
            Err(Error::Damaged(finding)) => {
                return full(format!(
                    "the backup of checkpoint '{name}' is damaged: {finding}"
                ));
            }
            Err(error) => return Err(error),
        }
        let backing = Backing {
            identity,
            path: link.entry.path.clone(),
            format: link.entry.format,
        };
        let changed = match changed.shape().disk_bytes() == image.size() {
            true => changed,
            false => changed
                .resize(image.size(), true)
                .map_err(crate::Error::from)?,
        };
        Ok(Self::Incremental { backing, changed })
    }
}

/// The backup of a disk at a checkpoint, or why there is none.
fn find_base<'a>(
    catalogue: &'a Catalogue,
    image: &Image,
    disk: &str,
    identity: Identity,
    name: &str,
) -> std::result::Result<Link<'a>, String> {
    let Some(point) = catalogue.point(identity) else {
        return Err(format!("there is no backup of checkpoint '{name}' here"));
    };
    let Some(entry) = point.disk(disk) else {
        return Err(format!(
            "the backup of checkpoint '{name}' has no such disk"
        ));
    };
    let ours = entry.image.is_some_and(|of| is_or_was(image, of));
    if !ours {
        return Err(format!(
            "the backup of checkpoint '{name}' is of another image"
        ));
    }
    Ok(Link { point, entry })
}

/// Whether an image is the one of that UUID, or was restored from it.
fn is_or_was(image: &Image, uuid: ImageUuid) -> bool {
    match image.chain() {
        Reading::Current(record) => {
            record.image == uuid || record.descents.iter().any(|descent| descent.image == uuid)
        }
        Reading::Absent | Reading::Stale(_) | Reading::Damaged => false,
    }
}
