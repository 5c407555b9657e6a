//! Random walks through our layouts and QEMU's.

use tidemark_fixtures::corrupt::{get_u32, get_u64};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::Reading;
use tidemark_qcow2::{Error, Feature, Image};

use crate::common;
use crate::desk::*;
use crate::tear::*;
use crate::view::*;

/// Extensions in their order, without the end marker.
pub(crate) fn extensions(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
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

pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;

/// Rewrites the first cluster as QEMU does: its own extensions first, unknown ones in reverse, then
/// the backing name. `None` when QEMU would find no room.
pub(crate) fn rewritten(bytes: &[u8], name: &[u8]) -> Option<Vec<u8>> {
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
pub(crate) fn our_copy_of_qemus_header_layout_is_right() {
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
pub(crate) fn random_change(image: &Image, random: &mut Random) -> Result<(), Error> {
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
pub(crate) fn walk(cluster_bits: u32, steps: usize, total: &mut (usize, usize, usize)) {
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
pub(crate) fn every_path_through_the_layouts_keeps_the_header_whole() {
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
