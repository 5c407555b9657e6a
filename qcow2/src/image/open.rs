//! Opening: bytes are parsed, checked and refused; nothing is written.

use std::sync::Arc;
use std::time::Instant;

use super::backing::Layer;
use super::claims::Claims;
use super::data_file::{self, GuestData};
use super::expand::ExpandedClusters;
use super::file::ImageFile;
use super::first_cluster::FirstCluster;
use super::locks::{ClusterLocks, Entrance};
use super::{BackingReference, Gate, Image, NoFiles};
use crate::bitmaps::directory::Directory;
use crate::cache::TableCache;
use crate::check::{RepairReport, repair_dirty};
use crate::codec::CompressionType;
use crate::convert::{index, low_byte, to_usize};
use crate::error::{Damage, Feature, Result};
use crate::format::encryption::EncryptionHeader;
use crate::format::extension;
use crate::format::header::{Header, autoclear, incompatible};
use crate::format::table::L1Entry;
use crate::geometry::Geometry;
use crate::snapshots;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{Mutex, RwLock};
use crate::units::HostOffset;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whether guest writes and changes of bitmaps will be possible.
    pub writable: bool,
    /// Decides which files named inside the image are opened; starts from none.
    pub gate: Arc<dyn Gate>,
    /// Layers above this image in a backing chain.
    pub depth: usize,
    /// The layer of the chain that is opened for writing, too: 1 is the backing file, 2 the one
    /// below it, 0 none. The gate is asked for it with [`Gate::open_for_writing`].
    pub writable_layer: usize,
    /// Whether an image that was not closed cleanly (dirty bit) is repaired when it is opened for
    /// writing: refcounts and COPIED flags follow from its mapping. It is refused otherwise, and
    /// when anything else is wrong. [`Image::repaired_on_open`] tells what was done.
    pub repair_dirty: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            writable: false,
            gate: Arc::new(NoFiles),
            depth: 0,
            writable_layer: 0,
            repair_dirty: true,
        }
    }
}

impl OpenOptions {
    /// Read-only, with this gate.
    pub fn reading(gate: Arc<dyn Gate>) -> Self {
        Self {
            gate,
            ..Self::default()
        }
    }

    /// For writing, with this gate.
    pub fn writing(gate: Arc<dyn Gate>) -> Self {
        Self {
            writable: true,
            gate,
            ..Self::default()
        }
    }
}

/// Most bytes of the first cluster that are read before its size is known.
const FIRST_READ: usize = 64 << 10;

impl Image {
    /// Opens an existing image.
    ///
    /// An image with a backing file or an external data file opens it too, through the gate; when
    /// the gate refuses, opening fails.
    ///
    /// Opening for reading writes nothing. Opening for writing writes nothing either, but for the
    /// repair of an image that was not closed cleanly, see [`OpenOptions::repair_dirty`].
    ///
    /// # Errors
    /// Damage, features that are not handled (all of them before the first write), or I/O.
    pub fn open(storage: Box<dyn Storage>, options: OpenOptions) -> Result<Self> {
        let file = ImageFile::new(storage);
        let first = read_first_cluster(&file)?;
        let backing = match backing_reference(&first) {
            Some(reference) => Some(Layer::open(&reference, &file, &options)?),
            None => None,
        };
        let guest = GuestData::open(&first, &file, backing.as_ref(), &options)?;
        let repair = options.writable && options.repair_dirty;
        let (file, first, repaired) = clean(file, first, repair)?;
        let image = Self::assemble(file, first, backing, guest, options.writable)?;
        Ok(Self { repaired, ..image })
    }

    /// Opens an image without its backing file and its external data file, for questions about the
    /// image alone: its bitmaps, its chain record, its own mapping. Reading guest data that one of
    /// them would provide fails.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_unbacked(storage: Box<dyn Storage>, writable: bool) -> Result<Self> {
        let file = ImageFile::new(storage);
        let first = read_first_cluster(&file)?;
        let guest = GuestData::unopened(&first);
        let (file, first, repaired) = clean(file, first, writable)?;
        let image = Self::assemble(file, first, None, guest, writable)?;
        Ok(Self { repaired, ..image })
    }

    /// What opening put right, because the image was not closed cleanly.
    pub fn repaired_on_open(&self) -> Option<&RepairReport> {
        self.repaired.as_ref()
    }

    /// Opens an image whose bitmaps nobody else can open, to be repaired. It takes no guest write.
    pub(crate) fn open_for_repair(storage: Box<dyn Storage>) -> Result<Self> {
        let file = ImageFile::new(storage);
        let bytes = read_first_bytes(&file)?;
        let first = FirstCluster::parse_for_repair(bytes).map_err(|error| file.format(error))?;
        refuse_unknown(&file, &first)?;
        refuse_long_header(&file, first.header())?;
        let guest = GuestData::unopened(&first);
        Self::assemble(file, first, None, guest, false)
    }

    /// Lets go of everything in memory; nothing is written.
    pub(crate) fn into_storage(self) -> Box<dyn Storage> {
        self.file.into_storage()
    }

    fn assemble(
        file: ImageFile,
        first: FirstCluster,
        backing: Option<Layer>,
        guest: GuestData,
        writable: bool,
    ) -> Result<Self> {
        let header = first.header().clone();
        if writable {
            refuse_writing(&file, &first)?;
        }
        let directory = match Directory::read(&file, &first) {
            Ok(directory) => directory,
            // Reading stays possible; whoever asks about bitmaps hears of the damage.
            Err(error) if !writable => Directory::unreadable(error),
            Err(error) => return Err(error),
        };
        let l1 = read_l1(&file, &header)?;
        Ok(Self {
            geometry: header.geometry,
            size: AtomicU64::new(header.disk_bytes),
            writable,
            backing,
            guest,
            has_backing_name: !first.backing_name().is_empty(),
            backing_to_come: AtomicBool::new(false),
            keeps_content: AtomicBool::new(false),
            l1: RwLock::new(l1),
            tables: TableCache::new(&header.geometry),
            compression: CompressionType::from_byte(header.compression_type),
            expanded: ExpandedClusters::new(&header.geometry),
            table_creation: Mutex::new(()),
            entrance: Entrance::new(),
            clusters: ClusterLocks::new(),
            flushing: Mutex::new(()),
            allocator: Mutex::new(None),
            claims: Claims::new(),
            first: Mutex::new(first),
            directory: Mutex::new(directory),
            tracker: RwLock::new(None),
            tracker_creation: Mutex::new(()),
            lent: RwLock::default(),
            last_narrowing: Mutex::new(Instant::now()),
            failed: AtomicBool::new(false),
            distrusted: AtomicBool::new(false),
            repaired: None,
            file,
        })
    }
}

/// The image with refcounts that can be trusted, after everything else that opening for writing
/// refuses was looked at.
fn clean(
    file: ImageFile,
    first: FirstCluster,
    repair: bool,
) -> Result<(ImageFile, FirstCluster, Option<RepairReport>)> {
    let header = first.header();
    if !repair || header.incompatible & incompatible::DIRTY == 0 {
        return Ok((file, first, None));
    }
    refuse_unwritable(&file, &first)?;
    let (storage, report) = repair_dirty(file.into_storage())?;
    let file = ImageFile::new(storage);
    let first = read_first_cluster(&file)?;
    Ok((file, first, Some(report)))
}

fn read_first_cluster(file: &ImageFile) -> Result<FirstCluster> {
    let bytes = read_first_bytes(file)?;
    let first = FirstCluster::parse(bytes).map_err(|error| file.format(error))?;
    refuse_unknown(file, &first)?;
    Ok(first)
}

fn read_first_bytes(file: &ImageFile) -> Result<Vec<u8>> {
    let mut bytes = vec![0; FIRST_READ];
    let count = file
        .storage()
        .read_at(&mut bytes, 0)
        .map_err(|error| file.io(error, "read header", 0))?;
    bytes.truncate(count);
    let header = Header::from_bytes(&bytes).map_err(|error| file.format(error))?;
    let cluster = header.geometry.cluster_len();
    bytes.resize(cluster, 0);
    if cluster > FIRST_READ {
        file.read(&mut bytes, HostOffset::ZERO, "read header")?;
    }
    Ok(bytes)
}

/// Features without which not even reading is right.
fn refuse_unknown(file: &ImageFile, first: &FirstCluster) -> Result<()> {
    let header = first.header();
    EncryptionHeader::find(header, first.others()).map_err(|error| file.format(error))?;
    let handled = incompatible::DIRTY
        | incompatible::CORRUPT
        | incompatible::DATA_FILE
        | incompatible::COMPRESSION
        | incompatible::EXTENDED_L2;
    if header.autoclear & autoclear::RAW_DATA_FILE != 0 && !header.geometry.external_data {
        let value = header.autoclear;
        return Err(file.damage(Damage::HeaderField {
            field: "autoclear_features",
            value,
        }));
    }
    let unknown = header.incompatible & !handled;
    if unknown != 0 {
        let bit = low_byte(unknown.trailing_zeros().into());
        let name = extension::incompatible_name(first.others(), bit);
        return Err(file.unsupported(Feature::Incompatible { bit, name }));
    }
    Ok(())
}

/// Bytes of a header behind which the bitmaps extension and the head of the chain record still fit
/// into the first sector, which is what one write changes.
const MAX_WRITABLE_HEADER: usize = 512 - 32 - 24;

fn refuse_long_header(file: &ImageFile, header: &Header) -> Result<()> {
    if header.length > MAX_WRITABLE_HEADER {
        return Err(file.unsupported(Feature::Limit {
            what: "header length",
            value: crate::convert::to_u64(header.length),
            limit: crate::convert::to_u64(MAX_WRITABLE_HEADER),
        }));
    }
    Ok(())
}

fn refuse_writing(file: &ImageFile, first: &FirstCluster) -> Result<()> {
    refuse_unwritable(file, first)?;
    if first.header().incompatible & incompatible::DIRTY != 0 {
        return Err(file.unsupported(Feature::Dirty));
    }
    Ok(())
}

fn refuse_unwritable(file: &ImageFile, first: &FirstCluster) -> Result<()> {
    let header = first.header();
    refuse_long_header(file, header)?;
    if header.incompatible & incompatible::CORRUPT != 0 {
        return Err(file.damage(Damage::MarkedCorrupt));
    }
    data_file::refuse_contradictions(file, header)?;
    refuse_lost_keys(file, first)?;
    if header.snapshot_count != 0 && header.geometry.external_data {
        return Err(file.unsupported(Feature::SnapshotOfDataFile));
    }
    // Their tables must be protected from the first write on.
    snapshots::structures(file, header)?;
    if header.refcount_table_offset == HostOffset::ZERO {
        return Err(file.damage(Damage::HeaderField {
            field: "refcount_table_offset",
            value: 0,
        }));
    }
    if header.l1_entries > 0 && header.l1_offset == HostOffset::ZERO {
        return Err(file.damage(Damage::HeaderField {
            field: "l1_table_offset",
            value: 0,
        }));
    }
    for (structure, offset) in [
        ("L1 table", header.l1_offset),
        ("refcount table", header.refcount_table_offset),
    ] {
        if offset.0 > file.len()? {
            let problem = "lies past the end of the file";
            return Err(file.damage(Damage::Place {
                structure,
                offset,
                problem,
            }));
        }
    }
    Ok(())
}

/// An encryption header past the end of the file is none.
fn refuse_lost_keys(file: &ImageFile, first: &FirstCluster) -> Result<()> {
    let Some(place) = super::encryption_header(first) else {
        return Ok(());
    };
    if place.offset.0 + place.bytes <= file.len()?.next_multiple_of(512) {
        return Ok(());
    }
    let problem = "lies past the end of the file";
    Err(file.damage(Damage::Place {
        structure: "encryption header",
        offset: place.offset,
        problem,
    }))
}

/// Reads the active L1 table. What lies beyond the end of the file is zero and costs no reading.
fn read_l1(file: &ImageFile, header: &Header) -> Result<Vec<AtomicU64>> {
    let present = file.len()?.saturating_sub(header.l1_offset.0).div_ceil(8);
    let entries = index(header.l1_entries);
    let mut raw = file.read_table(
        header.l1_offset,
        entries.min(to_usize(present)),
        "read L1 table",
    )?;
    raw.resize(entries, 0);
    Ok(raw.into_iter().map(AtomicU64::new).collect())
}

pub(super) fn backing_reference(first: &FirstCluster) -> Option<BackingReference> {
    let name = first.backing_name();
    if name.is_empty() {
        return None;
    }
    let format = first
        .others()
        .iter()
        .find(|entry| entry.kind == extension::BACKING_FORMAT)
        .map(|entry| String::from_utf8_lossy(&entry.data).into_owned());
    Some(BackingReference {
        name: name.to_vec(),
        format: format.unwrap_or_default(),
    })
}

/// Checked L1 entry `number`.
pub(super) fn decode_l1(
    file: &ImageFile,
    geometry: &Geometry,
    raw: u64,
    number: usize,
) -> Result<L1Entry> {
    L1Entry::decode(raw, crate::convert::to_u64(number), geometry)
        .map_err(|damage| file.damage(damage))
}
