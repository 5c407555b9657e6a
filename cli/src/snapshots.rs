//! Internal snapshots as `qemu-img` shows them.

use serde_json::{Map, Value, json};
use tidemark_qcow2::SnapshotInfo;

use crate::answer::date;
use crate::exit::Outcome;
use crate::out::{Out, say};
use crate::size::human;

const NANOSECONDS: u64 = 1_000_000_000;

/// As `qemu-img info` has it.
pub(crate) fn to_json(snapshot: &SnapshotInfo) -> Value {
    let mut object = Map::new();
    if let Some(count) = snapshot.instruction_count {
        object.insert("icount".into(), count.into());
    }
    let clock = snapshot.vm_clock;
    object.insert("vm-clock-nsec".into(), (clock % NANOSECONDS).into());
    object.insert("name".into(), json!(snapshot.name));
    object.insert("date-sec".into(), snapshot.seconds.into());
    object.insert("date-nsec".into(), snapshot.nanoseconds.into());
    object.insert("vm-clock-sec".into(), (clock / NANOSECONDS).into());
    object.insert("id".into(), json!(snapshot.id));
    object.insert("vm-state-size".into(), snapshot.vm_state_bytes.into());
    Value::Object(object)
}

/// The table for people; nothing without snapshots.
pub(crate) fn print(out: &mut Out, snapshots: &[SnapshotInfo]) -> Outcome<()> {
    if snapshots.is_empty() {
        return Ok(());
    }
    say!(out, "Snapshot list:")?;
    say!(
        out,
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
    )?;
    for snapshot in snapshots {
        let seconds = snapshot.vm_clock / NANOSECONDS;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            snapshot.vm_clock / 1_000_000 % 1000
        );
        let (id, name) = (&snapshot.id, &snapshot.name);
        let state = human(snapshot.vm_state_bytes);
        let date = date(snapshot.seconds.into());
        let icount = snapshot
            .instruction_count
            .map_or_else(|| "--".to_owned(), |count| count.to_string());
        say!(
            out,
            "{id:<7} {name:<16} {state:>8} {date:>19} {clock:>15} {icount:>10}"
        )?;
    }
    Ok(())
}
