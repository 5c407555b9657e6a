//! Internal snapshots as checkpoints of a kind of their own: moments that somebody wrote down in an
//! image without a thought of us. They have no identity, no parent and no descriptor.

use tidemark_qcow2::chain::Health;

use crate::view::{DiskView, View};
use crate::{
    CheckpointInfo, DiskChange, DiskDelta, DiskState, Domain, Error, Evidence, FullReason, Kind,
    Problem, Result, anchor,
};

impl Domain {
    /// What changed on each disk since the internal snapshot of this name or identifier, by the
    /// mapping tables: a superset, to the cluster, whoever wrote in between. A disk that does not
    /// have it is full.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when no disk has it; [`Error::Image`].
    pub fn changed_since_snapshot(&self, selector: &str) -> Result<Vec<DiskChange>> {
        let _turn = self.reading();
        let view = View::of_images(self)?;
        let mut found = false;
        let mut changes = Vec::new();
        for disk in &view.disks {
            let snapshots = disk.image.snapshots().map_err(Error::on(&disk.name))?;
            let has = snapshots
                .iter()
                .any(|snapshot| snapshot.name == selector || snapshot.id == selector);
            found |= has;
            let delta = match has {
                true => anchor::since_snapshot(&disk.image, selector)
                    .map(DiskDelta::Incremental)
                    .map_err(Error::on(&disk.name))?,
                false => DiskDelta::Full {
                    reason: FullReason::NotOnDisk,
                },
            };
            changes.push(DiskChange {
                disk: disk.name.clone(),
                image: disk.record.as_ref().map(|record| record.image),
                base: None,
                delta,
            });
        }
        match found {
            true => Ok(changes),
            false => Err(Error::NoSuchCheckpoint(selector.to_owned())),
        }
    }
}

/// Adds a disk's snapshots to what was rebuilt. Those of one name on several disks are one moment.
pub(crate) fn add(
    checkpoints: &mut Vec<CheckpointInfo>,
    problems: &mut Vec<Problem>,
    disk: &DiskView,
) -> Result<()> {
    let snapshots = match disk.image.snapshots() {
        Ok(snapshots) => snapshots,
        Err(tidemark_qcow2::Error::Corrupt { .. }) => {
            let disk = disk.name.clone();
            problems.push(Problem::SnapshotsUnreadable { disk });
            return Ok(());
        }
        Err(error) => return Err(Error::on(&disk.name)(error)),
    };
    for snapshot in snapshots {
        if anchor::is_anchor(&snapshot.name) {
            continue;
        }
        let changed = match anchor::since_snapshot(&disk.image, &snapshot.id) {
            Ok(changed) => Some(changed.dirty_bytes()),
            Err(tidemark_qcow2::Error::Corrupt { .. }) => None,
            Err(error) => return Err(Error::on(&disk.name)(error)),
        };
        let state = DiskState {
            disk: disk.name.clone(),
            health: if changed.is_some() {
                Health::Ok
            } else {
                Health::Lost
            },
            inferred: false,
            evidence: Evidence::Mapping,
            recording: false,
            dirty_bytes: changed,
        };
        let same = checkpoints.iter_mut().find(|info| {
            let is_same = info.kind == Kind::Snapshot && info.name == snapshot.name;
            is_same && info.disks.iter().all(|known| known.disk != disk.name)
        });
        match same {
            Some(info) => info.disks.push(state),
            None => checkpoints.push(CheckpointInfo {
                name: snapshot.name,
                kind: Kind::Snapshot,
                identity: None,
                parent: None,
                current: false,
                metadata: false,
                created: Some(u64::from(snapshot.seconds)),
                description: None,
                disks: vec![state],
            }),
        }
    }
    Ok(())
}
