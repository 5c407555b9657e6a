//! What an image says of itself in its first cluster, its bitmap directory and snapshot table.
//!
//! Reads no guest data, no mapping and no bitmap data, so it also answers for images whose data
//! this version does not handle: encrypted, with subclusters, with a data file.

use std::path::Path;

use serde_json::{Value, json};
use tidemark_qcow2::format::bitmap::{BitmapsExtension, DirectoryEntry, decode_directory};
use tidemark_qcow2::format::chain::{self, Reading};
use tidemark_qcow2::format::extension::{self, Extension};
use tidemark_qcow2::format::header::{Header, autoclear, incompatible};
use tidemark_qcow2::{Damage, Error, FileStorage, SnapshotInfo, Storage, snapshots};

use crate::exit::{Failure, Outcome};
use crate::luks;

/// Bytes that hold a header and, with all usual cluster sizes, its extensions.
const FIRST_READ: usize = 64 << 10;
/// Incompatible features that an image may have and still be described.
const DESCRIBED: u64 = incompatible::DIRTY
    | incompatible::CORRUPT
    | incompatible::DATA_FILE
    | incompatible::COMPRESSION
    | incompatible::EXTENDED_L2;

/// Everything that [`read`] found.
pub(crate) struct Facts {
    pub(crate) header: Header,
    pub(crate) extensions: Vec<Extension>,
    pub(crate) backing_name: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) data_file: Option<String>,
    pub(crate) bitmaps: Vec<DirectoryEntry>,
    pub(crate) snapshots: Vec<SnapshotInfo>,
    pub(crate) chain: Reading,
    /// What an encrypted image says of its encryption.
    pub(crate) encryption: Option<Value>,
    /// Structures that could not be read; what they hold is missing above.
    pub(crate) problems: Vec<String>,
}

impl Facts {
    /// Offset of the chain record's extension in the file and bytes of its data.
    pub(crate) fn chain_place(&self) -> Option<(usize, usize)> {
        let entry = self.extension(extension::CHAIN)?;
        Some((entry.data_offset, entry.data.len()))
    }

    fn extension(&self, kind: u32) -> Option<&Extension> {
        self.extensions
            .iter()
            .rev()
            .find(|entry| entry.kind == kind)
    }

    pub(crate) fn has(&self, incompatible: u64) -> bool {
        self.header.incompatible & incompatible != 0
    }
}

/// Reads the facts of the image in `storage`.
pub(crate) fn read(path: &Path, storage: &FileStorage) -> Outcome<Facts> {
    let name = path.display().to_string();
    let failed = |error: std::io::Error| Failure::io(path, "read header", &error);
    let mut bytes = vec![0; FIRST_READ];
    let count = storage.read_at(&mut bytes, 0).map_err(failed)?;
    bytes.truncate(count);
    let header = Header::from_bytes(&bytes).map_err(|error| error.in_image(&name))?;
    bytes.resize(header.geometry.cluster_len(), 0);
    if bytes.len() > FIRST_READ {
        storage.read_at(&mut bytes, 0).map_err(failed)?;
    }
    let (extensions, _) =
        extension::parse(&header, &bytes).map_err(|error| error.in_image(&name))?;
    refuse_unknown(&name, &header, &extensions)?;
    let text = |kind| {
        let entry = extensions.iter().rev().find(|entry| entry.kind == kind);
        entry.map(|entry| String::from_utf8_lossy(&entry.data).into_owned())
    };
    let chain = extensions
        .iter()
        .find(|entry| entry.kind == extension::CHAIN);
    let mut problems = Vec::new();
    let bitmaps = bitmaps(path, storage, &header, &extensions);
    let bitmaps = or_problem(bitmaps, &mut problems);
    let snapshots = snapshots::list(storage, &header).map_err(Failure::from);
    let snapshots = or_problem(snapshots, &mut problems);
    Ok(Facts {
        backing_name: backing_name(&header, &bytes),
        backing_format: text(extension::BACKING_FORMAT),
        data_file: text(extension::DATA_FILE),
        bitmaps,
        snapshots,
        problems,
        chain: chain.map_or(Reading::Absent, |entry| chain::read(&entry.data)),
        encryption: encryption(path, storage, &header, &extensions)?,
        header,
        extensions,
    })
}

/// What is damaged hides nothing else.
fn or_problem<T>(found: Outcome<Vec<T>>, problems: &mut Vec<String>) -> Vec<T> {
    found.unwrap_or_else(|failure| {
        problems.push(failure.to_string());
        Vec::new()
    })
}

fn refuse_unknown(name: &str, header: &Header, extensions: &[Extension]) -> Outcome<()> {
    let unknown = header.incompatible & !DESCRIBED;
    if unknown == 0 {
        return Ok(());
    }
    let bit = u8::try_from(unknown.trailing_zeros()).unwrap_or(u8::MAX);
    let feature = tidemark_qcow2::Feature::Incompatible {
        bit,
        name: extension::incompatible_name(extensions, bit),
    };
    let image = name.to_owned();
    Err(Error::Unsupported { image, feature }.into())
}

fn backing_name(header: &Header, cluster: &[u8]) -> Option<String> {
    let start = usize::try_from(header.backing_name_offset)
        .ok()
        .filter(|&start| start != 0)?;
    let length = usize::try_from(header.backing_name_length).ok()?;
    let name = cluster.get(start..start.checked_add(length)?)?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

/// The directory, unless the autoclear bit says that it is stale.
fn bitmaps(
    path: &Path,
    storage: &FileStorage,
    header: &Header,
    extensions: &[Extension],
) -> Outcome<Vec<DirectoryEntry>> {
    let trusted = header.autoclear & autoclear::BITMAPS != 0 && header.geometry.version > 2;
    let found = extensions
        .iter()
        .rev()
        .find(|entry| entry.kind == extension::BITMAPS);
    let Some(entry) = found.filter(|_| trusted) else {
        return Ok(Vec::new());
    };
    let damaged = |damage: Damage| -> Failure {
        let image = path.display().to_string();
        Error::Corrupt { image, damage }.into()
    };
    let place = BitmapsExtension::decode(&entry.data, entry.data_offset, &header.geometry)
        .map_err(damaged)?;
    let structure = "bitmap directory";
    let bytes = read_exactly(
        path,
        storage,
        place.directory_offset.0,
        place.directory_bytes,
    )?
    .ok_or_else(|| damaged(Damage::Truncated { structure }))?;
    decode_directory(&bytes, place.count, &header.geometry).map_err(damaged)
}

fn encryption(
    path: &Path,
    storage: &FileStorage,
    header: &Header,
    extensions: &[Extension],
) -> Outcome<Option<Value>> {
    if header.encryption != 2 {
        let format = (header.encryption == 1).then(|| json!({ "format": "aes" }));
        return Ok(format);
    }
    let pointer = extensions
        .iter()
        .find(|entry| entry.kind == extension::ENCRYPTION);
    let offset = pointer.and_then(|entry| entry.data.first_chunk::<8>());
    let bytes = match offset {
        Some(offset) => read_exactly(path, storage, u64::from_be_bytes(*offset), luks::BYTES)?,
        None => None,
    };
    let described = bytes.and_then(|bytes| luks::describe(&bytes));
    Ok(Some(
        described.unwrap_or_else(|| json!({ "format": "luks" })),
    ))
}

/// Bytes of the file; `None` when it ends before. Memory is bounded by what the file has.
fn read_exactly(
    path: &Path,
    storage: &FileStorage,
    offset: u64,
    len: u64,
) -> Outcome<Option<Vec<u8>>> {
    let failed = |error: std::io::Error| Failure::io(path, "read metadata", &error);
    let end = storage.len().map_err(failed)?;
    if offset.checked_add(len).is_none_or(|wanted| wanted > end) {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let count = storage.read_at(&mut bytes, offset).map_err(failed)?;
    Ok((count == bytes.len()).then_some(bytes))
}
