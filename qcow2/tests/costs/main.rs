//! Cost follows the question: what is read and written for one bitmap, call by call, where others lie
//! beside it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod stored;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use common::{granularity, writing};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{Bitmap, CreateOptions, Error, Image, OpenOptions, Storage, Update};

/// A storage that remembers which bytes were read and written.
#[derive(Clone, Debug)]
struct Watched {
    bytes: CrashStorage,
    touched: Arc<Mutex<Touched>>,
}

#[derive(Clone, Debug, Default)]
struct Touched {
    reads: Vec<Range<u64>>,
    writes: Vec<Range<u64>>,
}

impl Touched {
    fn bytes(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }
}

impl Watched {
    fn new(bytes: CrashStorage) -> Self {
        Self {
            bytes,
            touched: Arc::default(),
        }
    }

    /// What was touched since the last call.
    fn take(&self) -> Touched {
        std::mem::take(&mut self.touched.lock().unwrap())
    }
}

fn range(offset: u64, len: usize) -> Range<u64> {
    offset..offset + u64::try_from(len).unwrap()
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let count = self.bytes.read_at(buf, offset)?;
        self.touched
            .lock()
            .unwrap()
            .reads
            .push(range(offset, count));
        Ok(count)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.touched
            .lock()
            .unwrap()
            .writes
            .push(range(offset, buf.len()));
        self.bytes.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.touched
            .lock()
            .unwrap()
            .writes
            .push(offset..offset + len);
        self.bytes.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.bytes.flush()
    }

    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.set_len(len)
    }

    fn writable(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        "watched".to_owned()
    }
}

fn be(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + len]
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Tables and pages of each bitmap, read from the bytes as the specification has them.
fn places(bytes: &[u8]) -> BTreeMap<String, Vec<Range<u64>>> {
    let cluster = 1 << be(bytes, 20, 4);
    let mut at = be(bytes, 100, 4);
    while be(bytes, at, 4) != 0x2385_2875 {
        assert_ne!(be(bytes, at, 4), 0, "the image has bitmaps");
        at += 8 + be(bytes, at + 4, 4).next_multiple_of(8);
    }
    let (count, mut entry) = (be(bytes, at + 8, 4), be(bytes, at + 24, 8));
    let mut places = BTreeMap::new();
    for _ in 0..count {
        let (table, entries) = (be(bytes, entry, 8), be(bytes, entry + 8, 4));
        let name_len = be(bytes, entry + 18, 2);
        let name =
            &bytes[usize::try_from(entry).unwrap() + 24..][..usize::try_from(name_len).unwrap()];
        let pages = (0..entries).map(|number| be(bytes, table + number * 8, 8) & !1);
        let mut own: Vec<Range<u64>> = pages
            .filter(|&page| page != 0)
            .map(|page| page..page + cluster)
            .collect();
        own.push(table..table + entries * 8);
        places.insert(String::from_utf8(name.to_vec()).unwrap(), own);
        entry += (24 + name_len).next_multiple_of(8);
    }
    places
}

fn meets(touched: &[Range<u64>], places: &[Range<u64>]) -> bool {
    touched.iter().any(|range| {
        places
            .iter()
            .any(|place| range.start < place.end && place.start < range.end)
    })
}

const SIZE: u64 = 8 << 30;
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// Six bitmaps of 32 pages, a third of them ones, a third bits; only `e` records.
fn crowd() -> CrashStorage {
    let storage = CrashStorage::new(Vec::new());
    let options = CreateOptions {
        cluster_bits: 16,
        ..CreateOptions::new(SIZE)
    };
    let image = Image::create(Box::new(storage.clone()), &options, writing()).unwrap();
    image
        .update::<_, Error>(|update| {
            for name in NAMES {
                let bits = pattern(update);
                update.put(name, bits, name == "e")?;
            }
            Ok(())
        })
        .unwrap();
    image.close().unwrap();
    storage
}

fn pattern(update: &Update<'_>) -> Bitmap {
    let mut bits = update.blank(granularity(512)).unwrap();
    let page = bits.shape().page_range(0).end;
    for number in 0..bits.shape().pages() {
        let start = u64::try_from(number).unwrap() * page;
        match number % 3 {
            0 => bits.mark(start..start + page).unwrap(),
            1 => bits.mark(start + 4096..start + 40_960).unwrap(),
            _ => {}
        }
    }
    bits
}

type Call = fn(&Image) -> Result<(), Error>;

/// What is done, and the bitmap that it is about; none for a call about no bitmap's bits.
const CALLS: [(&str, Option<&str>, Call); 12] = [
    ("list", None, |image| image.bitmaps().map(drop)),
    ("add", Some("new"), |image| {
        image.update(|update| {
            let bits = update.blank(granularity(65536))?;
            update.put("new", bits, false)
        })
    }),
    ("load", Some("b"), |image| image.load_bitmap("b").map(drop)),
    ("remove", Some("b"), |image| {
        image.update(|update| update.remove("b"))
    }),
    ("disable", Some("e"), |image| {
        image.update(|update| update.set_recording("e", false))
    }),
    ("enable", Some("c"), |image| {
        image.update(|update| update.set_recording("c", true))
    }),
    ("clear", Some("c"), |image| {
        image.update(|update| {
            let bits = update.blank(granularity(512))?;
            update.put("c", bits, false)
        })
    }),
    ("merge from elsewhere", Some("d"), |image| {
        image.update(|update| {
            let mut bits = update.load("d")?;
            bits.mark(0..SIZE / 2).unwrap();
            update.put("d", bits, false)
        })
    }),
    ("write", Some("e"), |image| {
        image.write(&[1; 5000], 3 << 20)?;
        image.flush()
    }),
    ("overwrite", Some("e"), |image| {
        image.write(&[1; 5000], 3 << 20)?;
        image.write(&[2; 5000], 3 << 20)?;
        image.flush()
    }),
    ("read", None, |image| image.read(&mut [0; 5000], 3 << 20)),
    ("flush", None, Image::flush),
];

/// Also opening and closing are part of every call here.
#[test]
fn no_call_about_one_bitmap_touches_another() {
    let mut cases = 0;
    for (what, about, call) in CALLS {
        let storage = crowd();
        let before = places(&storage.to_bytes());
        let watched = Watched::new(storage.clone());
        let image = Image::open(Box::new(watched.clone()), writing()).unwrap();
        let opening = watched.take();
        call(&image).unwrap();
        image.close().unwrap();
        let touched = watched.take();
        let after = places(&storage.to_bytes());
        for (name, own) in before.iter().chain(&after) {
            assert!(!meets(&opening.reads, own), "opening reads {name}");
            if about != Some(name) {
                // Tables are read where a writer must know what not to write on; bits never.
                let (table, pages) = own.split_last().unwrap();
                assert!(!meets(&touched.reads, pages), "{what} reads bits of {name}");
                assert!(
                    !meets(&touched.writes, pages),
                    "{what} writes bits of {name}"
                );
                let table = std::slice::from_ref(table);
                assert!(
                    !meets(&touched.writes, table),
                    "{what} writes the table of {name}"
                );
            }
        }
        for (name, own) in before
            .iter()
            .filter(|(name, _)| about != Some(name.as_str()))
        {
            assert_eq!(after.get(name), Some(own), "{what} moved {name}");
        }
        cases += 1;
    }
    println!("{cases} calls beside {} bitmaps", NAMES.len());
    assert_eq!(cases, 12);
}

/// The directory of a hundred bitmaps is all that an open reads of them.
#[test]
fn opening_beside_a_hundred_bitmaps_of_16_tib_reads_their_directory() {
    let storage = CrashStorage::new(Vec::new());
    let image = Image::create(
        Box::new(storage.clone()),
        &CreateOptions::new(16 << 40),
        writing(),
    )
    .unwrap();
    let mut costs = Vec::new();
    for bitmaps in [1, 100] {
        image
            .update::<_, Error>(|update| {
                for number in update.bitmaps().len()..bitmaps {
                    let mut bits = update.blank(granularity(65536))?;
                    bits.mark(0..1 << 30).unwrap();
                    update.put(&format!("bitmap {number}"), bits, false)?;
                }
                Ok(())
            })
            .unwrap();
        let watched = Watched::new(storage.clone());
        let reader = Image::open(Box::new(watched.clone()), OpenOptions::default()).unwrap();
        assert_eq!(reader.bitmaps().unwrap().len(), bitmaps);
        let reads = watched.take().reads;
        for (name, own) in places(&storage.to_bytes()) {
            assert!(!meets(&reads, &own), "opening reads {name}");
        }
        costs.push(Touched::bytes(&reads));
    }
    let entry = (24 + "bitmap 99".len()).next_multiple_of(8);
    println!("{costs:?} bytes read");
    assert!(costs[1] - costs[0] <= u64::try_from(100 * entry).unwrap());
}
