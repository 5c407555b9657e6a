//! The snapshot table, as far as a listing needs it (format, section "Snapshots").

use std::path::Path;

use serde_json::{Map, Value, json};
use tidemark_qcow2::format::header::Header;
use tidemark_qcow2::format::limits;
use tidemark_qcow2::{Damage, Error, FileStorage, Storage};

use crate::exit::{Failure, Outcome};

/// Bytes of an entry before extra data, id and name.
const ENTRY_BYTES: usize = 40;

/// One internal snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) id: String,
    pub(crate) name: String,
    /// Seconds since the epoch and nanoseconds.
    pub(crate) date: (u32, u32),
    /// Nanoseconds that the virtual machine had run.
    pub(crate) vm_clock: u64,
    /// Bytes of saved machine state.
    pub(crate) vm_state_bytes: u64,
    /// Executed instructions, when they were counted.
    pub(crate) icount: Option<u64>,
}

impl Snapshot {
    /// As `qemu-img info` has it.
    pub(crate) fn to_json(&self) -> Value {
        let mut object = Map::new();
        if let Some(icount) = self.icount {
            object.insert("icount".into(), icount.into());
        }
        object.insert(
            "vm-clock-nsec".into(),
            (self.vm_clock % 1_000_000_000).into(),
        );
        object.insert("name".into(), json!(self.name));
        object.insert("date-sec".into(), self.date.0.into());
        object.insert("date-nsec".into(), self.date.1.into());
        object.insert(
            "vm-clock-sec".into(),
            (self.vm_clock / 1_000_000_000).into(),
        );
        object.insert("id".into(), json!(self.id));
        object.insert("vm-state-size".into(), self.vm_state_bytes.into());
        Value::Object(object)
    }
}

/// Reads the table that `header` names.
pub(crate) fn read(path: &Path, storage: &FileStorage, header: &Header) -> Outcome<Vec<Snapshot>> {
    if header.snapshot_count == 0 {
        return Ok(Vec::new());
    }
    let failed = |error: std::io::Error| Failure::io(path, "read snapshot table", &error);
    let rest = storage
        .len()
        .map_err(failed)?
        .saturating_sub(header.snapshots_offset.0);
    let size = rest.min(limits::MAX_SNAPSHOT_TABLE_BYTES);
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    let count = storage
        .read_at(&mut bytes, header.snapshots_offset.0)
        .map_err(failed)?;
    bytes.truncate(count);
    let mut reader = Reader {
        bytes: &bytes,
        at: 0,
    };
    (0..header.snapshot_count)
        .map(|_| {
            reader.snapshot().ok_or_else(|| {
                let structure = "snapshot table";
                let image = path.display().to_string();
                Error::Corrupt {
                    image,
                    damage: Damage::Truncated { structure },
                }
                .into()
            })
        })
        .collect()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(len)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn snapshot(&mut self) -> Option<Snapshot> {
        let fixed = self.take(ENTRY_BYTES)?;
        let extra = self.take(usize::try_from(number(fixed, 36..40)?).ok()?)?;
        let id = self.take(usize::try_from(number(fixed, 12..14)?).ok()?)?;
        let name = self.take(usize::try_from(number(fixed, 14..16)?).ok()?)?;
        self.at = self.at.next_multiple_of(8);
        let narrow = |at: std::ops::Range<usize>| u32::try_from(number(fixed, at)?).ok();
        // The wide count in the extra data replaces the narrow one.
        let state = number(extra, 0..8).or_else(|| number(fixed, 32..36))?;
        Some(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date: (narrow(16..20)?, narrow(20..24)?),
            vm_clock: number(fixed, 24..32)?,
            vm_state_bytes: state,
            icount: number(extra, 16..24).filter(|&icount| icount != u64::MAX),
        })
    }
}

/// A big-endian number.
fn number(bytes: &[u8], at: std::ops::Range<usize>) -> Option<u64> {
    let digits = bytes.get(at)?;
    Some(
        digits
            .iter()
            .fold(0, |number, &byte| (number << 8) | u64::from(byte)),
    )
}
