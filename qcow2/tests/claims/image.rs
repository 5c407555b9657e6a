//! The tables of an image as this test understands them, to break them.

use std::path::Path;

use tidemark_fixtures::corrupt::{get_u32, get_u64, set_u64};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;

pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;

/// An image file in memory.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) bytes: Vec<u8>,
    pub(crate) cluster_bits: u32,
    words: u64,
    order: u32,
}

impl Tables {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let version = get_u32(&bytes, 4);
        let extended = version > 2 && get_u64(&bytes, 72) & 16 != 0;
        Self {
            cluster_bits: get_u32(&bytes, 20),
            words: if extended { 2 } else { 1 },
            order: if version > 2 { get_u32(&bytes, 96) } else { 4 },
            bytes,
        }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn clusters(&self) -> u64 {
        u64::try_from(self.bytes.len())
            .unwrap()
            .div_ceil(self.cluster())
    }

    /// Places of the L2 entries that name a cluster of plain data.
    pub(crate) fn data_entries(&self) -> Vec<u64> {
        self.entries(|entry| entry & COMPRESSED == 0 && entry & OFFSET != 0)
    }

    /// Places of all L2 entries of the active mapping that `wanted` likes.
    pub(crate) fn entries(&self, wanted: impl Fn(u64) -> bool) -> Vec<u64> {
        let l1 = get_u64(&self.bytes, 40);
        let mut found = Vec::new();
        for number in 0..u64::from(get_u32(&self.bytes, 36)) {
            let table = get_u64(&self.bytes, l1 + number * 8) & OFFSET;
            if table == 0 {
                continue;
            }
            for slot in (0..self.cluster() / 8).step_by(usize::try_from(self.words).unwrap()) {
                let at = table + slot * 8;
                if wanted(get_u64(&self.bytes, at)) {
                    found.push(at);
                }
            }
        }
        found
    }

    pub(crate) fn entry(&self, at: u64) -> u64 {
        get_u64(&self.bytes, at)
    }

    pub(crate) fn set_entry(&mut self, at: u64, entry: u64) {
        set_u64(&mut self.bytes, at, entry);
    }

    /// Host cluster that an entry names.
    pub(crate) fn host(&self, at: u64) -> u64 {
        (self.entry(at) & OFFSET) >> self.cluster_bits
    }

    /// Makes the entry at `at` say all that the one at `from` says.
    pub(crate) fn copy_entry(&mut self, at: u64, from: u64) {
        for word in 0..self.words {
            let value = get_u64(&self.bytes, from + word * 8);
            set_u64(&mut self.bytes, at + word * 8, value);
        }
    }

    /// Sets the refcount of a host cluster, as far as its width goes.
    pub(crate) fn set_refcount(&mut self, cluster: u64, value: u64) {
        let per_block = (self.cluster() * 8) >> self.order;
        let table = get_u64(&self.bytes, 48);
        let block = get_u64(&self.bytes, table + cluster / per_block * 8) & OFFSET;
        let slot = cluster % per_block;
        if block == 0 {
            return;
        }
        match self.order {
            0..=2 => {
                let bits = 1 << self.order;
                let shift = slot * bits % 8;
                let at = usize::try_from(block + slot * bits / 8).unwrap();
                let mask = u8::try_from(((1_u64 << bits) - 1) << shift).unwrap();
                let value = u8::try_from((value << shift) & u64::from(mask)).unwrap();
                self.bytes[at] = self.bytes[at] & !mask | value;
            }
            order => {
                let width = 1 << (order - 3);
                let at = usize::try_from(block + slot * width).unwrap();
                let width = usize::try_from(width).unwrap();
                self.bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }

    /// One random damage of refcounts, shared clusters or COPIED flags.
    pub(crate) fn damage(&mut self, random: &mut Random) -> String {
        let entries = self.data_entries();
        let any = |random: &mut Random, list: &[u64]| {
            let count = u64::try_from(list.len()).unwrap();
            list[usize::try_from(random.within(0..count)).unwrap()]
        };
        if entries.is_empty() {
            return "nothing".to_owned();
        }
        match random.within(0..8) {
            0..=2 => {
                let cluster = self.host(any(random, &entries));
                self.set_refcount(cluster, 0);
                format!("refcount 0 of data cluster {cluster}")
            }
            3 => {
                let (cluster, value) = (random.within(0..self.clusters()), random.within(0..3));
                self.set_refcount(cluster, value);
                format!("refcount {value} of cluster {cluster}")
            }
            4 | 5 => {
                let (at, from) = (any(random, &entries), any(random, &entries));
                self.copy_entry(at, from);
                format!("entry at {at:#x} as the one at {from:#x}")
            }
            6 => {
                let free = self.entries(|entry| entry == 0);
                if free.is_empty() {
                    return "nothing".to_owned();
                }
                let (at, from) = (any(random, &free), any(random, &entries));
                self.copy_entry(at, from);
                format!("new entry at {at:#x} as the one at {from:#x}")
            }
            _ => {
                let at = any(random, &entries);
                self.set_entry(at, self.entry(at) ^ COPIED);
                format!("COPIED of the entry at {at:#x}")
            }
        }
    }
}

/// An image that QEMU made: data here and there, a recording bitmap that has bits.
pub(crate) fn by_qemu(path: &Path, size: u64, opts: &[(&str, &str)]) -> Tables {
    qemu_img::create(path, size, opts);
    qemu_img::bitmap_add(path, "b", Some(65536));
    let step = size / 16;
    let writes: Vec<String> = (0..8)
        .map(|number| format!("write -P {} {} 70000", number + 1, number * 2 * step))
        .collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    tidemark_fixtures::oracle::qemu_io::commands(path, &writes);
    Tables::new(std::fs::read(path).unwrap())
}
