//! Entries of the snapshot table (format, section "Snapshots").

use byteorder::{BigEndian, ByteOrder};

use super::limits;
use crate::convert::{index, to_u16, to_u64};
use crate::error::Damage;
use crate::units::HostOffset;

/// Bytes of an entry before its extra data.
pub const HEAD_BYTES: usize = 40;
/// Extra data that version 3 asks for: bytes of the VM state and of the disk.
pub const REQUIRED_EXTRA_BYTES: u32 = 16;
/// Extra data of an entry of ours, as QEMU writes it: with the count of instructions.
pub const CREATED_EXTRA_BYTES: u32 = 24;

/// One internal snapshot.
///
/// | bytes | field |
/// |---|---|
/// | 0..8 | l1_offset |
/// | 8..12 | l1_entries |
/// | 12..14 | bytes of the identifier |
/// | 14..16 | bytes of the name |
/// | 16..20 | seconds |
/// | 20..24 | nanoseconds |
/// | 24..32 | vm_clock, nanoseconds |
/// | 32..36 | bytes of the VM state, when the extra data does not say |
/// | 36..40 | extra_bytes |
/// | 40.. | extra data: vm_state_bytes (8), disk_bytes (8), instruction_count (8), unknown |
/// | .. | identifier, name, padding to 8 |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Host offset of the snapshot's L1 table; aligned only in a healthy image.
    pub l1_offset: HostOffset,
    /// Entries of that table; as many as the image claims.
    pub l1_entries: u32,
    /// Identifier, decimal digits in images made by QEMU; not necessarily UTF-8.
    pub id: Vec<u8>,
    /// Name, not necessarily UTF-8 or unique.
    pub name: Vec<u8>,
    /// When it was taken, seconds since the epoch.
    pub seconds: u32,
    /// Nanoseconds within that second.
    pub nanoseconds: u32,
    /// Time the virtual machine had run, nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state stored behind the end of the disk.
    pub vm_state_bytes: u64,
    /// Virtual size of the disk at that moment, where the entry says.
    pub disk_bytes: Option<u64>,
    /// Instructions executed so far, where the entry says.
    pub instruction_count: Option<u64>,
    /// Bytes of extra data; version 3 asks for at least [`REQUIRED_EXTRA_BYTES`].
    pub extra_bytes: u32,
}

impl Snapshot {
    /// Bytes of entry `number`, whose first bytes are `head`, with its padding.
    ///
    /// # Errors
    /// More extra data than QEMU accepts.
    pub fn span(head: &[u8; HEAD_BYTES], number: u64) -> Result<usize, Damage> {
        let extra = BigEndian::read_u32(&head[36..40]);
        if extra > limits::MAX_SNAPSHOT_EXTRA_BYTES {
            return Err(Damage::Entry {
                table: "snapshot table",
                index: number,
                entry: extra.into(),
                problem: "it has more than 1024 bytes of extra data",
            });
        }
        let id = usize::from(BigEndian::read_u16(&head[12..14]));
        let name = usize::from(BigEndian::read_u16(&head[14..16]));
        Ok((HEAD_BYTES + index(extra) + id + name).next_multiple_of(8))
    }

    /// Decodes entry `number` from its bytes.
    ///
    /// # Errors
    /// An entry that is cut short, or whose extra data is too long.
    pub fn decode(bytes: &[u8], number: u64) -> Result<Self, Damage> {
        let short = || Damage::Truncated {
            structure: "snapshot table",
        };
        let head: &[u8; HEAD_BYTES] = bytes.first_chunk().ok_or_else(short)?;
        Self::span(head, number)?;
        let extra_bytes = BigEndian::read_u32(&head[36..40]);
        let rest = bytes.get(HEAD_BYTES..).unwrap_or_default();
        let (extra, rest) = rest
            .split_at_checked(index(extra_bytes))
            .ok_or_else(short)?;
        let (id, rest) = rest
            .split_at_checked(BigEndian::read_u16(&head[12..14]).into())
            .ok_or_else(short)?;
        let name = rest
            .get(..BigEndian::read_u16(&head[14..16]).into())
            .ok_or_else(short)?;
        let number_at = |at: usize| {
            let field = extra.get(at..)?.first_chunk::<8>()?;
            Some(u64::from_be_bytes(*field))
        };
        let short_state = BigEndian::read_u32(&head[32..36]);
        Ok(Self {
            l1_offset: HostOffset(BigEndian::read_u64(&head[..8])),
            l1_entries: BigEndian::read_u32(&head[8..12]),
            id: id.to_vec(),
            name: name.to_vec(),
            seconds: BigEndian::read_u32(&head[16..20]),
            nanoseconds: BigEndian::read_u32(&head[20..24]),
            vm_clock: BigEndian::read_u64(&head[24..32]),
            vm_state_bytes: number_at(0).unwrap_or(short_state.into()),
            disk_bytes: number_at(8),
            instruction_count: number_at(16),
            extra_bytes,
        })
    }

    /// The entry's bytes with their padding, with [`CREATED_EXTRA_BYTES`] of extra data. Identifier
    /// and name have less than 64 KiB each.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_BYTES];
        BigEndian::write_u64(&mut bytes[..8], self.l1_offset.0);
        BigEndian::write_u32(&mut bytes[8..12], self.l1_entries);
        BigEndian::write_u16(&mut bytes[12..14], to_u16(self.id.len()));
        BigEndian::write_u16(&mut bytes[14..16], to_u16(self.name.len()));
        BigEndian::write_u32(&mut bytes[16..20], self.seconds);
        BigEndian::write_u32(&mut bytes[20..24], self.nanoseconds);
        BigEndian::write_u64(&mut bytes[24..32], self.vm_clock);
        let short_state = u32::try_from(self.vm_state_bytes).unwrap_or(0);
        BigEndian::write_u32(&mut bytes[32..36], short_state);
        BigEndian::write_u32(&mut bytes[36..40], CREATED_EXTRA_BYTES);
        bytes.extend(self.vm_state_bytes.to_be_bytes());
        bytes.extend(self.disk_bytes.unwrap_or(0).to_be_bytes());
        bytes.extend(self.instruction_count.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Bytes of the snapshot's L1 table.
    pub fn l1_bytes(&self) -> u64 {
        to_u64(index(self.l1_entries)) * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(extra: u32, id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_BYTES];
        BigEndian::write_u64(&mut bytes[..8], 0x5_0000);
        BigEndian::write_u32(&mut bytes[8..12], 3);
        BigEndian::write_uint(&mut bytes[12..14], to_u64(id.len()), 2);
        BigEndian::write_uint(&mut bytes[14..16], to_u64(name.len()), 2);
        BigEndian::write_u32(&mut bytes[32..36], 77);
        BigEndian::write_u32(&mut bytes[36..40], extra);
        bytes.extend((0..extra).map(|at| if at % 8 == 7 { 9 } else { 0 }));
        bytes.extend_from_slice(id);
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn an_entry_reads_as_it_was_written() {
        let bytes = entry(24, b"1", b"before the upgrade");
        let snapshot = Snapshot::decode(&bytes, 0).expect("a sound entry");
        assert_eq!(snapshot.l1_offset, HostOffset(0x5_0000));
        assert_eq!(snapshot.l1_bytes(), 24);
        assert_eq!(snapshot.id, b"1");
        assert_eq!(snapshot.name, b"before the upgrade");
        assert_eq!(snapshot.vm_state_bytes, 9);
        assert_eq!(snapshot.disk_bytes, Some(9));
        assert_eq!(snapshot.instruction_count, Some(9));
        let head = bytes.first_chunk().expect("an entry has a head");
        assert_eq!(Snapshot::span(head, 0), Ok(bytes.len()));
    }

    #[test]
    fn an_entry_of_ours_reads_back() {
        let snapshot = Snapshot {
            l1_offset: HostOffset(0x7_0000),
            l1_entries: 12,
            id: b"34".to_vec(),
            name: "caf\u{e9}".as_bytes().to_vec(),
            seconds: 1,
            nanoseconds: 2,
            vm_clock: 3,
            vm_state_bytes: 4,
            disk_bytes: Some(5),
            instruction_count: Some(6),
            extra_bytes: CREATED_EXTRA_BYTES,
        };
        let bytes = snapshot.encode();
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(Snapshot::decode(&bytes, 0), Ok(snapshot));
    }

    #[test]
    fn without_extra_data_the_short_field_counts() {
        let snapshot = Snapshot::decode(&entry(0, b"", b""), 0).expect("a sound entry");
        assert_eq!((snapshot.vm_state_bytes, snapshot.disk_bytes), (77, None));
    }

    #[test]
    fn an_entry_cut_anywhere_is_refused() {
        let bytes = entry(16, b"12", b"name");
        for end in 0..HEAD_BYTES + 16 + 2 + 4 {
            assert!(Snapshot::decode(&bytes[..end], 0).is_err(), "{end}");
        }
    }

    #[test]
    fn too_much_extra_data_is_refused_before_it_is_read() {
        let mut bytes = entry(0, b"", b"");
        BigEndian::write_u32(&mut bytes[36..40], u32::MAX);
        assert!(Snapshot::decode(&bytes, 5).is_err());
    }
}
