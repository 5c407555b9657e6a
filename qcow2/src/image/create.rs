//! Creating an image: header, one refcount block, an empty L1.

use super::{BackingReference, DataFileReference, Image, OpenOptions, Preallocation, data_file};
use crate::codec::CompressionType;
use crate::convert::{to_u32, to_u64, to_usize};
use crate::error::{Mistake, Result};
use crate::format::extension::{self, Extension};
use crate::format::header::{Header, V2_LENGTH, V3_LENGTH, autoclear, compatible, incompatible};
use crate::format::{limits, refcount};
use crate::geometry::Geometry;
use crate::image::file::ImageFile;
use crate::storage::Storage;
use crate::units::HostOffset;

/// What a new image looks like; defaults as qemu-img's.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// Cluster size is `1 << cluster_bits`; 9 to 21.
    pub cluster_bits: u32,
    /// Refcount width in bits, a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Version 2 or 3.
    pub version: u32,
    /// How compressed clusters will be compressed; version 2 has zlib only.
    pub compression_type: CompressionType,
    /// Whether each cluster has 32 subclusters that are allocated one by one.
    pub extended_l2: bool,
    /// The image that shows through where nothing is written.
    pub backing: Option<BackingReference>,
    /// A file of its own for guest data, opened through the gate and emptied.
    pub data_file: Option<DataFileReference>,
    /// Say that refcount updates may be postponed. We never postpone them; others may.
    pub lazy_refcounts: bool,
    /// What is put in place before anybody writes to it.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// Version 3, 64 KiB clusters, 16-bit refcounts, zlib, no backing file.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_bits: 16,
            refcount_bits: 16,
            version: 3,
            compression_type: CompressionType::Zlib,
            extended_l2: false,
            backing: None,
            data_file: None,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
        }
    }

    /// Whether such an image can be; nothing is written.
    ///
    /// # Errors
    /// [`Mistake::Option`].
    pub fn check(&self) -> std::result::Result<(), Mistake> {
        Plan::new(self, self.geometry()?).map(|_| ())
    }

    /// The shape of the image, when there can be such an image.
    pub(crate) fn geometry(&self) -> std::result::Result<Geometry, Mistake> {
        let problem = |option, problem| Err(Mistake::Option { option, problem });
        if !(limits::MIN_CLUSTER_BITS..=limits::MAX_CLUSTER_BITS).contains(&self.cluster_bits) {
            return problem("cluster_size", "must be a power of two between 512 and 2M");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return problem("refcount_bits", "must be a power of two between 1 and 64");
        }
        if self.version != 2 && self.version != 3 {
            return problem("compat", "must be 0.10 (version 2) or 1.1 (version 3)");
        }
        if self.version == 2 && self.refcount_bits != 16 {
            return problem("refcount_bits", "version 2 images have 16-bit refcounts");
        }
        if self.version == 2 && self.compression_type != CompressionType::Zlib {
            return problem("compression_type", "version 2 images only have zlib");
        }
        self.check_features()?;
        let geometry = Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_bits.trailing_zeros(),
            version: self.version,
            extended_l2: self.extended_l2,
            external_data: self.data_file.is_some(),
        };
        let too_large = self.size > limits::MAX_DISK_BYTES
            || geometry.l1_entries_for(self.size) * 8 > limits::MAX_L1_BYTES;
        if too_large {
            return problem("size", "too large for this cluster size");
        }
        Ok(geometry)
    }

    fn incompatible(&self) -> u64 {
        let compression = match self.compression_type {
            CompressionType::Zlib => 0,
            CompressionType::Zstd => incompatible::COMPRESSION,
        };
        let outside = u64::from(self.data_file.is_some()) * incompatible::DATA_FILE;
        let extended = u64::from(self.extended_l2) * incompatible::EXTENDED_L2;
        compression | outside | extended
    }

    fn check_features(&self) -> std::result::Result<(), Mistake> {
        let problem = |option, problem| Err(Mistake::Option { option, problem });
        if self.version == 2 && self.lazy_refcounts {
            return problem("lazy_refcounts", "version 2 images cannot say so");
        }
        if self.extended_l2 && self.version == 2 {
            return problem("extended_l2", "needs compat=1.1 (version 3)");
        }
        if self.extended_l2 && self.cluster_bits < limits::MIN_EXTENDED_CLUSTER_BITS {
            return problem("extended_l2", "needs a cluster_size of at least 16k");
        }
        let placed = self.preallocation != Preallocation::Off;
        if placed && self.backing.is_some() && !self.extended_l2 {
            return problem(
                "preallocation",
                "whole clusters would hide the backing file; it needs extended_l2",
            );
        }
        let Some(data_file) = &self.data_file else {
            return Ok(());
        };
        if self.version == 2 {
            return problem("data_file", "version 2 images cannot have one");
        }
        if data_file.name.is_empty() {
            return problem("data_file", "its name is empty");
        }
        if data_file.raw && self.backing.is_some() {
            return problem("data_file_raw", "a raw disk cannot have a backing file");
        }
        Ok(())
    }
}

impl Image {
    /// Writes a new, empty image into `storage` (whose old content is dropped) and opens it for
    /// writing. The backing file that it names is opened through `open.gate`.
    ///
    /// # Errors
    /// Options that cannot be, before anything is written; I/O.
    pub fn create(
        storage: Box<dyn Storage>,
        options: &CreateOptions,
        open: OpenOptions,
    ) -> Result<Self> {
        let file = ImageFile::new(storage);
        let geometry = options
            .geometry()
            .map_err(|mistake| file.invalid(mistake))?;
        let plan = Plan::new(options, geometry).map_err(|mistake| file.invalid(mistake))?;
        let open = OpenOptions {
            writable: true,
            ..open
        };
        if let Some(reference) = &options.data_file {
            data_file::prepare(reference, &file, plan.header.disk_bytes, &open)?;
        }
        file.storage()
            .set_len(0)
            .map_err(|error| file.io(error, "truncate", 0))?;
        plan.write(&file)?;
        let image = Self::open(file.into_storage(), open)?;
        image.preallocate_disk(options.preallocation)?;
        Ok(image)
    }
}

/// Places of the structures of a new image: header, refcount table, refcount blocks, L1.
struct Plan {
    header: Header,
    first_cluster: Vec<u8>,
    blocks: u64,
    clusters: u64,
}

impl Plan {
    fn new(options: &CreateOptions, geometry: Geometry) -> std::result::Result<Self, Mistake> {
        let size = options.size.next_multiple_of(512);
        let l1_entries = geometry.l1_entries_for(size);
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        // Enough blocks to count the header, the table, the blocks and L1.
        let (mut blocks, mut table_clusters) = (1, 1);
        let clusters = loop {
            let clusters = 1 + table_clusters + blocks + l1_clusters;
            let needed = clusters.div_ceil(geometry.refcounts_per_block());
            let table = geometry.clusters_for(needed * 8);
            if needed <= blocks && table <= table_clusters {
                break clusters;
            }
            (blocks, table_clusters) = (needed.max(blocks), table.max(table_clusters));
        };
        let cluster = geometry.cluster_bytes();
        let header = Header {
            geometry,
            backing_name_offset: 0,
            backing_name_length: 0,
            disk_bytes: size,
            encryption: 0,
            l1_entries: to_u32(l1_entries),
            l1_offset: match l1_clusters {
                0 => HostOffset::ZERO,
                _ => HostOffset((1 + table_clusters + blocks) * cluster),
            },
            refcount_table_offset: HostOffset(cluster),
            refcount_table_clusters: to_u32(table_clusters),
            snapshot_count: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible: options.incompatible(),
            compatible: u64::from(options.lazy_refcounts) * compatible::LAZY_REFCOUNTS,
            autoclear: options
                .data_file
                .as_ref()
                .filter(|data_file| data_file.raw)
                .map_or(0, |_| autoclear::RAW_DATA_FILE),
            compression_type: options.compression_type.byte(),
            length: if geometry.version == 2 {
                V2_LENGTH
            } else {
                V3_LENGTH
            },
            unknown_tail: Vec::new(),
        };
        let (header, first_cluster) = first_cluster(header, options)?;
        Ok(Self {
            header,
            first_cluster,
            blocks,
            clusters,
        })
    }

    fn write(&self, file: &ImageFile) -> Result<()> {
        let geometry = &self.header.geometry;
        let cluster = geometry.cluster_bytes();
        let end = self.clusters * cluster;
        file.storage()
            .set_len(end)
            .map_err(|error| file.io(error, "grow", end))?;
        let first_block = self
            .header
            .refcount_table_offset
            .plus(u64::from(self.header.refcount_table_clusters) * cluster);
        let per_block = geometry.refcounts_per_block();
        for number in 0..self.blocks {
            let at = first_block.plus(number * cluster);
            let entry_at = self.header.refcount_table_offset.plus(number * 8);
            file.write(&at.0.to_be_bytes(), entry_at, "write refcount table")?;
            let used = self
                .clusters
                .saturating_sub(number * per_block)
                .min(per_block);
            let mut block = vec![0; geometry.cluster_len()];
            for slot in 0..to_usize(used) {
                refcount::set_count(&mut block, geometry.refcount_order, slot, 1);
            }
            file.write(&block, at, "write refcount block")?;
        }
        // The header comes last: until it is there the file is no image at all.
        file.barrier()?;
        file.write(&self.first_cluster, HostOffset::ZERO, "write header")?;
        file.barrier()
    }
}

fn first_cluster(
    mut header: Header,
    options: &CreateOptions,
) -> std::result::Result<(Header, Vec<u8>), Mistake> {
    let cluster = header.geometry.cluster_len();
    let backing = options.backing.as_ref();
    let mut bytes = vec![0; header.length];
    let mut add = |kind, data: &[u8]| {
        Extension {
            kind,
            data_offset: 0,
            data: data.to_vec(),
        }
        .write(&mut bytes);
    };
    if let Some(backing) = backing
        && !backing.format.is_empty()
    {
        add(extension::BACKING_FORMAT, backing.format.as_bytes());
    }
    if let Some(data_file) = &options.data_file {
        add(extension::DATA_FILE, &data_file.name);
    }
    if header.geometry.version == 3 && cluster > 4096 {
        extension::feature_names().write(&mut bytes);
    }
    extension::write_head(extension::END, 0, &mut bytes);
    if let Some(backing) = backing {
        header.backing_name_offset = to_u64(bytes.len());
        header.backing_name_length = to_u32(to_u64(backing.name.len()));
        bytes.extend_from_slice(&backing.name);
        let too_long = backing.name.len() > crate::convert::index(limits::MAX_BACKING_NAME_BYTES);
        if too_long || bytes.len() > cluster {
            let problem = "the name does not fit into the first cluster";
            return Err(Mistake::Option {
                option: "backing_file",
                problem,
            });
        }
    }
    if bytes.len() > cluster {
        let problem = "the name does not fit into the first cluster";
        return Err(Mistake::Option {
            option: "data_file",
            problem,
        });
    }
    bytes.resize(cluster, 0);
    header.write(&mut bytes);
    Ok((header, bytes))
}
