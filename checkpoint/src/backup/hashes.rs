//! The file of block hashes beside a target: which blocks of the disk the target holds, and what
//! they are. All integers are big endian.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | `TIDEHASH` |
//! | 8..12 | version, 1 |
//! | 12..16 | bytes of a block |
//! | 16..32 | identity of the point |
//! | 32.. | runs, see below, in the order of the disk |
//! | last 32 | BLAKE3 hash of everything before |
//!
//! Run:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | kind: 1 data, 2 zeros, 0 the end of the runs |
//! | 4..8 | zero |
//! | 8..16 | number of the first block |
//! | 16..24 | number of blocks |
//! | 24.. | data only: for each block the BLAKE3 hash of its bytes (32), the last cut at the disk's end |

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use tidemark_qcow2::chain::Identity;

use super::manifest::DiskEntry;
use super::units::{to_u64, to_usize};
use super::verify::Defect;
use super::{Error, Result, files};

/// The hash of one block.
pub(super) type BlockHash = [u8; 32];

const MAGIC: [u8; 8] = *b"TIDEHASH";
const VERSION: u32 = 1;
const HEAD_BYTES: u64 = 32;
const RUN_BYTES: u64 = 24;
const HASH_BYTES: u64 = 32;
const END: u32 = 0;
const DATA: u32 = 1;
const ZEROS: u32 = 2;
/// Bytes gathered before they are written or hashed.
const BUFFER_BYTES: usize = 256 << 10;

/// Writes a file of hashes, run by run in the order of the disk.
#[derive(Debug)]
pub(super) struct HashWriter {
    file: NamedTempFile,
    path: PathBuf,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
}

impl HashWriter {
    pub(super) fn create(target: &Path, identity: Identity, block: u64) -> Result<Self> {
        let mut writer = Self {
            file: files::temporary(target)?,
            path: target.to_owned(),
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
        };
        let block = u32::try_from(block).unwrap_or(u32::MAX);
        writer.buffer.extend_from_slice(&MAGIC);
        writer.buffer.extend_from_slice(&VERSION.to_be_bytes());
        writer.buffer.extend_from_slice(&block.to_be_bytes());
        writer.buffer.extend_from_slice(&identity.0);
        Ok(writer)
    }

    /// The blocks from `first` on hold data with these hashes.
    pub(super) fn data(&mut self, first: u64, hashes: &[BlockHash]) -> Result<()> {
        self.run(DATA, first, to_u64(hashes.len()));
        for hash in hashes {
            self.buffer.extend_from_slice(hash);
        }
        self.spill(BUFFER_BYTES)
    }

    /// The `blocks` blocks from `first` on are held as zeros.
    pub(super) fn zeros(&mut self, first: u64, blocks: u64) -> Result<()> {
        self.run(ZEROS, first, blocks);
        self.spill(BUFFER_BYTES)
    }

    /// The finished file and its hash.
    pub(super) fn finish(mut self) -> Result<(NamedTempFile, blake3::Hash)> {
        self.run(END, 0, 0);
        self.spill(0)?;
        let inner = self.hasher.finalize();
        self.buffer.extend_from_slice(inner.as_bytes());
        self.spill(0)?;
        Ok((self.file, self.hasher.finalize()))
    }

    fn run(&mut self, kind: u32, first: u64, blocks: u64) {
        self.buffer.extend_from_slice(&kind.to_be_bytes());
        self.buffer.extend_from_slice(&[0; 4]);
        self.buffer.extend_from_slice(&first.to_be_bytes());
        self.buffer.extend_from_slice(&blocks.to_be_bytes());
    }

    fn spill(&mut self, limit: usize) -> Result<()> {
        if self.buffer.len() > limit {
            self.hasher.update(&self.buffer);
            let written = self.file.write_all(&self.buffer);
            written.map_err(Error::io("write", &self.path))?;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Neighbouring blocks that a target holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Their bytes on the disk, whole blocks but for the disk's end.
    pub(super) range: Range<u64>,
    /// Where in the file their hashes are; none for zeros.
    hashes_at: Option<u64>,
}

impl Run {
    pub(super) fn is_zero(&self) -> bool {
        self.hashes_at.is_none()
    }
}

/// A file of hashes that is what its manifest says. Only where the runs are is in memory.
#[derive(Debug)]
pub(super) struct Hashes {
    file: File,
    path: PathBuf,
    block: u64,
    runs: Vec<Run>,
}

impl Hashes {
    /// Opens the file and checks all of it.
    pub(super) fn open(directory: &Path, entry: &DiskEntry, identity: Identity) -> Result<Self> {
        let path = directory.join(&entry.hashes);
        let damaged = |defect: Defect| Error::from(defect.in_file(&entry.hashes));
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(damaged(Defect::Missing));
            }
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(&mut file)
            .map_err(Error::io("read", &path))?;
        if hasher.finalize() != entry.hashes_blake3 {
            return Err(damaged(Defect::Checksum));
        }
        let runs = Scan::start(&file, &path)?.runs(entry, identity);
        Ok(Self {
            runs: runs?.map_err(damaged)?,
            block: entry.block_size,
            file,
            path,
        })
    }

    /// All runs, in the order of the disk.
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// The hashes of the blocks in `range`, which are whole blocks of the data run `run`.
    pub(super) fn of(&self, run: &Run, range: &Range<u64>) -> Result<Vec<BlockHash>> {
        let blocks = (range.end - range.start).div_ceil(self.block);
        let skipped = (range.start - run.range.start) / self.block;
        let at = run.hashes_at.unwrap_or_default() + skipped * HASH_BYTES;
        let mut hashes = vec![[0; 32]; to_usize(blocks)];
        self.file
            .read_exact_at(hashes.as_flattened_mut(), at)
            .map_err(Error::io("read", &self.path))?;
        Ok(hashes)
    }
}

/// One pass over the runs, hashes skipped.
struct Scan<'a> {
    reader: BufReader<&'a File>,
    path: &'a Path,
    at: u64,
    end: u64,
}

impl<'a> Scan<'a> {
    fn start(file: &'a File, path: &'a Path) -> Result<Self> {
        let mut reader = BufReader::new(file);
        let end = reader
            .seek(SeekFrom::End(0))
            .and_then(|end| reader.seek(SeekFrom::Start(0)).map(|_| end))
            .map_err(Error::io("seek", path))?;
        Ok(Self {
            reader,
            path,
            at: 0,
            end,
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader
            .read_exact(&mut bytes)
            .map_err(Error::io("read", self.path))?;
        self.at += to_u64(N);
        Ok(bytes)
    }

    fn runs(
        mut self,
        entry: &DiskEntry,
        identity: Identity,
    ) -> Result<std::result::Result<Vec<Run>, Defect>> {
        let bad = |reason: &str| Ok(Err(Defect::Unreadable(reason.to_owned())));
        if self.end < HEAD_BYTES + RUN_BYTES + HASH_BYTES {
            return bad("it is cut short");
        }
        let known = self.bytes()? == MAGIC && u32::from_be_bytes(self.bytes()?) == VERSION;
        let block = u64::from(u32::from_be_bytes(self.bytes()?));
        if !known || block != entry.block_size || self.bytes()? != identity.0 {
            return bad("it is not the file that the manifest means");
        }
        let blocks_of_disk = entry.size.div_ceil(block);
        let mut runs: Vec<Run> = Vec::new();
        let mut next = 0;
        loop {
            if self.at + RUN_BYTES + HASH_BYTES > self.end {
                return bad("it is cut short");
            }
            let [kind, _] = [self.bytes()?, self.bytes()?].map(u32::from_be_bytes);
            let [first, blocks] = [self.bytes()?, self.bytes()?].map(u64::from_be_bytes);
            let hashes_at = match kind {
                END => return Ok(Ok(runs)),
                DATA => Some(self.at),
                ZEROS => None,
                _ => return bad("it has a run of unknown kind"),
            };
            let last = first
                .checked_add(blocks)
                .filter(|last| *last <= blocks_of_disk);
            let Some(last) = last.filter(|_| first >= next && blocks > 0) else {
                return bad("its runs are not in order");
            };
            next = last;
            if hashes_at.is_some() && !self.skip(blocks)? {
                return bad("it is cut short");
            }
            let range = first * block..(last * block).min(entry.size);
            match runs.last_mut() {
                Some(before)
                    if before.is_zero() && kind == ZEROS && before.range.end == range.start =>
                {
                    before.range.end = range.end;
                }
                _ => runs.push(Run { range, hashes_at }),
            }
        }
    }

    /// Passes over the hashes of `blocks` blocks; false if the file has not that many.
    fn skip(&mut self, blocks: u64) -> Result<bool> {
        let bytes = blocks.saturating_mul(HASH_BYTES);
        if bytes > self.end - self.at {
            return Ok(false);
        }
        self.at += bytes;
        let step = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.reader
            .seek_relative(step)
            .map_err(Error::io("seek", self.path))?;
        Ok(true)
    }
}
