//! The bodies of the fuzz targets: what each checks, callable from a plain test.
//!
//! None may panic, hang, or use memory beyond the input's order of magnitude. Beyond that each
//! says below what must hold. They do not check that what is accepted is what QEMU accepts; that is
//! the business of the interop tests.

mod bounded;
mod damage;
mod input;
mod nbd;
mod operations;
mod repair;

pub use damage::{damage_of, damaged, no_guest_data_on_metadata, with_guest_data_on_a_table};
pub use nbd::nbd;
pub use operations::{operations, operations_with};
pub use repair::{repair, repair_image};
use tidemark_qcow2::chain::{self, ChainRecord, Detail, Reading};
use tidemark_qcow2::format::bitmap::{
    decode_directory, decode_table, encode_directory, encode_table,
};
use tidemark_qcow2::format::extension;
use tidemark_qcow2::format::header::Header;
use tidemark_qcow2::geometry::Geometry;
use tidemark_qcow2::{Image, OpenOptions};

use crate::bounded::Bounded;

const GEOMETRY: Geometry = Geometry {
    cluster_bits: 9,
    refcount_order: 4,
    version: 3,
    extended_l2: false,
    external_data: false,
};
/// Guest bytes that one input may make the engine read.
const MAX_GUEST_BYTES: u64 = 4 << 20;

/// A header that is accepted is written back to the same bytes, and its extensions can be listed.
pub fn header(data: &[u8]) {
    let Ok(header) = Header::from_bytes(data) else {
        return;
    };
    let mut copy = data.to_vec();
    header.write(&mut copy);
    assert_eq!(
        Header::from_bytes(&copy).as_ref(),
        Ok(&header),
        "header bytes and value disagree"
    );
    if let Ok((list, end)) = extension::parse(&header, data) {
        assert!(end <= data.len().max(header.length));
        assert!(
            list.iter()
                .all(|entry| entry.data_offset + entry.data.len() <= data.len())
        );
    }
}

/// A directory that is accepted is written back to the same entries.
pub fn directory(data: &[u8]) {
    let Some((&count, bytes)) = data.split_first() else {
        return;
    };
    let Ok(entries) = decode_directory(bytes, count.into(), &GEOMETRY) else {
        return;
    };
    let again = decode_directory(&encode_directory(&entries), count.into(), &GEOMETRY);
    assert_eq!(
        again.as_ref(),
        Ok(&entries),
        "directory bytes and entries disagree"
    );
}

/// A bitmap table that is accepted is written back to the same bytes.
pub fn table(data: &[u8]) {
    let Ok(entries) = decode_table(data, &GEOMETRY) else {
        return;
    };
    let whole = data.len() / 8 * 8;
    assert_eq!(Some(encode_table(&entries).as_slice()), data.get(..whole));
}

/// A chain record that is accepted survives a round trip at full detail.
pub fn chain(data: &[u8]) {
    let records = [
        match chain::read(data) {
            Reading::Current(record) | Reading::Stale(record) => Some(record),
            Reading::Absent | Reading::Damaged => None,
        },
        ChainRecord::decode_slot(data).map(|(_, record)| record),
        // Random bytes never have the right CRC: give the rest of the decoder its chance.
        ChainRecord::decode_slot(&framed(data)).map(|(_, record)| record),
    ];
    for record in records.into_iter().flatten() {
        let again = ChainRecord::decode_slot(&record.encode_slot(7, Detail::Full));
        assert_eq!(again, Some((7, record)), "record bytes and value disagree");
    }
}

/// The bytes as a slot with a right length and CRC.
pub fn framed(record: &[u8]) -> Vec<u8> {
    let mut slot = Vec::new();
    let length = u32::try_from(record.len() + 12).unwrap_or(u32::MAX);
    slot.extend_from_slice(&length.to_be_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(record);
    let crc = crc32fast::hash(&slot);
    slot.extend_from_slice(&crc.to_be_bytes());
    slot
}

/// An image that opens is read, mapped, checked and asked for its bitmaps without being changed;
/// opened for writing, a write either fails or is read back.
pub fn open(data: &[u8]) {
    let storage = || Box::new(Bounded::new(data));
    if let Ok(image) = Image::open(storage(), OpenOptions::default()) {
        let len = image.size().min(MAX_GUEST_BYTES);
        let mut guest = vec![0; usize::try_from(len).unwrap_or_default()];
        let _ = image.read(&mut guest, 0);
        let _ = image.map(0, len);
        let _ = image.check();
        for info in image.bitmaps().unwrap_or_default() {
            let _ = image.load_bitmap(&info.name);
        }
        if let Reading::Current(record) = image.chain() {
            record
                .checkpoints
                .iter()
                .for_each(|entry| drop(image.judge(entry)));
        }
    }
    let writing = OpenOptions {
        writable: true,
        ..OpenOptions::default()
    };
    if let Ok(image) = Image::open(storage(), writing) {
        let bytes = [0x5a; 700];
        let at = image.size() / 2;
        if at + 700 <= image.size() && image.write(&bytes, at).is_ok() {
            let mut back = [0; 700];
            if image.read(&mut back, at).is_ok() {
                assert_eq!(back, bytes, "a write was not read back");
            }
            let _ = image.close();
        }
    }
}
