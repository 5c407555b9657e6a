//! The chain record of one image as an answer.

use serde_json::{Value, json};
use tidemark_qcow2::format::bitmap::DirectoryEntry;
use tidemark_qcow2::format::chain::{ChainRecord, Health, Identity, Proof, Reading, Scheme};

use crate::facts::Facts;

pub(crate) use tidemark_qcow2::format::chain::CheckpointEntry as Entry;

/// Spelling of a scheme.
pub(crate) const fn scheme(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Intervals => "intervals",
        Scheme::Cumulative => "cumulative",
    }
}

/// Name of a checkpoint of the record.
pub(crate) fn name_of(record: &ChainRecord, identity: Option<Identity>) -> Option<&str> {
    let entry = record.checkpoint(identity?)?;
    Some(&entry.name)
}

/// What record and directory say of a checkpoint's bitmap, its bits unread.
pub(crate) fn recorded_state(entry: &Entry, bitmaps: &[DirectoryEntry]) -> Health {
    if !entry.health.is_usable() {
        return entry.health;
    }
    let found = bitmaps
        .iter()
        .find(|bitmap| bitmap.name == entry.name.as_bytes());
    match (found, &entry.proof) {
        (None, _) => Health::Missing,
        (Some(bitmap), _) if bitmap.in_use => Health::Inconsistent,
        (Some(bitmap), Proof::Recording(_)) if !bitmap.auto => Health::NotRecording,
        (Some(bitmap), Proof::Frozen(_)) if bitmap.granularity != entry.granularity => {
            Health::Changed
        }
        (Some(bitmap), _) if bitmap.granularity != entry.granularity => Health::Reset,
        _ => entry.health,
    }
}

/// The record, `null` where there is none.
pub(crate) fn describe(facts: &Facts) -> Value {
    let (state, record) = match &facts.chain {
        Reading::Absent => return Value::Null,
        Reading::Current(record) => ("current", Some(record)),
        Reading::Stale(record) => ("stale", Some(record)),
        Reading::Damaged => ("damaged", None),
    };
    let place = facts.chain_place();
    let checkpoints: Vec<Value> = record
        .into_iter()
        .flat_map(|record| record.checkpoints.iter().map(move |entry| (record, entry)))
        .map(|(record, entry)| describe_entry(record, entry, &facts.bitmaps))
        .collect();
    json!({
        "record": state,
        "extension-offset": place.map(|(offset, _)| offset),
        "extension-size": place.map(|(_, bytes)| bytes),
        "image-uuid": record.map(|record| record.image.to_string()),
        "scheme": record.map(|record| scheme(record.scheme)),
        "current": record.and_then(|record| name_of(record, record.current)),
        "pending": record.and_then(|record| record.intent.as_ref()).map(|intent| json!({
            "transaction": intent.transaction.to_string(),
            "checkpoint": record.and_then(|record| name_of(record, Some(intent.checkpoint))),
            "decider": intent.decider,
        })),
        "descents": record.map(|record| record.descents.iter().map(|descent| json!({
            "image-uuid": descent.image.to_string(),
            "checkpoint": descent.checkpoint.to_string(),
        })).collect::<Vec<_>>()),
        "checkpoints": checkpoints,
    })
}

fn describe_entry(record: &ChainRecord, entry: &Entry, bitmaps: &[DirectoryEntry]) -> Value {
    let (proof, granules) = match &entry.proof {
        Proof::None => (None, None),
        Proof::Frozen(proof) => (Some("frozen"), Some(proof.count)),
        Proof::Recording(proof) => (Some("recording"), Some(proof.count)),
    };
    json!({
        "name": entry.name,
        "identity": entry.identity.to_string(),
        "parent": name_of(record, entry.parent),
        "parent-identity": entry.parent.map(|parent| parent.to_string()),
        "current": record.current == Some(entry.identity),
        "creation-time": entry.created,
        "virtual-size": entry.disk_bytes,
        "granularity": entry.granularity.bytes(),
        "state": recorded_state(entry, bitmaps).as_str(),
        "proof": proof,
        "recorded-granules": granules,
    })
}
