//! Taking turns on one image: we write, QEMU writes, we write.

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::{CheckpointEntry, Health, Identity, Proof, Reading, Scheme};
use tidemark_qcow2::{CreateOptions, Error, Image, proof};

use super::common::{create_file, granularity};
use super::{Desk, assert_content, assert_records, operate, qemu_operates, to_u64, to_usize};

const SIZE: u64 = (6 << 20) + 512;

/// Makes a recording bitmap the first checkpoint of a chain.
pub(super) fn begin_chain(image: &Image, name: &str, granule: u64) {
    image
        .update::<_, Error>(|update| {
            let mut bits = update.blank(granularity(granule))?;
            let planted = proof::plant(update.image(), &mut bits)?;
            let mut record = proof::fresh_record(Scheme::Intervals).unwrap();
            let identity = Identity::random().unwrap();
            record.current = Some(identity);
            record.checkpoints.push(CheckpointEntry {
                identity,
                name: name.to_owned(),
                parent: None,
                created: Some(1_700_000_000),
                disk_bytes: Some(update.image().size()),
                granularity: granularity(granule),
                health: Health::Ok,
                proof: Proof::Recording(planted),
                anchor: None,
            });
            update.set_record(Some(record));
            update.put(name, bits, true)
        })
        .unwrap();
}

/// What the chain record says of its only checkpoint, judged by its proofs.
pub(super) fn judge_chain(image: &Image) -> Health {
    let Reading::Current(record) = image.chain() else {
        panic!("the chain record is gone: {:?}", image.chain());
    };
    image.judge(&record.checkpoints[0]).unwrap()
}

#[test]
fn alternating_sessions_miss_no_change() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut sessions = 0;
    for (case, (cluster_bits, granule)) in [
        (9, 512),
        (9, 65536),
        (12, 4096),
        (16, 512),
        (16, 65536),
        (21, 1 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("clusters 2^{cluster_bits}, granularity {granule}");
        let desk = Desk::new();
        let mut random = Random::stream(5, to_u64(case));
        let mut model = vec![0; to_usize(SIZE)];
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(SIZE)
        };
        let image = create_file(&desk.path, &options);
        operate(&image, &mut model, &mut random, 8);
        // The record needs room that clusters of 512 bytes do not have.
        let chained = cluster_bits > 9;
        if chained {
            begin_chain(&image, "b", granule);
        } else {
            super::common::add_bitmap(&image, "b", granule);
        }
        let base = model.clone();
        image.close().unwrap();
        for round in 0..6 {
            if round % 2 == 0 {
                qemu_operates(&desk.path, &mut model, &mut random, 5);
            } else {
                desk.session(|image| operate(image, &mut model, &mut random, 8));
            }
            let what = format!("{what}, round {round}");
            desk.assert_clean();
            assert_content(&desk, &model, &what);
            assert_records(&desk, "b", &base, &model, &what);
            if chained {
                assert_eq!(desk.look(judge_chain), Health::Ok, "{what}");
            }
            sessions += 1;
        }
    }
    println!("{sessions} sessions, each judged by both");
}

#[test]
fn bitmaps_come_and_go_in_turns() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let desk = Desk::new();
    let mut random = Random::new(8);
    let mut model = vec![0; to_usize(SIZE)];
    create_file(&desk.path, &CreateOptions::new(SIZE))
        .close()
        .unwrap();
    let mut live: Vec<(String, Vec<u8>)> = Vec::new();
    for round in 0..12 {
        let name = format!("b{round}");
        if round % 2 == 0 {
            desk.session(|image| {
                super::common::add_bitmap(image, &name, 4096);
                operate(image, &mut model.clone(), &mut Random::new(1), 0);
            });
        } else {
            qemu_img::bitmap_add(&desk.path, &name, Some(65536));
        }
        live.push((name, model.clone()));
        qemu_operates(&desk.path, &mut model, &mut random, 3);
        desk.session(|image| operate(image, &mut model, &mut random, 4));
        if live.len() > 3 {
            let (gone, _) = live.remove(0);
            if round % 3 == 0 {
                qemu_img::bitmap_remove(&desk.path, &gone);
            } else {
                desk.session(|image| image.update(|update| update.remove(&gone)).unwrap());
            }
        }
        desk.assert_clean();
        for (name, then) in &live {
            assert_records(&desk, name, then, &model, &format!("round {round}"));
        }
    }
    println!("12 bitmaps added and {} removed in turns", 12 - live.len());
}
