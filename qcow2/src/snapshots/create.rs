//! Taking a snapshot: the disk as it is gets a second L1 table, and every cluster another count.

use std::time::{SystemTime, UNIX_EPOCH};

use super::SnapshotInfo;
use super::change::{ADD, Change};
use super::table::Entry;
use crate::convert::{low_u32, to_u32, to_u64};
use crate::error::{Feature, Mistake, Result};
use crate::format::snapshot::{CREATED_EXTRA_BYTES, Snapshot};
use crate::image::{Image, Update};

/// Bytes of a name that every version of QEMU shows whole.
const MAX_NAME_BYTES: usize = 255;

impl Image {
    /// Takes a snapshot of the disk as it is. Its identifier is one more than the greatest there
    /// is; names may repeat.
    ///
    /// Guest writes wait for as long as the mapping tables take to be read and, as far as they
    /// held clusters alone, to be written again.
    ///
    /// # Errors
    /// A name that is too long; an image with an external data file; refcounts that cannot count
    /// one reference more, or no room for the table, all of them before the first write; I/O.
    pub fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        self.check_snapshots_possible(name)?;
        self.change_snapshots(|update, change| {
            let mut snapshot = new_snapshot(name, change);
            snapshot.disk_bytes = Some(self.size());
            take(self, update, change, snapshot)
        })
    }

    fn check_snapshots_possible(&self, name: &str) -> Result<()> {
        self.check_writable()?;
        if name.len() > MAX_NAME_BYTES || name.contains('\0') {
            return Err(self.file().invalid(Mistake::Option {
                option: "snapshot name",
                problem: "has more than 255 bytes or a NUL byte",
            }));
        }
        if self.geometry().external_data {
            return Err(self.file().unsupported(Feature::SnapshotOfDataFile));
        }
        let limit = self.geometry().refcount_max();
        if limit < 2 {
            let what = "references to one host cluster";
            let value = 2;
            return Err(self
                .file()
                .unsupported(Feature::Limit { what, value, limit }));
        }
        Ok(())
    }
}

fn new_snapshot(name: &str, change: &Change<'_>) -> Snapshot {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let known = change.entries.iter().map(|entry| &entry.snapshot.id);
    let greatest = known.map(|id| number(id)).max().unwrap_or(0);
    Snapshot {
        l1_offset: change.header().l1_offset,
        l1_entries: change.header().l1_entries,
        id: greatest.saturating_add(1).to_string().into_bytes(),
        name: name.as_bytes().to_vec(),
        seconds: low_u32(now.as_secs()),
        nanoseconds: now.subsec_nanos(),
        vm_clock: 0,
        vm_state_bytes: 0,
        disk_bytes: None,
        instruction_count: Some(0),
        extra_bytes: CREATED_EXTRA_BYTES,
    }
}

/// The number that an identifier begins with.
fn number(id: &[u8]) -> u64 {
    id.iter()
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0, |number: u64, byte| {
            number
                .saturating_mul(10)
                .saturating_add(u64::from(byte - b'0'))
        })
}

fn take(
    image: &Image,
    update: &mut Update<'_>,
    change: &mut Change<'_>,
    mut snapshot: Snapshot,
) -> Result<SnapshotInfo> {
    let mut entries = change.entries.clone();
    entries.push(Entry::new(snapshot.clone()));
    change.check_table(&entries)?;
    let mut l1 = image.l1_words();
    change.count_below(&l1, ADD)?;
    let renewed = change.tables_to_renew(&l1)?;
    // Both L1 tables will name the renewed ones.
    change.drop_tables(&l1, &renewed, 2)?;
    change.renew_tables(&mut l1, &renewed, 2)?;
    change.flag_l1(&mut l1)?;
    snapshot.l1_offset = change.write_l1(&l1)?;
    snapshot.l1_entries = to_u32(to_u64(l1.len()));
    change.set_active(update, l1)?;
    entries.pop();
    entries.push(Entry::new(snapshot.clone()));
    change.set_table(update, &entries)?;
    update.commit_next_counts();
    Ok(SnapshotInfo::new(&snapshot, image.size()))
}
