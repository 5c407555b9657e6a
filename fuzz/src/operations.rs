//! Bytes become the shape of a new image and operations on it; a plain vector says what it must
//! hold.
//!
//! Checked: every read back agrees with the model, after every reopening and in the end, for the
//! engine and, without compressed clusters and subclusters, for the mini reader; a discard shows zeros or what was there; the
//! bitmap of each period covers every byte that changed in it; the image ends without leaks or
//! damage. Not checked: crashes, failing storage, threads, backing files, what QEMU says; those
//! have sweeps and tests of their own.

use tidemark_fixtures::image_bits;
use tidemark_fixtures::model::DiskModel;
use tidemark_fixtures::ops::{Op, fill};
use tidemark_fixtures::storage::CrashStorage;
use tidemark_qcow2::{
    CompressionType, CreateOptions, Error, Granularity, Image, OpenOptions, proof,
};

use crate::input::Input;

/// Operations of one input at most.
const MAX_OPERATIONS: usize = 48;

/// What one step is: an operation of the common language, or one that only some images know.
enum Step {
    Op(Op),
    /// Compressed data into so many whole clusters.
    Compressed {
        offset: u64,
        len: u64,
        seed: u64,
    },
}

/// Runs the operations of `data`; panics when image and model disagree.
pub fn operations(data: &[u8]) {
    operations_with(data, |op| op.clone());
}

/// The same with a model that is told something else about each operation: only a true account
/// may pass, which is how the tests know that this target can fail.
pub fn operations_with(data: &[u8], told: impl Fn(&Op) -> Op) {
    let mut input = Input::new(data);
    let options = shape(&mut input);
    let mut world = World::new(&options);
    let mut count = 0;
    while !input.is_empty() && count < MAX_OPERATIONS {
        let step = step(&mut input, options.size, 1 << options.cluster_bits);
        world.run(&step, &told);
        count += 1;
    }
    world.end();
}

/// Any kind of image that keeps its data in itself, of 64 KiB to 1 MiB.
fn shape(input: &mut Input<'_>) -> CreateOptions {
    let version = 2 + u32::from(input.byte() & 1);
    let compression_type = match version == 3 && input.byte() & 1 == 1 {
        true => CompressionType::Zstd,
        false => CompressionType::Zlib,
    };
    let cluster_bits = 9 + u32::from(input.byte() % 8);
    let refcount_bits = match version {
        2 => 16,
        _ => 1 << (input.byte() % 7),
    };
    let extended_l2 = version == 3 && cluster_bits >= 14 && input.byte() & 1 == 1;
    let size = (64 << 10) + input.number(2) % 1920 * 512;
    CreateOptions {
        version,
        compression_type,
        cluster_bits,
        refcount_bits,
        extended_l2,
        ..CreateOptions::new(size)
    }
}

fn step(input: &mut Input<'_>, size: u64, cluster: u64) -> Step {
    let kind = input.byte();
    let seed = u64::from(kind) << 8 | 1;
    match kind % 16 {
        0..=6 => {
            let (offset, len) = input.range(size);
            let seed = seed + input.number(1);
            Step::Op(Op::Write { offset, len, seed })
        }
        7 | 8 => {
            let (offset, len) = input.range(size);
            Step::Op(Op::WriteZeroes { offset, len })
        }
        9 | 10 => {
            let (offset, len) = input.range(size);
            Step::Op(Op::Discard { offset, len })
        }
        11 | 12 => {
            let offset = input.number(2) % size.div_ceil(cluster) * cluster;
            let len = (cluster * (1 + u64::from(input.byte() % 3))).min(size - offset);
            Step::Compressed { offset, len, seed }
        }
        13 => Step::Op(Op::Flush),
        14 => Step::Op(Op::Checkpoint),
        _ => Step::Op(Op::Reopen),
    }
}

struct World {
    storage: CrashStorage,
    image: Option<Image>,
    model: DiskModel,
    /// What the disk held when each period began; none without bitmaps.
    moments: Vec<Vec<u8>>,
}

fn writing() -> OpenOptions {
    OpenOptions {
        writable: true,
        ..OpenOptions::default()
    }
}

impl World {
    fn new(options: &CreateOptions) -> Self {
        let storage = CrashStorage::new(Vec::new());
        let image = Image::create(Box::new(storage.clone()), options, writing());
        let mut world = Self {
            storage,
            image: Some(image.expect("the shape is a possible one")),
            model: DiskModel::new(options.size),
            moments: Vec::new(),
        };
        if options.version == 3 {
            world.begin_period();
        }
        world
    }

    fn image(&self) -> &Image {
        self.image.as_ref().expect("the image is open")
    }

    fn run(&mut self, step: &Step, told: &impl Fn(&Op) -> Op) {
        let image = self.image();
        let (op, result) = match step {
            Step::Compressed { offset, len, seed } => {
                let (offset, len, seed) = (*offset, *len, *seed);
                let result = image.write_compressed(&fill(seed, len), offset);
                (Op::Write { offset, len, seed }, result)
            }
            Step::Op(op) => (op.clone(), apply(image, op)),
        };
        result.unwrap_or_else(|error| panic!("{op:?}: {error}"));
        if let Some(range) = self.model.apply(&told(&op)) {
            let mut bytes =
                vec![0; usize::try_from(range.end - range.start).expect("a small disk")];
            let read = self.image().read(&mut bytes, range.start);
            read.expect("a discarded range can be read");
            self.model.settle(range, &bytes);
        }
        match op {
            Op::Reopen => self.reopen(),
            Op::Checkpoint if !self.moments.is_empty() => self.begin_period(),
            _ => {}
        }
    }

    fn reopen(&mut self) {
        let image = self.image.take().expect("the image is open");
        image.close().expect("a sound image can be closed");
        let bytes = self.storage.to_bytes();
        self.storage = CrashStorage::new(bytes);
        let image = Image::open(Box::new(self.storage.clone()), writing());
        self.image = Some(image.expect("what was closed can be opened"));
        self.compare();
    }

    /// Freezes the recording bitmap, if there is one, and begins another.
    fn begin_period(&mut self) {
        let number = self.moments.len();
        let begun = self.image().update::<_, Error>(|update| {
            if let Some(old) = number.checked_sub(1).map(|old| format!("c{old}")) {
                let bits = update.load(&old)?;
                update.put(&old, bits, false)?;
            }
            let granularity = Granularity::from_bytes(512).expect("512 is a granularity");
            let mut new = update.blank(granularity)?;
            proof::plant(update.image(), &mut new)?;
            update.put(&format!("c{number}"), new, true)
        });
        begun.expect("a checkpoint can be taken");
        self.moments.push(self.model.content().to_vec());
    }

    fn compare(&self) {
        let mut content = vec![0; self.model.content().len()];
        let read = self.image().read(&mut content, 0);
        read.expect("a sound disk can be read");
        assert!(content == self.model.content(), "image and model disagree");
    }

    fn end(mut self) {
        self.compare();
        self.reopen();
        let report = self.image().check().expect("a sound image can be checked");
        assert!(report.is_clean(), "{:?}", report.findings);
        match image_bits::guest_content(&self.storage.to_bytes()) {
            Ok(stored) => assert!(stored == self.model.content(), "the mini reader disagrees"),
            // It knows neither; a compression type that is not zlib is a feature of its own.
            Err(reason) => {
                let known = ["compressed", "incompatible features"];
                assert!(known.iter().any(|known| reason.contains(known)), "{reason}");
            }
        }
        for (number, moment) in self.moments.iter().enumerate() {
            let until = self.moments.get(number + 1);
            let until = until.map_or(self.model.content(), Vec::as_slice);
            let bits = self.image().load_bitmap(&format!("c{number}"));
            let bits = bits.expect("the bitmap can be read");
            for (granule, (old, new)) in moment.chunks(512).zip(until.chunks(512)).enumerate() {
                let at = u64::try_from(granule).expect("a small disk") * 512;
                assert!(old == new || bits.test(at), "c{number} misses {at:#x}");
            }
        }
    }
}

fn apply(image: &Image, op: &Op) -> Result<(), Error> {
    match *op {
        Op::Write { offset, len, seed } => image.write(&fill(seed, len), offset),
        Op::WriteZeroes { offset, len } => image.write_zeroes(offset, len),
        Op::Discard { offset, len } => image.discard(offset, len),
        Op::Flush => image.flush(),
        Op::Checkpoint | Op::Reopen => Ok(()),
    }
}
