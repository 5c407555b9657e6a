//! Refcount blocks: entries of 1 to 64 bits (format, section "Host cluster management").

use bitvec::field::BitField;
use bitvec::order::Lsb0;
use bitvec::view::BitView;
use byteorder::{BigEndian, ByteOrder};

use super::limits;
use super::table::OFFSET_MASK;
use crate::error::Damage;
use crate::geometry::Geometry;
use crate::units::HostOffset;

/// Count number `index` of a refcount block. Entries narrower than a byte fill it from the least
/// significant bit; wider ones are big endian.
pub fn count(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let bits = 1 << order;
            block.view_bits::<Lsb0>()[index * bits..(index + 1) * bits]
                .load_le::<u8>()
                .into()
        }
        3 => block[index].into(),
        4 => BigEndian::read_u16(&block[index * 2..]).into(),
        5 => BigEndian::read_u32(&block[index * 4..]).into(),
        _ => BigEndian::read_u64(&block[index * 8..]),
    }
}

/// Sets count number `index` of a refcount block; `value` must fit into the width.
pub fn set_count(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let field = &mut block.view_bits_mut::<Lsb0>()[index * bits..(index + 1) * bits];
            field.store_le(crate::convert::low_byte(value));
        }
        3 => block[index] = crate::convert::low_byte(value),
        4 => BigEndian::write_uint(&mut block[index * 2..], value, 2),
        5 => BigEndian::write_uint(&mut block[index * 4..], value, 4),
        _ => BigEndian::write_u64(&mut block[index * 8..], value),
    }
}

/// Offset of the refcount block that entry `index` of the refcount table names, if any.
///
/// # Errors
/// A block that is not cluster aligned or lies beyond what the format can address.
pub fn block_offset(
    entry: u64,
    index: u64,
    geometry: &Geometry,
) -> Result<Option<HostOffset>, Damage> {
    // Bits 0 to 8 are reserved; bits 56 to 63 belong to the offset here, and must be zero.
    let offset = HostOffset(entry & (OFFSET_MASK | !(limits::MAX_HOST_OFFSET - 1)));
    let problem = if offset.0 >= limits::MAX_HOST_OFFSET {
        "the refcount block lies beyond 2^56"
    } else if !geometry.is_aligned(offset) {
        "the refcount block is not cluster aligned"
    } else {
        return Ok((offset != HostOffset::ZERO).then_some(offset));
    };
    Err(Damage::Entry {
        table: "refcount table",
        index,
        entry,
        problem,
    })
}
