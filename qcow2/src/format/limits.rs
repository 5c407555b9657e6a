//! Limits on everything that an image can claim, and where each comes from.

/// Smallest cluster, as a power of two (format, section "Header": "not less than 9").
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster, as a power of two (QEMU's `MAX_CLUSTER_BITS`).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster of extended L2 entries, as a power of two (format, section "Extended L2
/// Entries": subclusters have at least 512 bytes).
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Widest refcount: 64 bits (format: "refcount_order ... may not exceed 6").
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Bytes of the active L1 table (QEMU's `QCOW_MAX_L1_SIZE`).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Bytes of the refcount table (QEMU's `QCOW_MAX_REFTABLE_SIZE`).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Internal snapshots (QEMU's `QCOW_MAX_SNAPSHOTS`).
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Bytes of the snapshot table (QEMU's `QCOW_MAX_SNAPSHOTS_SIZE`).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// Bytes of a snapshot's extra data (QEMU's `QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
pub const MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;
/// Bytes of the backing file name (format: "must be less than 1024").
pub const MAX_BACKING_NAME_BYTES: u32 = 1023;
/// Bytes of the LUKS header. QEMU sets no limit; with the longest keys it has 2 MiB.
pub const MAX_ENCRYPTION_HEADER_BYTES: u64 = 64 << 20;
/// Bitmaps of one image (QEMU's `QCOW2_MAX_BITMAPS`).
pub const MAX_BITMAPS: u32 = 65_535;
/// Bytes of the bitmap directory (QEMU's `QCOW2_MAX_BITMAP_DIRECTORY_SIZE`).
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 65_535 * 1024;
/// Serialized bytes of one bitmap (QEMU's `BME_MAX_PHYS_SIZE`).
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Bytes of a bitmap's name (QEMU's `BME_MAX_NAME_SIZE`).
pub const MAX_BITMAP_NAME_BYTES: usize = 1023;
/// Smallest granularity, as a power of two (QEMU's `BME_MIN_GRANULARITY_BITS`).
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// Largest granularity, as a power of two (QEMU's `BME_MAX_GRANULARITY_BITS`).
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// Host offsets have 56 bits (format: bits 9 to 55 of a table entry).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Largest virtual disk: what L1 at its limit maps with the largest clusters, bounded by `i64`.
pub const MAX_DISK_BYTES: u64 = 0x7fff_ffff_ffff_fe00;
/// Layers of a backing chain that are followed.
pub const MAX_BACKING_DEPTH: usize = 128;
