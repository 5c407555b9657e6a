//! Writes the seed corpus: `cargo run -p tidemark-fuzz --example seed`.

use std::path::Path;

use tidemark_bitmap::Granularity;
use tidemark_fixtures::builder::{Bitmap, Chunk, ImageBuilder};
use tidemark_fixtures::hostile::hostile_images;
use tidemark_fixtures::hostile::nbd::{Stage, hostile_clients};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::ChainRecord;
use tidemark_qcow2::chain::{
    CheckpointEntry, Detail, FrozenProof, Head, Health, Identity, ImageUuid, Intent, IntentKind,
    Proof, RecordingProof, Scheme,
};

/// Largest seed: small inputs are mutated faster.
const MAX_SEED: usize = 8 << 10;

fn put(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    std::fs::create_dir_all(&folder).expect("the corpus folder can be made");
    std::fs::write(folder.join(name), bytes).expect("the seed can be written");
}

fn record() -> ChainRecord {
    let mut record = ChainRecord::new(ImageUuid([1; 16]), Scheme::Intervals);
    let entry = |number: u8, parent, proof| CheckpointEntry {
        identity: Identity([number; 16]),
        name: format!("c{number}"),
        parent,
        created: Some(1_700_000_000),
        disk_bytes: Some(1 << 30),
        granularity: Granularity::from_bits(16).expect("64 KiB is a granularity"),
        health: Health::Ok,
        proof,
        anchor: None,
    };
    record.checkpoints = vec![
        entry(
            1,
            None,
            Proof::Frozen(FrozenProof {
                checksum: 7,
                count: 9,
            }),
        ),
        entry(
            2,
            Some(Identity([1; 16])),
            Proof::Recording(RecordingProof {
                count: 3,
                smallest_disk_bytes: 1 << 30,
                planted: vec![0, 65536],
                witnesses: vec![131_072],
            }),
        ),
    ];
    record.current = Some(Identity([2; 16]));
    record.intent = Some(Intent {
        kind: IntentKind::Create,
        transaction: Identity([3; 16]),
        checkpoint: Identity([2; 16]),
        decider: "vda".to_owned(),
        decider_image: ImageUuid([1; 16]),
    });
    record.decisions = vec![Identity([3; 16])];
    record
}

/// Operations and damages are numbers: good seeds are short runs of any bytes.
fn put_numbers(target: &str, count: u64, len: u64) {
    for number in 0..count {
        let mut random = Random::stream(7, number);
        let bytes = (0..len).map(|_| random.next_u64().to_le_bytes()[0]);
        put(
            target,
            &format!("numbers_{number}"),
            &bytes.collect::<Vec<u8>>(),
        );
    }
}

/// What hostile NBD clients say, each at its stage.
fn put_clients() {
    for (number, client) in hostile_clients().into_iter().enumerate() {
        let stage = match client.stage {
            Stage::Greeted => 0,
            Stage::Options => 1,
            Stage::Structured => 2,
            Stage::Simple => 3,
            Stage::Chunks => 4,
            Stage::Extended => 5,
        };
        let bytes = [&[stage], &client.sends[..]].concat();
        put("nbd", &format!("client_{number}"), &bytes);
    }
}

fn main() {
    put_clients();
    put_numbers("operations", 16, 160);
    put_numbers("damage", 48, 20);
    put_numbers("repair", 48, 20);
    for hostile in hostile_images() {
        if hostile.bytes.len() <= MAX_SEED {
            let name: String = hostile
                .name
                .chars()
                .map(|c| if c.is_alphanumeric() { c } else { '_' })
                .collect();
            put("open", &name, &hostile.bytes);
        }
    }
    for (name, order) in [("one_bit", 0), ("sixteen_bits", 4), ("wide", 6)] {
        let bitmap = Bitmap::new("b0", 16).table(vec![Chunk::Bits(vec![0x81])]);
        let image = ImageBuilder::new(64 << 10)
            .cluster_bits(9)
            .refcount_order(order)
            .bitmap(bitmap)
            .build();
        put("open", &format!("sound_{name}"), &image.bytes);
        put("header", name, &image.bytes[..512]);
        if let Some(place) = image.find("bitmap_directory") {
            let start = usize::try_from(place.offset).expect("a small image");
            let mut seed = vec![1];
            seed.extend_from_slice(&image.bytes[start..start + 32]);
            put("directory", name, &seed);
        }
    }
    put(
        "table",
        "zeros_ones_cluster",
        &[[0; 8], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0]].concat(),
    );
    let slot = record().encode_slot(5, Detail::Full);
    put("chain", "slot", &slot);
    put("chain", "record", &slot[8..slot.len() - 4]);
    let head = Head {
        active: Some(0),
        slots: [16, 16],
        generation: 5,
    };
    put(
        "chain",
        "extension",
        &[head.encode().as_slice(), &slot].concat(),
    );
}
