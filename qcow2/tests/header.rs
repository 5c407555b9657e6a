//! The first cluster: room for QEMU's own rewrite, and every tear of every write to it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tempfile::TempDir;
use tidemark_fixtures::corrupt::{get_u32, get_u64};
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::chain::{
    ChainRecord, CheckpointEntry, FrozenProof, Health, Identity, ImageUuid, Proof, Reading,
    RecordingProof, Scheme,
};
use tidemark_qcow2::{
    BackingReference, CreateOptions, Error, Feature, FileStorage, Image, MemoryStorage, Sharing,
    Storage,
};

use common::granularity;

const SIZE: u64 = 1 << 20;
const SECTOR: usize = 512;
const BITMAPS: u32 = 0x2385_2875;
const CHAIN: u32 = 0x5449_4445;

/// Granularity of the bitmap `b`: one coarse bit where a record has only room for one position.
fn granule(cluster_bits: u32) -> u64 {
    if cluster_bits < 11 { SIZE } else { 65536 }
}

/// A folder with a raw file that backs the image, and the image.
struct Desk {
    _folder: TempDir,
    path: PathBuf,
}

/// A relative name of the backing file with `len` bytes.
fn backing_name(len: usize) -> String {
    let dots = "./".repeat((len - 4) / 2);
    let name = if len.is_multiple_of(2) {
        format!("{dots}base")
    } else {
        format!("{dots}/base")
    };
    assert_eq!(name.len(), len);
    name
}

impl Desk {
    fn new() -> Self {
        // In memory where possible: durability is not what these tests are about.
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        std::fs::write(folder.path().join("base"), vec![0x5a; 100_000]).unwrap();
        let path = folder.path().join("image.qcow2");
        Self {
            _folder: folder,
            path,
        }
    }

    fn put(bytes: &[u8]) -> Self {
        let desk = Self::new();
        std::fs::write(&desk.path, bytes).unwrap();
        desk
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn open(&self) -> Image {
        common::open_file(&self.path, common::writing())
    }

    fn chain(&self) -> Reading {
        let storage = FileStorage::open(&self.path, false, Sharing::Exclusive).unwrap();
        Image::open_unbacked(Box::new(storage), false)
            .unwrap()
            .chain()
    }
}

/// A new image with one bitmap `b`, and a backing file whose name has `name_len` bytes (0: none).
/// `None` when the name does not fit, or its place cannot be changed safely.
fn fresh(cluster_bits: u32, name_len: usize) -> Option<Vec<u8>> {
    let desk = Desk::new();
    let backing = (name_len > 0).then(|| BackingReference {
        name: backing_name(name_len).into_bytes(),
        format: "raw".to_owned(),
    });
    let options = CreateOptions {
        cluster_bits,
        backing,
        ..CreateOptions::new(SIZE)
    };
    let storage = FileStorage::create(&desk.path).unwrap();
    let image = match Image::create(Box::new(storage), &options, common::writing()) {
        Ok(image) => image,
        Err(Error::Invalid { .. }) => return None,
        Err(error) => panic!("{error}"),
    };
    image.write(&[0x11; 3000], 70_000).unwrap();
    image.flush().unwrap();
    let added = image.update(|update| {
        let bits = update.blank(granularity(granule(cluster_bits)))?;
        update.put("b", bits, true)
    });
    image.close().unwrap();
    match added {
        Ok(()) => Some(desk.bytes()),
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A record of `count` checkpoints, the last of which is the recording bitmap `b`.
fn record_of(count: usize, image: &Image, random: &mut Random) -> ChainRecord {
    let mut identity = || {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&random.next_u64().to_be_bytes());
        bytes[8..].copy_from_slice(&random.next_u64().to_be_bytes());
        bytes
    };
    let mut record = ChainRecord::new(ImageUuid(identity()), Scheme::Intervals);
    for number in 1..=count {
        let newest = number == count;
        let proof = if newest {
            Proof::Recording(planted(granule(image.geometry().cluster_bits)))
        } else {
            let checksum = 0x1234_0000 + u32::try_from(number).unwrap();
            Proof::Frozen(FrozenProof { checksum, count: 7 })
        };
        record.checkpoints.push(CheckpointEntry {
            identity: Identity(identity()),
            name: if newest {
                "b".to_owned()
            } else {
                format!("c{number:04}")
            },
            parent: record.current,
            created: Some(1_700_000_000),
            disk_bytes: Some(SIZE),
            granularity: granularity(granule(image.geometry().cluster_bits)),
            health: Health::Ok,
            proof,
        });
        record.current = record.checkpoints.last().map(|entry| entry.identity);
    }
    record
}

/// The proof of a bitmap with as many planted bits as we ever plant.
fn planted(granule: u64) -> RecordingProof {
    let planted: Vec<u64> = (0..SIZE / granule)
        .map(|bit| bit * granule)
        .take(16)
        .collect();
    RecordingProof {
        count: u64::try_from(planted.len()).unwrap(),
        smallest_disk_bytes: SIZE,
        planted,
        witnesses: Vec::new(),
    }
}

/// Publishes a record of `count` checkpoints and the bits that it says are planted.
fn publish(image: &Image, count: usize) -> Result<(), Error> {
    image.update(|update| {
        let record = record_of(count, update.image(), &mut Random::new(9));
        let mut bits = update.load("b")?;
        for entry in &record.checkpoints {
            if let Proof::Recording(proof) = &entry.proof {
                for &offset in &proof.planted {
                    bits.mark(offset..offset + 1)
                        .map_err(tidemark_qcow2::Mistake::Bitmap)
                        .unwrap();
                }
            }
        }
        update.put("b", bits, true)?;
        update.set_record(Some(record));
        Ok(())
    })
}

fn unbacked(bytes: &[u8]) -> Image {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    Image::open_unbacked(Box::new(storage), true).unwrap()
}

/// Whether `count` checkpoints fit; when not, the refusal must be typed and nothing written.
fn fits(bytes: &[u8], count: usize) -> bool {
    let storage = CrashStorage::new(bytes.to_vec());
    let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    match publish(&image, count) {
        Ok(()) => true,
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => {
            let log = storage.log();
            let writes = log
                .events()
                .iter()
                .filter(|event| event.is_change())
                .count();
            assert_eq!(
                writes, 0,
                "something was written before the refusal of {count}"
            );
            false
        }
        Err(error) => panic!("{count} checkpoints: {error}"),
    }
}

/// The largest number of checkpoints that fit, 0 when not even one does.
fn most(bytes: &[u8]) -> usize {
    if !fits(bytes, 1) {
        return 0;
    }
    let mut low = 1;
    let mut high = 2;
    while fits(bytes, high) {
        (low, high) = (high, high * 2);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(bytes, middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// Bytes by which a backing name must be able to grow beside our record.
fn growth(cluster_bits: u32, name_len: usize) -> usize {
    let promised = match cluster_bits {
        9 | 10 => 8,
        11 => 192,
        12 => 480,
        _ => 1023,
    };
    promised.min(1023 - name_len)
}

/// Whatever QEMU does to its header, our record is there afterwards, word for word.
fn qemu_works_on(desk: &Desk, cluster_bits: u32, name_len: usize, what: &str) {
    let record = desk.chain();
    assert!(matches!(record, Reading::Current(_)), "{what}: {record:?}");
    let check = |step: &str| {
        assert!(
            desk.chain() == record,
            "{what}: {step} lost the record: {:?}",
            desk.chain()
        );
    };
    qemu_io::commands(&desk.path, &["write -P 0x22 200k 9000"]);
    check("a guest write");
    let grown = backing_name((name_len + growth(cluster_bits, name_len)).max(4));
    qemu_img::rebase_unsafe(&desk.path, &grown, "raw");
    check("rebase to a longer name");
    qemu_img::ok(&["resize", "-q", "-f", "qcow2", desk.text(), "+1M"]);
    check("resize");
    qemu_img::bitmap_add(&desk.path, "foreign", None);
    check("adding a bitmap");
    qemu_img::bitmap_remove(&desk.path, "foreign");
    check("removing a bitmap");
}

/// Our next session and our next structural change work after QEMU's rewrite.
fn we_work_on(desk: &Desk, what: &str) {
    let image = desk.open();
    image.write(&[0x33; 5000], 400_000).unwrap();
    image
        .close()
        .unwrap_or_else(|error| panic!("{what}: close after a guest write: {error}"));
    let Reading::Current(before) = desk.chain() else {
        panic!("{what}: our guest write lost the record");
    };
    let image = desk.open();
    image
        .update(|update| {
            let bits = update.blank(granularity(65536))?;
            update.put("ours", bits, true)
        })
        .unwrap_or_else(|error| panic!("{what}: update: {error}"));
    image.close().unwrap();
    let Reading::Current(after) = desk.chain() else {
        panic!("{what}: our update lost the record");
    };
    assert_eq!(after.current, before.current, "{what}");
    assert_eq!(after.checkpoints.len(), before.checkpoints.len(), "{what}");
    qemu_img::check(&desk.path).assert_clean();
    qemu_io::commands(&desk.path, &["write -P 0x44 600k 9000"]);
    qemu_img::check(&desk.path).assert_clean();
    assert_eq!(
        desk.chain(),
        Reading::Current(after),
        "{what}: QEMU's second rewrite"
    );
    let image = desk.open();
    for info in image.bitmaps().unwrap() {
        assert!(info.auto && !info.in_use, "{what}: {}", info.name);
        assert!(
            image.load_bitmap(&info.name).unwrap().test(600 << 10),
            "{what}: {}",
            info.name
        );
    }
}

#[test]
fn qemu_has_room_for_its_header_beside_our_record() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let (mut cases, mut without) = (0, Vec::new());
    for cluster_bits in 9..=21 {
        for name_len in [0, 8, 1000] {
            // One name is enough where there is plenty of room.
            if name_len != 8 && matches!(cluster_bits, 14 | 15 | 17..=20) {
                continue;
            }
            let Some(bytes) = fresh(cluster_bits, name_len) else {
                continue;
            };
            let most = most(&bytes);
            println!("clusters 2^{cluster_bits}, name of {name_len}: {most} checkpoints fit");
            if most == 0 {
                without.push((cluster_bits, name_len));
                continue;
            }
            let mut counts = vec![most];
            if matches!(cluster_bits, 11 | 12 | 16) {
                counts.extend([1, 3].into_iter().filter(|&count| count < most));
            }
            for count in counts {
                let what = format!("clusters 2^{cluster_bits}, name of {name_len}, {count}");
                let desk = Desk::put(&bytes);
                let image = desk.open();
                publish(&image, count).unwrap();
                image.close().unwrap();
                qemu_works_on(&desk, cluster_bits, name_len, &what);
                we_work_on(&desk, &what);
                cases += 1;
            }
        }
    }
    println!("{cases} headers, no room for a record in {without:?}");
}

/// Where a name grew beyond what is kept for it, the record stays, recording goes on, and a change
/// is refused before the first byte.
#[test]
fn a_name_longer_than_promised_stops_changes_and_nothing_else() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let mut cases = 0;
    for (cluster_bits, name_len) in [(11, 700), (12, 1023), (10, 400), (9, 180)] {
        let bytes = fresh(cluster_bits, 8).unwrap();
        let desk = Desk::put(&bytes);
        let image = desk.open();
        publish(&image, most(&bytes)).unwrap();
        image.close().unwrap();
        let record = desk.chain();
        let name = backing_name(name_len);
        let path = desk.text();
        let rebase = [
            "rebase", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", path,
        ];
        if !qemu_img::run(&rebase).success() {
            println!("2^{cluster_bits}: QEMU itself has no room for {name_len} bytes");
            assert_eq!(desk.chain(), record, "a refused rebase");
            continue;
        }
        assert_eq!(desk.chain(), record);
        let image = desk.open();
        image.write(&[0x66; 700], 300_000).unwrap();
        image.close().unwrap();
        assert_eq!(desk.chain(), record, "2^{cluster_bits}: a guest write");
        let before = desk.bytes();
        let image = desk.open();
        assert!(
            image.load_bitmap("b").unwrap().test(300_000),
            "recording ended"
        );
        let error = grow_record(&image).unwrap_err();
        assert!(
            matches!(error.feature(), Some(Feature::NoRoomInFirstCluster { .. })),
            "2^{cluster_bits}: {error}"
        );
        image.close().unwrap();
        assert!(
            desk.bytes() == before,
            "something was written before the refusal"
        );
        qemu_img::check(&desk.path).assert_clean();
        // A shorter name brings the room back.
        qemu_img::rebase_unsafe(&desk.path, "base", "raw");
        let image = desk.open();
        change_record(&image).unwrap();
        image.close().unwrap();
        assert!(matches!(desk.chain(), Reading::Current(_)));
        qemu_img::check(&desk.path).assert_clean();
        cases += 1;
    }
    println!("{cases} names too long");
}

/// Without room for a record the image still records, for both.
#[test]
fn an_image_without_room_for_a_record_still_records() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let bytes = fresh(9, 150).unwrap();
    assert_eq!(most(&bytes), 0);
    let desk = Desk::put(&bytes);
    let image = desk.open();
    image.write(&[1; 100], 900_000).unwrap();
    image.close().unwrap();
    qemu_img::check(&desk.path).assert_clean();
    let image = desk.open();
    assert!(image.load_bitmap("b").unwrap().test(900_000));
}

/// Extensions by type, without bitmaps and chain; and the backing name.
fn foreign_parts(bytes: &[u8]) -> (BTreeMap<u32, Vec<u8>>, Vec<u8>) {
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
struct View {
    bitmaps: Vec<(String, bool, u64)>,
    chain: Reading,
    foreign: (BTreeMap<u32, Vec<u8>>, Vec<u8>),
}

/// Without what is left out first when room is short: steps of one change differ in that.
fn required(reading: Reading) -> Reading {
    let Reading::Current(mut record) = reading else {
        return reading;
    };
    for entry in &mut record.checkpoints {
        (entry.created, entry.disk_bytes) = (None, None);
    }
    Reading::Current(record)
}

impl View {
    fn of(bytes: &[u8]) -> Result<Self, Error> {
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
struct HeaderWrite {
    before: Vec<u8>,
    offset: usize,
    data: Vec<u8>,
}

/// Storage in memory that keeps every write to the first cluster.
#[derive(Clone, Debug)]
struct Watched {
    state: Arc<Mutex<(Vec<u8>, Vec<HeaderWrite>)>>,
    cluster: usize,
}

impl Watched {
    fn new(bytes: &[u8]) -> Self {
        let cluster = 1 << get_u32(bytes, 20);
        Self {
            state: Arc::new(Mutex::new((bytes.to_vec(), Vec::new()))),
            cluster,
        }
    }

    fn with<R>(&self, work: impl FnOnce(&mut (Vec<u8>, Vec<HeaderWrite>)) -> R) -> R {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn at(offset: u64) -> usize {
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
    fn torn(&self, keeps: impl Fn(usize) -> bool) -> Vec<u8> {
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
    fn tears(&self) -> Vec<Vec<u8>> {
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

/// What one structural change does.
type Change = fn(&Image) -> Result<(), Error>;

/// Tears every header write of `change` on `bytes`; returns writes, images, and images that QEMU
/// judged.
fn tear(bytes: &[u8], change: Change, sample: usize, what: &str) -> (usize, usize, usize) {
    let storage = Watched::new(bytes);
    let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    match change(&image) {
        Ok(()) => {}
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => {
            return (0, 0, 0);
        }
        Err(error) => panic!("{what}: {error}"),
    }
    drop(image);
    let (after, writes) = storage.with(|state| state.clone());
    let (old, new) = (View::of(bytes).unwrap(), View::of(&after).unwrap());
    assert_ne!(old, new, "{what}: nothing changed");
    assert_eq!(old.foreign, new.foreign, "{what}: foreign parts changed");
    let (mut images, mut judged) = (0, 0);
    for (step, write) in writes.iter().enumerate() {
        for torn in write.tears() {
            let what = format!("{what}, write {step} of {}, image {images}", writes.len());
            let view = View::of(&torn).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(
                view == old || view == new,
                "{what}: {view:#?}\nold {old:#?}\nnew {new:#?}"
            );
            if images % sample == 0 {
                judge(&torn, &view, &what);
                judged += 1;
            }
            images += 1;
        }
    }
    (writes.len(), images, judged)
}

/// QEMU opens a torn image, shows the same bitmaps, and finds at worst leaks; we can go on.
fn judge(torn: &[u8], view: &View, what: &str) {
    let desk = Desk::put(torn);
    let info = qemu_img::info(&desk.path);
    let listed = info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .map_or(0, Vec::len);
    assert_eq!(listed, view.bitmaps.len(), "{what}: {info}");
    qemu_img::check(&desk.path).assert_at_worst_leaks();
    let image = unbacked(torn);
    common::add_bitmap(&image, "after the crash", 65536);
    assert_eq!(
        image.bitmaps().unwrap().len(),
        view.bitmaps.len() + 1,
        "{what}"
    );
}

fn change_bitmaps(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut bits = update.blank(granularity(4096))?;
        bits.mark(0..SIZE / 3).unwrap();
        update.put("second", bits, false)
    })
}

fn change_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update
            .record()
            .cloned()
            .unwrap_or_else(|| ChainRecord::new(ImageUuid([1; 16]), Scheme::Cumulative));
        record.decisions.push(Identity([7; 16]));
        update.set_record(Some(record));
        Ok(())
    })
}

/// More than is kept free for us in any cluster of 4 KiB or less.
fn grow_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update.record().cloned().unwrap();
        record.decisions = vec![Identity([7; 16]); 60];
        update.set_record(Some(record));
        Ok(())
    })
}

fn change_both(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let bits = update.blank(granularity(512))?;
        update.put("third", bits, true)?;
        let count = update.record().map_or(0, |record| record.checkpoints.len());
        let record = record_of(count + 1, update.image(), &mut Random::new(4));
        update.set_record(Some(record));
        Ok(())
    })
}

/// The same number of bytes, so that it finds room wherever the old record had it.
fn turn_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update.record().cloned().unwrap_or_else(|| {
            let mut record = ChainRecord::new(ImageUuid([1; 16]), Scheme::Cumulative);
            record.current = Some(Identity([1; 16]));
            record
        });
        record.image.0.reverse();
        update.set_record(Some(record));
        Ok(())
    })
}

fn drop_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        update.set_record(None);
        update.remove("b")
    })
}

/// As many checkpoints as fit.
const MOST: usize = usize::MAX;

/// The same image as we lay it out, and as QEMU does.
fn layouts(cluster_bits: u32, name_len: usize, checkpoints: usize) -> Vec<(&'static str, Vec<u8>)> {
    let Some(bytes) = fresh(cluster_bits, name_len) else {
        return Vec::new();
    };
    let desk = Desk::put(&bytes);
    if checkpoints > 0 {
        let image = desk.open();
        let count = if checkpoints == MOST {
            most(&bytes).min(400)
        } else {
            checkpoints
        };
        if publish(&image, count).is_err() {
            return Vec::new();
        }
        image.close().unwrap();
    }
    let ours = desk.bytes();
    qemu_io::commands(&desk.path, &["write -P 0x22 200k 100"]);
    vec![("ours", ours), ("QEMU's", desk.bytes())]
}

#[test]
fn every_tear_of_a_header_write_leaves_the_old_or_the_new_header() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let changes: [(&str, Change); 5] = [
        ("bitmaps", change_bitmaps),
        ("record", change_record),
        ("both", change_both),
        ("turn", turn_record),
        ("drop", drop_record),
    ];
    let mut total = (0, 0, 0);
    for cluster_bits in [9, 10, 11, 12, 16] {
        for (name_len, checkpoints) in [(0, 0), (0, 1), (8, 0), (8, 4), (300, 2), (1000, 30)] {
            for (layout, bytes) in layouts(cluster_bits, name_len, checkpoints) {
                for (change_name, change) in changes {
                    let what = format!(
                        "2^{cluster_bits}, name {name_len}, {checkpoints:x} checkpoints, {layout} \
                         layout, change of {change_name}"
                    );
                    let (writes, images, judged) = tear(&bytes, change, 61, &what);
                    total = (total.0 + writes, total.1 + images, total.2 + judged);
                }
            }
        }
    }
    println!(
        "{} header writes, {} torn images, {} judged by QEMU",
        total.0, total.1, total.2
    );
    assert!(
        total.0 > 100 && total.1 > 1000,
        "the sweep shrank: {total:?}"
    );
}

/// Extensions in their order, without the end marker.
fn extensions(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut list = Vec::new();
    let mut offset = u64::from(get_u32(bytes, 100));
    let name = get_u64(bytes, 8);
    let bound = if name == 0 {
        1 << get_u32(bytes, 20)
    } else {
        name
    };
    while offset + 8 <= bound {
        let (kind, len) = (
            get_u32(bytes, offset),
            u64::from(get_u32(bytes, offset + 4)),
        );
        if kind == 0 {
            break;
        }
        list.push((kind, bytes[at(offset + 8)..at(offset + 8 + len)].to_vec()));
        offset += 8 + len.next_multiple_of(8);
    }
    list
}

const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Rewrites the first cluster as QEMU does: its own extensions first, unknown ones in reverse, then
/// the backing name. `None` when QEMU would find no room.
fn rewritten(bytes: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    let cluster = 1_usize << get_u32(bytes, 20);
    let mut list = extensions(bytes);
    list.retain(|(kind, _)| *kind != FEATURE_NAMES && *kind != BACKING_FORMAT);
    let (known, mut unknown): (Vec<_>, Vec<_>) =
        list.into_iter().partition(|(kind, _)| *kind == BITMAPS);
    unknown.reverse();
    let mut ordered = Vec::new();
    if !name.is_empty() {
        ordered.push((BACKING_FORMAT, b"raw".to_vec()));
    }
    if cluster > 4096 {
        ordered.push((FEATURE_NAMES, vec![0x41; 384]));
    }
    ordered.extend(known);
    ordered.extend(unknown);
    ordered.push((0, Vec::new()));
    let mut out = bytes[..112].to_vec();
    for (kind, data) in ordered {
        out.extend(kind.to_be_bytes());
        out.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        out.extend(&data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    let name_offset = if name.is_empty() {
        0
    } else {
        u64::try_from(out.len()).unwrap()
    };
    out.extend(name);
    if out.len() > cluster {
        return None;
    }
    out.resize(cluster, 0);
    out[8..16].copy_from_slice(&name_offset.to_be_bytes());
    out[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    out.extend(&bytes[cluster..]);
    Some(out)
}

#[test]
fn our_copy_of_qemus_header_layout_is_right() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    for cluster_bits in [11, 12, 13, 16] {
        for (layout, bytes) in layouts(cluster_bits, 9, 2) {
            let desk = Desk::put(&bytes);
            qemu_img::rebase_unsafe(&desk.path, ".//base", "raw");
            let real = desk.bytes();
            let copy = rewritten(&bytes, b".//base").unwrap();
            let shape = |bytes: &[u8]| -> Vec<(u32, usize)> {
                extensions(bytes)
                    .into_iter()
                    .map(|(kind, data)| (kind, data.len()))
                    .collect()
            };
            assert_eq!(shape(&copy), shape(&real), "2^{cluster_bits}, {layout}");
            assert_eq!(copy[8..20], real[8..20], "2^{cluster_bits}, {layout}");
        }
    }
}

/// One random change by us; what it may refuse is only the room.
fn random_change(image: &Image, random: &mut Random) -> Result<(), Error> {
    let size = usize::try_from(random.within(0..60)).unwrap();
    let size = if random.one_in(2) { size / 8 } else { size };
    let seed = random.next_u64();
    match random.within(0..6) {
        0 => image.update(|update| {
            update.set_record(None);
            Ok(())
        }),
        1 => change_bitmaps(image),
        2 => image.update(|update| match update.remove("second") {
            Err(Error::Invalid { .. }) => Ok(()),
            answer => answer,
        }),
        _ => image.update(|update| {
            let record = record_of(size, update.image(), &mut Random::new(seed));
            update.set_record(Some(record));
            Ok(())
        }),
    }
}

/// A random walk through layouts: our changes, and rewrites in QEMU's order under other names.
fn walk(cluster_bits: u32, steps: usize, total: &mut (usize, usize, usize)) {
    let mut bytes = fresh(cluster_bits, 8).unwrap();
    let mut random = Random::stream(31, cluster_bits.into());
    for step in 0..steps {
        let what = format!("2^{cluster_bits}, step {step}");
        let old = View::of(&bytes).unwrap();
        if random.one_in(3) {
            let longest = [12, 60, 300, 1020][usize::try_from(random.within(0..4)).unwrap()];
            let name = backing_name(usize::try_from(random.within(7..longest)).unwrap());
            let name = if random.one_in(5) { "" } else { &name };
            if let Some(next) = rewritten(&bytes, name.as_bytes()) {
                bytes = next;
                let new = View::of(&bytes).unwrap();
                assert_eq!(
                    (&new.chain, &new.bitmaps),
                    (&old.chain, &old.bitmaps),
                    "{what}"
                );
            }
            continue;
        }
        let storage = Watched::new(&bytes);
        let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
        let answer = random_change(&image, &mut random);
        drop(image);
        let (after, writes) = storage.with(|state| state.clone());
        match answer {
            Ok(()) => {}
            Err(Error::Unsupported {
                feature: Feature::NoRoomInFirstCluster { .. },
                ..
            }) => {
                assert!(
                    after == bytes,
                    "{what}: something was written before the refusal"
                );
                total.2 += 1;
                continue;
            }
            Err(error) => panic!("{what}: {error}"),
        }
        let new = View::of(&after).unwrap();
        assert!(
            !matches!(new.chain, Reading::Stale(_) | Reading::Damaged),
            "{what}"
        );
        assert_eq!(new.foreign, old.foreign, "{what}: foreign parts changed");
        for write in &writes {
            for torn in write.tears() {
                let view = View::of(&torn).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(view == old || view == new, "{what}: {view:#?}");
                total.1 += 1;
            }
        }
        total.0 += 1;
        bytes = after;
    }
}

#[test]
fn every_path_through_the_layouts_keeps_the_header_whole() {
    let _turn = common::alone();
    let mut total = (0, 0, 0);
    for (cluster_bits, steps) in [(9, 60), (10, 60), (11, 120), (12, 120), (13, 60), (16, 25)] {
        walk(cluster_bits, steps, &mut total);
    }
    println!(
        "{} changes, {} torn images, {} without room",
        total.0, total.1, total.2
    );
    assert!(total.0 > 120 && total.2 > 10, "the walk shrank: {total:?}");
}
