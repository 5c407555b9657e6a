//! The bytes of a chain record, assembled here by hand from docs/format.md.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use proptest::prelude::*;
use tidemark_qcow2::Granularity;
use tidemark_qcow2::chain::{
    AnchorProof, ChainRecord, CheckpointEntry, Descent, Detail, FrozenProof, Head, Health,
    Identity, ImageUuid, Intent, IntentKind, Proof, Reading, RecordingProof, Scheme, read,
};

/// CRC-32 of IEEE 802.3, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1))
        })
    })
}

fn record() -> ChainRecord {
    ChainRecord {
        image: ImageUuid([0x11; 16]),
        scheme: Scheme::Intervals,
        current: Some(Identity([0xbb; 16])),
        intent: None,
        decisions: vec![Identity([0xdd; 16])],
        descents: vec![Descent {
            image: ImageUuid([0x22; 16]),
            checkpoint: Identity([0x33; 16]),
        }],
        directory_digest: 0x0102_0304,
        checkpoints: vec![
            CheckpointEntry {
                identity: Identity([0xaa; 16]),
                name: "mon".to_owned(),
                parent: None,
                created: Some(1_700_000_000),
                disk_bytes: Some(1 << 30),
                granularity: Granularity::from_bits(16).unwrap(),
                health: Health::Ok,
                proof: Proof::Frozen(FrozenProof {
                    checksum: 0xcafe_babe,
                    count: 5,
                }),
                anchor: Some(AnchorProof {
                    seconds: 0x0102_0304,
                    nanoseconds: 5,
                    l1_checksum: 0xfeed_f00d,
                }),
            },
            CheckpointEntry {
                identity: Identity([0xbb; 16]),
                name: "tue".to_owned(),
                parent: Some(Identity([0xaa; 16])),
                created: None,
                disk_bytes: None,
                granularity: Granularity::from_bits(16).unwrap(),
                health: Health::Reset,
                proof: Proof::Recording(RecordingProof {
                    count: 2,
                    smallest_disk_bytes: 1 << 30,
                    planted: vec![65536],
                    witnesses: vec![0, 131_072],
                }),
                anchor: None,
            },
        ],
    }
}

fn golden_slot(generation: u32) -> Vec<u8> {
    let be64 = |value: u64| value.to_be_bytes().to_vec();
    let body: Vec<Vec<u8>> = vec![
        vec![0x11; 16],
        vec![0],          // intervals
        vec![1],          // current, no intent
        vec![1, 2, 3, 4], // digest
        vec![0xbb; 16],   // current
        vec![1],
        vec![0xdd; 16], // one decision
        vec![1],
        vec![0x22; 16],
        vec![0x33; 16], // one descent
        vec![0, 2],     // two checkpoints
        vec![0xaa; 16],
        b"\x03mon".to_vec(),
        vec![2 | 4 | 8 | 32, 0, 16], // time, size, frozen, anchored; ok; 64 KiB
        be64(1_700_000_000),
        be64(1 << 30),
        vec![1, 2, 3, 4, 0, 0, 0, 5, 0xfe, 0xed, 0xf0, 0x0d],
        vec![0xca, 0xfe, 0xba, 0xbe],
        be64(5),
        vec![0xbb; 16],
        b"\x03tue".to_vec(),
        vec![1 | 16, 7, 16], // parent, recording; reset
        vec![0xaa; 16],
        be64(2),
        be64(1 << 30),
        vec![1],
        be64(65536),
        vec![2],
        be64(0),
        be64(131_072),
    ];
    let body = body.concat();
    let mut slot = u32::try_from(body.len() + 12)
        .unwrap()
        .to_be_bytes()
        .to_vec();
    slot.extend_from_slice(&generation.to_be_bytes());
    slot.extend_from_slice(&body);
    slot.extend_from_slice(&crc32(&slot).to_be_bytes());
    slot
}

#[test]
fn a_record_has_the_bytes_of_the_document() {
    assert_eq!(record().encode_slot(9, Detail::Full), golden_slot(9));
    assert_eq!(
        ChainRecord::decode_slot(&golden_slot(9)),
        Some((9, record()))
    );
}

#[test]
fn a_head_has_the_bytes_of_the_document() {
    let head = Head {
        active: Some(1),
        slots: [344, 1344],
        generation: 9,
    };
    let mut bytes = vec![1, 1, 0, 43, 0, 168, 0, 0, 0, 0, 0, 9];
    bytes.extend_from_slice(&crc32(&bytes).to_be_bytes());
    assert_eq!(head.encode().as_slice(), bytes);
    assert_eq!(Head::decode(&bytes), Some(head));
}

fn extension(active: usize, first: &[u8], second: &[u8]) -> Vec<u8> {
    let slots = [16, 16 + first.len().next_multiple_of(8)];
    let head = Head {
        active: Some(active),
        slots,
        generation: 9,
    };
    let mut data = head.encode().to_vec();
    data.extend_from_slice(first);
    data.resize(slots[1], 0);
    data.extend_from_slice(second);
    data
}

#[test]
fn a_damaged_active_slot_leaves_the_older_one_as_stale() {
    let (old, new) = (golden_slot(8), golden_slot(9));
    assert_eq!(read(&extension(1, &old, &new)), Reading::Current(record()));
    for at in 0..new.len() {
        let mut torn = new.clone();
        torn[at] ^= 0x40;
        assert_eq!(
            read(&extension(1, &old, &torn)),
            Reading::Stale(record()),
            "byte {at}"
        );
        let nothing = vec![0; old.len()];
        assert_eq!(
            read(&extension(1, &nothing, &torn)),
            Reading::Damaged,
            "byte {at}"
        );
    }
    // A whole slot of another generation is not the one that the head means.
    assert_eq!(read(&extension(1, &new, &old)), Reading::Stale(record()));
}

#[test]
fn a_damaged_head_is_no_record() {
    let data = extension(0, &golden_slot(9), &golden_slot(8));
    for at in 0..16 {
        let mut torn = data.clone();
        torn[at] ^= 1;
        assert_eq!(read(&torn), Reading::Damaged, "byte {at}");
    }
}

#[test]
fn less_detail_drops_witnesses_and_then_times_and_nothing_else() {
    let whole = record();
    let read_back = |detail| {
        ChainRecord::decode_slot(&whole.encode_slot(1, detail))
            .unwrap()
            .1
    };
    let mut expected = whole.clone();
    if let Proof::Recording(proof) = &mut expected.checkpoints[1].proof {
        proof.witnesses.clear();
    }
    assert_eq!(read_back(Detail::WithTimes), expected);
    expected.checkpoints[0].created = None;
    expected.checkpoints[0].disk_bytes = None;
    assert_eq!(read_back(Detail::Required), expected);
}

fn identity() -> impl Strategy<Value = Identity> {
    any::<[u8; 16]>().prop_map(Identity)
}

fn entry() -> impl Strategy<Value = CheckpointEntry> {
    let health = prop::sample::select(vec![Health::Ok, Health::Recovered, Health::Lost]);
    let proof = prop_oneof![
        Just(Proof::None),
        (any::<u32>(), any::<u64>())
            .prop_map(|(checksum, count)| Proof::Frozen(FrozenProof { checksum, count })),
        (
            any::<u64>(),
            any::<u64>(),
            any::<Vec<u8>>(),
            any::<[u64; 3]>()
        )
            .prop_map(|(count, smallest_disk_bytes, planted, witnesses)| {
                Proof::Recording(RecordingProof {
                    count,
                    smallest_disk_bytes,
                    planted: planted.into_iter().map(u64::from).take(255).collect(),
                    witnesses: witnesses.to_vec(),
                })
            }),
    ];
    (
        identity(),
        "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,60}",
        any::<Option<[u8; 16]>>(),
        any::<Option<u64>>(),
        any::<Option<u64>>(),
        (9u8..=31, health, proof, any::<Option<[u32; 3]>>()),
    )
        .prop_map(
            |(identity, name, parent, created, disk_bytes, (bits, health, proof, anchor))| {
                let parent = parent.map(Identity);
                let granularity = Granularity::from_bits(bits).unwrap();
                CheckpointEntry {
                    identity,
                    name,
                    parent,
                    created,
                    disk_bytes,
                    granularity,
                    health,
                    proof,
                    anchor: anchor.map(|[seconds, nanoseconds, l1_checksum]| AnchorProof {
                        seconds,
                        nanoseconds,
                        l1_checksum,
                    }),
                }
            },
        )
}

proptest! {
    #[test]
    fn every_record_survives_its_bytes(
        entries in prop::collection::vec(entry(), 0..20),
        current in any::<Option<[u8; 16]>>(),
        intent in any::<Option<(bool, [u8; 16])>>(),
        generation in any::<u32>(),
    ) {
        let mut record = record();
        record.checkpoints = entries;
        record.current = current.map(Identity);
        record.intent = intent.map(|(backup, id)| Intent {
            kind: if backup { IntentKind::Backup } else { IntentKind::Create },
            transaction: Identity(id),
            checkpoint: Identity(id),
            decider: "vda".to_owned(),
            decider_image: ImageUuid(id),
        });
        let slot = record.encode_slot(generation, Detail::Full);
        prop_assert_eq!(ChainRecord::decode_slot(&slot), Some((generation, record)));
        prop_assert_eq!(ChainRecord::decode_slot(&slot[..slot.len() - 1]), None);
    }
}
