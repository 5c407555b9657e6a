//! Time and memory follow what a file holds, not what it claims.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tidemark_fixtures::builder::BuiltImage;
use tidemark_qcow2::Storage;
use tidemark_qcow2::check::check;

use crate::corpus::{COPIED, healthy};
use crate::report;

/// A file of exabytes of which only some pages exist.
#[derive(Debug)]
struct Sparse {
    len: u64,
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
}

const PAGE: u64 = 4096;

impl Sparse {
    fn new(image: &BuiltImage, len: u64) -> Self {
        let pages = image.bytes.chunks(4096).enumerate().map(|(number, bytes)| {
            let mut page = bytes.to_vec();
            page.resize(4096, 0);
            (u64::try_from(number).unwrap(), page)
        });
        Self {
            len,
            pages: Mutex::new(pages.collect()),
        }
    }
}

impl Storage for Sparse {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let pages = self.pages.lock().unwrap();
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap();
        let count = buf.len().min(left);
        let mut done = 0;
        while done < count {
            let at = offset + u64::try_from(done).unwrap();
            let slot = usize::try_from(at % PAGE).unwrap();
            let step = (4096 - slot).min(count - done);
            match pages.get(&(at / PAGE)) {
                Some(page) => buf[done..done + step].copy_from_slice(&page[slot..slot + step]),
                None => buf[done..done + step].fill(0),
            }
            done += step;
        }
        Ok(count)
    }
    fn hole_at(&self, offset: u64) -> io::Result<u64> {
        let pages = self.pages.lock().unwrap();
        let next = pages
            .range(offset / PAGE..)
            .next()
            .map_or(self.len, |(page, _)| page * PAGE);
        Ok(next.saturating_sub(offset))
    }
    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        panic!("a check writes nothing")
    }
    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        panic!("a check writes nothing")
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        panic!("a check writes nothing")
    }
    fn set_len(&self, _len: u64) -> io::Result<()> {
        panic!("a check writes nothing")
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }
    fn writable(&self) -> bool {
        false
    }
    fn name(&self) -> String {
        "sparse".to_owned()
    }
}

/// Peak memory of this process, bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let number = line.split_whitespace().nth(1).unwrap();
    number.parse::<u64>().unwrap() << 10
}

#[test]
fn a_file_of_exabytes_costs_what_its_structures_hold() {
    type Case = (&'static str, u32, fn(&mut BuiltImage));
    let cases: [Case; 6] = [
        ("untouched", 16, |_| ()),
        ("small clusters", 9, |_| ()),
        ("largest clusters", 21, |_| ()),
        ("data far away", 16, |i| i.set("l2[0][0]", 1 << 55 | COPIED)),
        ("a refcount block far away", 16, |i| {
            i.set("refcount_table[1]", 1 << 55)
        }),
        ("tables of the largest size, in holes", 16, |i| {
            i.set("header.l1_size", 4_194_304);
            i.set("header.l1_table_offset", 1 << 54);
            i.set("header.refcount_table_clusters", 128);
            i.set("header.nb_snapshots", 65_536);
            i.set("header.snapshots_offset", 1 << 53);
        }),
    ];
    for (name, cluster_bits, patch) in cases {
        let mut image = healthy(cluster_bits, 4).build();
        patch(&mut image);
        let started = Instant::now();
        let report = check(Box::new(Sparse::new(&image, 1 << 60))).unwrap();
        let time = started.elapsed();
        assert!(time < Duration::from_secs(2), "{name}: {time:?}");
        println!("{name}: {time:?}, exit {}", report.exit_code());
    }
    let peak = peak_memory();
    assert!(peak < 700 << 20, "{peak} bytes of memory");
}

#[test]
fn tables_that_many_entries_share_are_read_once() {
    let mut image = healthy(12, 4).build();
    let l2 = image.place("l2[0]").offset;
    let entries = 1 << 20;
    let l1 = image.len();
    let table: Vec<u8> = (0..entries).flat_map(|_| l2.to_be_bytes()).collect();
    image.bytes.extend_from_slice(&table);
    image.set("header.l1_table_offset", l1);
    image.set("header.l1_size", entries);
    let snapshots = image.len();
    for _ in 0..65_536 {
        let mut entry = [0; 56];
        entry[..8].copy_from_slice(&l1.to_be_bytes());
        entry[8..12].copy_from_slice(&u32::try_from(entries).unwrap().to_be_bytes());
        entry[39] = 16;
        image.bytes.extend_from_slice(&entry);
    }
    image
        .bytes
        .resize(image.bytes.len().next_multiple_of(4096), 0);
    image.set("header.nb_snapshots", 65_536);
    image.set("header.snapshots_offset", snapshots);
    let block = image.place("refcount_block[0]").offset;
    let blocks: Vec<u8> = (0..512).flat_map(|_| block.to_be_bytes()).collect();
    image.put("refcount_table", &blocks);
    let started = Instant::now();
    let report = report(&image.bytes);
    let time = started.elapsed();
    assert!(time < Duration::from_secs(4), "{time:?}");
    assert_eq!(report.exit_code(), 2);
    println!("{time:?}, {} corruptions", report.corruptions);
}
