//! Where guest data lies: in the image, or in an external data file.
//!
//! In an external data file every cluster lies where it is on the disk, so nothing is allocated and
//! nothing is counted. What this module keeps true:
//! - Guest data is only handed out, and only written, through [`Image::guest_file`]: an encrypted
//!   image and a data file that was not opened are refused there, by name.
//! - Data goes to a place that the mapping on disk may already name. So every change waits until
//!   its own marks are durable; a barrier shared with the mapping would come too late.
//! - A data file that the image calls raw equals the disk at every instant, also after a crash: a
//!   cluster is mapped, durably, before anything but zeros is written to it, it stays mapped, and
//!   zeros are written as zeros.

use super::backing::Layer;
use super::first_cluster::FirstCluster;
use super::{Image, OpenOptions};
use crate::alloc::HostRun;
use crate::cache::L2Table;
use crate::error::{Damage, Feature, Result};
use crate::format::extension;
use crate::format::header::Header;
use crate::format::part::Part;
use crate::format::table::{L2Entry, RawL2};
use crate::image::file::ImageFile;
use crate::storage::FileIdentity;
use crate::units::{GuestCluster, HostOffset};

/// The external data file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileReference {
    /// The name, bytes as stored; empty when the image does not say. Relative names start at the
    /// directory of the image.
    pub name: Vec<u8>,
    /// Whether the file by itself is a raw image of the disk, and is kept one.
    pub raw: bool,
}

/// Where guest data lies.
#[derive(Debug)]
pub(super) enum GuestData {
    /// In the image.
    Inside,
    /// In an external data file.
    Outside(DataFile),
    /// In an external data file that was not opened; its name.
    Unopened(String),
    /// Somewhere, encrypted by this method.
    Encrypted(u32),
}

/// An open external data file.
#[derive(Debug)]
pub(super) struct DataFile {
    file: ImageFile,
    raw: bool,
}

impl GuestData {
    /// Guest data of an image whose data file, if it has one, stays closed.
    pub(super) fn unopened(first: &FirstCluster) -> Self {
        match (first.header().encryption, data_file_reference(first)) {
            (0, None) => Self::Inside,
            (0, Some(reference)) => Self::Unopened(shown(&reference)),
            (method, _) => Self::Encrypted(method),
        }
    }

    /// Opens the data file, if the image has one, through the gate.
    pub(super) fn open(
        first: &FirstCluster,
        file: &ImageFile,
        backing: Option<&Layer>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let Some(reference) = data_file_reference(first) else {
            return Ok(Self::unopened(first));
        };
        if first.header().encryption != 0 {
            return Ok(Self::unopened(first));
        }
        let refuse = |reason: String| {
            let name = shown(&reference);
            file.unsupported(Feature::DataFile { name, reason })
        };
        let storage = options
            .gate
            .open_data(&reference, file.name(), options.writable)
            .map_err(refuse)?;
        let data = ImageFile::new(storage);
        if let Some(identity) = data.storage().identity() {
            if file.storage().identity() == Some(identity) {
                return Err(refuse("it is the image itself".to_owned()));
            }
            if backing.is_some_and(|layer| layer.is_made_of(identity)) {
                let reason = "it belongs to the backing chain of the image";
                return Err(refuse(reason.to_owned()));
            }
        }
        let raw = reference.raw;
        Ok(Self::Outside(DataFile { file: data, raw }))
    }
}

fn shown(reference: &DataFileReference) -> String {
    String::from_utf8_lossy(&reference.name).into_owned()
}

/// The data file that the image names, if its guest data lies in one.
pub(super) fn data_file_reference(first: &FirstCluster) -> Option<DataFileReference> {
    let header = first.header();
    if !header.geometry.external_data {
        return None;
    }
    let names = first.others().iter();
    let name = names
        .rev()
        .find(|entry| entry.kind == extension::DATA_FILE)
        .map(|entry| entry.data.clone());
    Some(DataFileReference {
        name: name.unwrap_or_default(),
        raw: header.has_raw_data_file(),
    })
}

/// What contradicts an external data file, so that writing would break one or the other.
pub(super) fn refuse_contradictions(file: &ImageFile, header: &Header) -> Result<()> {
    if !header.geometry.external_data {
        return Ok(());
    }
    let field = |field, value| Err(file.damage(Damage::HeaderField { field, value }));
    if header.snapshot_count != 0 {
        return field("nb_snapshots", header.snapshot_count.into());
    }
    if header.has_raw_data_file() && header.backing_name_length != 0 {
        return field("autoclear_features", header.autoclear);
    }
    Ok(())
}

impl Image {
    /// The external data file that the image names, whether or not it was opened.
    pub fn data_file(&self) -> Option<DataFileReference> {
        data_file_reference(&self.first_cluster())
    }

    /// Whether guest data can be read, here and in all layers below: to be asked before something
    /// is begun that reads it.
    ///
    /// # Errors
    /// [`Feature::Encryption`], or [`Feature::DataFile`] for one that was not opened.
    pub fn require_guest_data(&self) -> Result<()> {
        self.guest_file()?;
        match &self.backing {
            Some(Layer::Image(image)) => image.require_guest_data(),
            _ => Ok(()),
        }
    }

    /// The file that holds guest data.
    pub(crate) fn guest_file(&self) -> Result<&ImageFile> {
        match &self.guest {
            GuestData::Inside => Ok(&self.file),
            GuestData::Outside(data) => Ok(&data.file),
            GuestData::Unopened(name) => Err(self.file.unsupported(Feature::DataFile {
                name: name.clone(),
                reason: "the image was opened without it".to_owned(),
            })),
            GuestData::Encrypted(method) => {
                Err(self.file.unsupported(Feature::Encryption(*method)))
            }
        }
    }

    fn external(&self) -> Option<&DataFile> {
        match &self.guest {
            GuestData::Outside(data) => Some(data),
            _ => None,
        }
    }

    /// Refuses to compress where compressed clusters cannot be.
    pub(crate) fn require_compressible(&self) -> Result<()> {
        self.guest_file()?;
        match self.data_file() {
            None => Ok(()),
            Some(reference) => Err(self.file.unsupported(Feature::DataFile {
                name: shown(&reference),
                reason: "clusters in it cannot be compressed".to_owned(),
            })),
        }
    }

    /// Whether guest data lies in a file of its own.
    pub(super) fn has_external_data(&self) -> bool {
        self.geometry.external_data
    }

    /// Whether the data file must equal the disk at every instant.
    pub(super) fn keeps_raw(&self) -> bool {
        self.external().is_some_and(|data| data.raw)
    }

    /// Host offset as a reader of the mapping may use it: encrypted data is at none.
    pub(super) fn shown_offset(&self, host: HostOffset) -> Option<HostOffset> {
        (!matches!(self.guest, GuestData::Encrypted(_))).then_some(host)
    }

    /// Whether a file is this image or its data file.
    pub(crate) fn owns(&self, identity: FileIdentity) -> bool {
        let is = |file: &ImageFile| file.storage().identity() == Some(identity);
        is(&self.file) || self.external().is_some_and(|data| is(&data.file))
    }

    /// Whether a file is this image, or one of those that its data comes from.
    pub(crate) fn is_made_of(&self, identity: FileIdentity) -> bool {
        self.owns(identity)
            || self
                .backing
                .as_ref()
                .is_some_and(|layer| layer.is_made_of(identity))
    }

    /// Makes guest data in a file of its own durable.
    pub(super) fn flush_data_file(&self) -> Result<()> {
        match self.external() {
            Some(data) => data.file.barrier().inspect_err(|_| self.poison()),
            None => Ok(()),
        }
    }

    /// A place for up to `wanted` guest clusters from `cluster` on, whose lock is owned.
    pub(super) fn place_clusters(&self, cluster: GuestCluster, wanted: u64) -> Result<HostRun> {
        let Some(data) = self.external() else {
            return self.with_allocator(|allocator, _| allocator.allocate(&self.file, wanted));
        };
        let start = HostOffset(cluster.0 << self.geometry.cluster_bits);
        let end = start.plus(wanted << self.geometry.cluster_bits).0;
        let bytes = end.min(self.size()).saturating_sub(start.0);
        Ok(HostRun {
            start,
            clusters: wanted,
            untouched: data.file.storage().hole_at(start.0).unwrap_or(0) >= bytes,
        })
    }

    /// Gives a place back that nothing came to refer to.
    pub(super) fn give_up(&self, run: HostRun) -> Result<()> {
        if self.has_external_data() {
            return Ok(());
        }
        self.with_allocator(|allocator, _| allocator.free_now(&self.file, &[run]))
    }

    /// Bytes that clusters from `start` on may take in the file: a data file ends with the disk.
    pub(super) fn room_for_data(&self, start: HostOffset, clusters: u64) -> u64 {
        let bytes = clusters << self.geometry.cluster_bits;
        if self.has_external_data() {
            return bytes.min(self.size().saturating_sub(start.0));
        }
        bytes
    }

    /// Says that the data file need not keep what unmapped clusters had there.
    pub(super) fn discard_outside(&self, old: &[L2Entry]) {
        let Some(data) = self.external() else { return };
        for entry in old {
            if let L2Entry::Normal { .. } | L2Entry::Partial { .. } = entry
                && let Some(offset) = entry.host_cluster()
            {
                let len = self.room_for_data(offset, 1);
                // Space that cannot be given back is only space.
                let _ = data.file.storage().discard(offset.0, len);
            }
        }
    }

    /// Maps clusters of a raw data file, durably, before they are written. Their lock is owned.
    pub(super) fn map_raw(
        &self,
        number: usize,
        table: &std::sync::Arc<L2Table>,
        cluster: GuestCluster,
        old: &[L2Entry],
    ) -> Result<()> {
        let (_, slot) = self.geometry.table_indexes(cluster);
        let mut raw = Vec::new();
        for (cluster, entry) in (cluster.0..).zip(old) {
            let start = HostOffset(cluster << self.geometry.cluster_bits);
            self.zero_absent(start, entry)?;
            raw.push(RawL2::normal(start, &self.geometry));
        }
        self.tables.set(number, table, slot, &raw);
        self.sync()
    }

    /// Writes zeros where the cluster at `start` holds no data.
    fn zero_absent(&self, start: HostOffset, entry: &L2Entry) -> Result<()> {
        let room = self.room_for_data(start, 1);
        let mut inside = 0;
        while inside < room {
            let (part, len) = entry.part(inside, &self.geometry);
            let len = len.min(room - inside);
            if !matches!(part, Part::Data(_)) {
                self.zero_data(start.0 + inside, len)?;
            }
            inside += len;
        }
        Ok(())
    }

    /// Cuts the data file where the disk ends. One that cannot be cut, a block device, stays longer.
    pub(super) fn cut_data_file(&self) -> Result<()> {
        let (file, size) = (self.guest_file()?, self.size());
        if file.len()? <= size {
            return Ok(());
        }
        match file.storage().set_len(size) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
            done => done.map_err(|error| file.io(error, "cut the data file", size)),
        }
    }

    /// Writes zeros into the data file.
    pub(super) fn zero_data(&self, offset: u64, len: u64) -> Result<()> {
        let file = self.guest_file()?;
        file.storage()
            .write_zeroes(offset, len)
            .map_err(|error| file.io(error, "write zeros", offset))
    }
}

/// Opens the data file of an image to be, empties it and gives it the size of the disk.
pub(super) fn prepare(
    reference: &DataFileReference,
    image: &ImageFile,
    size: u64,
    options: &OpenOptions,
) -> Result<()> {
    let refuse = |reason: String| {
        let name = shown(reference);
        image.unsupported(Feature::DataFile { name, reason })
    };
    let storage = options
        .gate
        .open_data(reference, image.name(), true)
        .map_err(refuse)?;
    let identity = storage.identity();
    if identity.is_some() && identity == image.storage().identity() {
        return Err(refuse("it is the image itself".to_owned()));
    }
    let file = ImageFile::new(storage);
    let storage = file.storage();
    storage
        .set_len(0)
        .and_then(|()| storage.set_len(size))
        .map_err(|error| file.io(error, "set length", size))?;
    file.barrier()
}
