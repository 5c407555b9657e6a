//! The header of an encrypted image, as far as `info` tells it. No key is ever touched.
//!
//! LUKS on-disk format, version 1; all integers are big endian.

use serde_json::{Map, Value, json};

/// Bytes of the header: fixed fields and eight key slots.
pub(crate) const BYTES: u64 = 592;
const MAGIC: &[u8] = b"LUKS\xba\xbe";
const SECTOR: u64 = 512;
const SLOTS: usize = 8;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const ACTIVE: u64 = 0x00ac_71f3;

/// The object that `qemu-img info` prints under `encrypt`; `None` if this is no such header.
pub(crate) fn describe(header: &[u8]) -> Option<Value> {
    if header.get(..6)? != MAGIC {
        return None;
    }
    let mode = text(header, 40..72)?;
    let (mode, ivgen) = mode.split_once('-')?;
    let (ivgen, ivgen_hash) = match ivgen.split_once(':') {
        Some((ivgen, hash)) => (ivgen, Some(hash)),
        None => (ivgen, None),
    };
    let mut answer = Map::new();
    answer.insert("ivgen-alg".into(), json!(ivgen));
    if let Some(hash) = ivgen_hash {
        answer.insert("ivgen-hash-alg".into(), json!(hash));
    }
    answer.insert("detached-header".into(), json!(false));
    answer.insert("hash-alg".into(), json!(text(header, 72..104)?));
    // XTS has two keys of the cipher's length.
    let keys = if mode == "xts" { 2 } else { 1 };
    let bits = number(header, 108)? * 8 / keys;
    answer.insert(
        "cipher-alg".into(),
        json!(format!("{}-{bits}", text(header, 8..40)?)),
    );
    answer.insert("uuid".into(), json!(text(header, 168..208)?));
    answer.insert("format".into(), json!("luks"));
    answer.insert("cipher-mode".into(), json!(mode));
    let slots: Option<Vec<Value>> = (0..SLOTS)
        .map(|slot| describe_slot(header, SLOTS_AT + slot * SLOT_BYTES))
        .collect();
    answer.insert("slots".into(), Value::Array(slots?));
    answer.insert(
        "payload-offset".into(),
        json!(number(header, 104)? * SECTOR),
    );
    answer.insert("master-key-iters".into(), json!(number(header, 164)?));
    Some(Value::Object(answer))
}

fn describe_slot(header: &[u8], at: usize) -> Option<Value> {
    let offset = number(header, at + 40)? * SECTOR;
    if number(header, at)? != ACTIVE {
        return Some(json!({ "active": false, "key-offset": offset }));
    }
    Some(json!({
        "active": true,
        "iters": number(header, at + 4)?,
        "key-offset": offset,
        "stripes": number(header, at + 44)?,
    }))
}

fn number(header: &[u8], at: usize) -> Option<u64> {
    let bytes: &[u8; 4] = header.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes).into())
}

fn text(header: &[u8], at: std::ops::Range<usize>) -> Option<String> {
    let bytes = header.get(at)?;
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    Some(String::from_utf8_lossy(bytes.get(..end)?).into_owned())
}
