//! Filling lost bitmaps by comparing disks with what they held at an earlier checkpoint.

use std::path::Path;

use tidemark_checkpoint::Domain;
use tidemark_checkpoint::backup::{Filled, catalogue, fill, fill_from_image};

use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Gates, Share};

/// Fills what the backups of a directory can fill; of them only hashes are read.
pub(super) fn directory(domain: &Domain, directory: &Path) -> Outcome<Vec<Filled>> {
    // A directory that is not there has no backups, which is not what was asked for.
    std::fs::metadata(directory).map_err(|error| Failure::io(directory, "open", &error))?;
    let catalogue = catalogue(directory)?;
    if let Some(finding) = catalogue.damaged().first() {
        let directory = directory.display();
        return Err(Failure::with(
            Exit::Damage,
            format!("{directory}: {finding}; no comparison was made"),
        ));
    }
    Ok(fill(domain, &catalogue)?)
}

/// Fills from an image of the disk as it was at a checkpoint: `CHECKPOINT=IMAGE`.
pub(super) fn image(domain: &Domain, wanted: &str, gates: &Gates) -> Outcome<Vec<Filled>> {
    let Some((checkpoint, path)) = wanted.split_once('=') else {
        return Err(Failure::usage(format!(
            "--against-image takes CHECKPOINT=IMAGE, not '{wanted}'"
        )));
    };
    let [disk] = domain.disks() else {
        return Err(Failure::usage(
            "--against-image compares one disk: name one at a time",
        ));
    };
    let then = gates.read(Path::new(path), Share::default())?;
    Ok(fill_from_image(domain, &disk.name, checkpoint, &then)?)
}
