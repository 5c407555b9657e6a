//! Taking a snapshot: the disk as it is gets a second L1 table, and every cluster another count.

use std::time::{SystemTime, UNIX_EPOCH};

use super::SnapshotInfo;
use super::table::{self, Entry};
use crate::convert::{low_u32, to_u32, to_u64};
use crate::error::{Feature, Mistake, Result};
use crate::format::snapshot::{CREATED_EXTRA_BYTES, Snapshot};
use crate::image::{ADD, Image, NextMapping, Update};
use crate::units::HostOffset;

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
        self.remap(|update, next| take(update, next, name))
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

fn new_snapshot(name: &str, entries: &[Entry], image: &Image) -> Snapshot {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let known = entries.iter().map(|entry| number(&entry.snapshot.id));
    Snapshot {
        l1_offset: HostOffset::ZERO,
        l1_entries: 0,
        id: known
            .max()
            .unwrap_or(0)
            .saturating_add(1)
            .to_string()
            .into_bytes(),
        name: name.as_bytes().to_vec(),
        seconds: low_u32(now.as_secs()),
        nanoseconds: now.subsec_nanos(),
        vm_clock: 0,
        vm_state_bytes: 0,
        disk_bytes: Some(image.size()),
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

fn take(update: &mut Update<'_>, next: &mut NextMapping<'_>, name: &str) -> Result<SnapshotInfo> {
    let image = next.image();
    let present = table::present(next)?;
    let mut snapshot = new_snapshot(name, &present, image);
    let with = |snapshot: &Snapshot| {
        let new = Entry::new(snapshot.clone());
        present.iter().cloned().chain([new]).collect::<Vec<_>>()
    };
    table::check_limits(image.file(), &with(&snapshot))?;
    next.count_below(next.l1(), ADD)?;
    // Both L1 tables will name those that get a new place.
    next.flag_tables(2)?;
    snapshot.l1_offset = next.write_l1()?;
    snapshot.l1_entries = to_u32(to_u64(next.l1().len()));
    table::replace(update, next, &present, &with(&snapshot))?;
    Ok(SnapshotInfo::new(&snapshot, image.size()))
}
