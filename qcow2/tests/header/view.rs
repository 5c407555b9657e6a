//! What a header says, and every write to the first cluster with its tears.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tidemark_fixtures::corrupt::{get_u32, get_u64};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::Reading;
use tidemark_qcow2::{Error, Image, MemoryStorage, Storage};

use crate::desk::*;

/// Extensions by type, without bitmaps and chain; and the backing name.
pub(crate) fn foreign_parts(bytes: &[u8]) -> (BTreeMap<u32, Vec<u8>>, Vec<u8>) {
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let (name, len) = (at(get_u64(bytes, 8)), at(get_u32(bytes, 16).into()));
    let cluster = 1_usize << get_u32(bytes, 20);
    let bound = if name == 0 { cluster } else { name };
    let mut parts = BTreeMap::new();
    let mut offset = at(get_u32(bytes, 100).into());
    while offset + 8 <= bound {
        let place = u64::try_from(offset).unwrap();
        let (kind, length) = (get_u32(bytes, place), at(get_u32(bytes, place + 4).into()));
        if kind == 0 {
            break;
        }
        if kind != BITMAPS && kind != CHAIN {
            parts.insert(kind, bytes[offset + 8..offset + 8 + length].to_vec());
        }
        offset += 8 + length.next_multiple_of(8);
    }
    (parts, bytes[name..name + len].to_vec())
}

/// Everything that a header says: bitmaps with their bits, the record, foreign parts.
#[derive(Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) bitmaps: Vec<(String, bool, u64)>,
    pub(crate) chain: Reading,
    pub(crate) foreign: (BTreeMap<u32, Vec<u8>>, Vec<u8>),
}

/// Without what is left out first when room is short: steps of one change differ in that.
pub(crate) fn required(reading: Reading) -> Reading {
    let Reading::Current(mut record) = reading else {
        return reading;
    };
    for entry in &mut record.checkpoints {
        (entry.created, entry.disk_bytes) = (None, None);
    }
    Reading::Current(record)
}

impl View {
    pub(crate) fn of(bytes: &[u8]) -> Result<Self, Error> {
        let storage = MemoryStorage::from_bytes(bytes.to_vec());
        let image = Image::open_unbacked(Box::new(storage), true)?;
        let mut bitmaps = Vec::new();
        for info in image.bitmaps()? {
            let count = image.load_bitmap(&info.name)?.count();
            bitmaps.push((info.name, info.auto, count));
        }
        Ok(Self {
            bitmaps,
            chain: required(image.chain()),
            foreign: foreign_parts(bytes),
        })
    }
}

/// One write to the first cluster, and what the file held before it.
#[derive(Clone, Debug)]
pub(crate) struct HeaderWrite {
    pub(crate) before: Vec<u8>,
    pub(crate) offset: usize,
    pub(crate) data: Vec<u8>,
}

/// Storage in memory that keeps every write to the first cluster.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    pub(crate) state: Arc<Mutex<(Vec<u8>, Vec<HeaderWrite>)>>,
    pub(crate) cluster: usize,
}

impl Watched {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let cluster = 1 << get_u32(bytes, 20);
        Self {
            state: Arc::new(Mutex::new((bytes.to_vec(), Vec::new()))),
            cluster,
        }
    }

    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut (Vec<u8>, Vec<HeaderWrite>)) -> R) -> R {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

pub(crate) fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|(bytes, _)| {
            let start = at(offset).min(bytes.len());
            let count = buf.len().min(bytes.len() - start);
            buf[..count].copy_from_slice(&bytes[start..start + count]);
            Ok(count)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with(|(bytes, writes)| {
            let start = at(offset);
            if start < self.cluster {
                let (before, data) = (bytes.clone(), buf.to_vec());
                writes.push(HeaderWrite {
                    before,
                    offset: start,
                    data,
                });
            }
            let end = start + buf.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[start..end].copy_from_slice(buf);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; at(len)], offset)
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|(bytes, _)| Ok(u64::try_from(bytes.len()).unwrap()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|(bytes, _)| bytes.resize(at(len), 0));
        Ok(())
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "watched".to_owned()
    }
}

impl HeaderWrite {
    /// The file after a crash that kept the sectors that `keeps` accepts.
    pub(crate) fn torn(&self, keeps: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut bytes = self.before.clone();
        for (number, sector) in self.data.chunks(SECTOR).enumerate() {
            if keeps(number) {
                let start = self.offset + number * SECTOR;
                if bytes.len() < start + sector.len() {
                    bytes.resize(start + sector.len(), 0);
                }
                bytes[start..start + sector.len()].copy_from_slice(sector);
            }
        }
        bytes
    }

    /// Torn at every sector in both directions, each sector alone, each one missing, and at random.
    pub(crate) fn tears(&self) -> Vec<Vec<u8>> {
        assert_eq!(self.offset % SECTOR, 0, "a header write within a sector");
        let sectors = self.data.len().div_ceil(SECTOR);
        let mut images = vec![self.torn(|_| false), self.torn(|_| true)];
        for cut in 0..sectors {
            images.push(self.torn(|number| number < cut));
            images.push(self.torn(|number| number >= cut));
            images.push(self.torn(|number| number == cut));
            images.push(self.torn(|number| number != cut));
        }
        for round in 0..16 {
            let chosen = Random::stream(77, round).next_u64();
            images.push(self.torn(|number| chosen >> (number % 61) & 1 == 1));
        }
        let mut seen = std::collections::HashSet::new();
        images.retain(|image| seen.insert(image[..self.before.len().min(1 << 21)].to_vec()));
        images
    }
}
