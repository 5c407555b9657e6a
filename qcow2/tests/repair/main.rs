//! Repair: everything that can be put right is, nothing gets worse, and what is lost is named.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bitmaps;
#[path = "../check/corpus.rs"]
mod corpus;
mod qemu;
mod sweep;

use std::io;
use std::sync::Arc;

use tidemark_qcow2::check::{CheckReport, Repair, RepairReport, check, repair};
use tidemark_qcow2::{Error, Image, MemoryStorage, OpenOptions, Result, Storage};

/// Bytes in memory that a test keeps a hand on.
#[derive(Clone, Debug)]
pub(crate) struct Shared(Arc<MemoryStorage>);

impl Shared {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(MemoryStorage::from_bytes(bytes.to_vec())))
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes()
    }
}

impl Storage for Shared {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.write_zeroes(offset, len)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn writable(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "image".to_owned()
    }
}

pub(crate) fn repaired(bytes: &[u8], what: Repair) -> (Result<RepairReport>, Vec<u8>) {
    let storage = Shared::new(bytes);
    let report = repair(Box::new(storage.clone()), what);
    (report, storage.to_bytes())
}

pub(crate) fn checked(bytes: &[u8]) -> Result<CheckReport> {
    check(Box::new(MemoryStorage::from_bytes(bytes.to_vec())))
}

/// Content of each guest cluster, where it can be read.
pub(crate) fn content(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    let Ok(image) = Image::open(Box::new(storage), OpenOptions::default()) else {
        return Vec::new();
    };
    let cluster = image.geometry().cluster_bytes();
    (0..image.size().min(64 << 20).div_ceil(cluster))
        .map(|number| {
            let at = number * cluster;
            let len = cluster.min(image.size() - at);
            let mut buffer = vec![0; usize::try_from(len).unwrap()];
            image.read(&mut buffer, at).ok().map(|()| buffer)
        })
        .collect()
}

/// Severity of an image as one number: 0 clean, 1 leaks, 2 corrupt, 3 cannot be checked.
pub(crate) fn badness(report: &Result<CheckReport>) -> u8 {
    match report {
        Ok(report) => match report.exit_code() {
            0 => 0,
            3 => 1,
            2 => 2,
            _ => 3,
        },
        Err(_) => 4,
    }
}

pub(crate) fn typed(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. })
}
