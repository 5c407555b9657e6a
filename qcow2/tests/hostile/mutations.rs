//! Images with one byte changed, anywhere.

use std::sync::OnceLock;

use proptest::prelude::*;
use tidemark_fixtures::golden;
use tidemark_qcow2::Image;

use crate::chain::image_with_chain;
use crate::probe::{peak_memory, read_everything, write_open};

fn bases() -> &'static [(&'static str, Vec<u8>)] {
    static BASES: OnceLock<Vec<(&str, Vec<u8>)>> = OnceLock::new();
    BASES.get_or_init(|| {
        let names = [
            "v2",
            "bitmaps",
            "in-use",
            "snapshot",
            "compressed",
            "refcount-1",
        ];
        let golden = names.into_iter().map(|name| (name, golden::load(name)));
        let ours = ["ours", "ours again", "ours and again"];
        golden
            .chain(ours.into_iter().map(|name| (name, image_with_chain())))
            .collect()
    })
}

/// Places where a byte is likely to mean something: the header, and all that is not zero, but
/// only the start of runs of one byte, which are guest data.
fn telling(bytes: &[u8]) -> Vec<usize> {
    let differs = |at: usize| at < 4 || bytes[at] != bytes[at - 4];
    (0..bytes.len())
        .filter(|&at| at < 256 || (bytes[at] != 0 && differs(at)))
        .collect()
}

fn places() -> &'static [Vec<usize>] {
    static PLACES: OnceLock<Vec<Vec<usize>>> = OnceLock::new();
    PLACES.get_or_init(|| bases().iter().map(|(_, bytes)| telling(bytes)).collect())
}

/// Some changes of data and bitmaps, whatever each answers.
fn change(image: &Image) {
    let _ = image.write(&[0x5A; 5000], 3000);
    let _ = image.write(&[0x5B; 512], image.size() / 2);
    let _ = image.write_zeroes(65_536, 65_536);
    let _ = image.discard(0, 4096);
    let _ = image.flush();
    for bitmap in image.bitmaps().unwrap_or_default() {
        let _ = image.update::<_, tidemark_qcow2::Error>(|update| {
            let bits = update.load(&bitmap.name)?;
            update.put("another", bits, true)?;
            update.remove(&bitmap.name)
        });
    }
}

fn survives(bytes: &[u8]) -> Result<(), String> {
    read_everything(bytes)?;
    write_open(bytes, change).map(|_| ())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn an_image_with_one_byte_changed_never_panics(
        base in 0..9_usize,
        place in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let (name, bytes) = &bases()[base];
        let at = *place.get(&places()[base]);
        let mut changed = bytes.clone();
        changed[at] = value;
        let answer = survives(&changed);
        prop_assert!(answer.is_ok(), "{name}, byte {at} = {value:#x}: {answer:?}");
    }
}

#[test]
fn every_byte_of_the_header_may_have_any_of_some_values() {
    let bytes = image_with_chain();
    let mut complaints = Vec::new();
    for at in 0..600 {
        for value in [0, 0xFF, bytes[at] ^ 1, bytes[at] ^ 0x80] {
            let mut changed = bytes.clone();
            changed[at] = value;
            if let Err(text) = survives(&changed) {
                complaints.push(format!("byte {at} = {value:#x}: {text}"));
            }
        }
    }
    assert!(
        complaints.is_empty(),
        "{}:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    let peak = peak_memory();
    assert!(peak < 1 << 30, "{peak} bytes of memory");
}

/// Every word that tells something, as numbers that break arithmetic.
#[test]
fn every_word_of_the_metadata_may_be_extreme() {
    const EXTREMES: [u64; 10] = [
        0,
        1,
        u64::MAX,
        1 << 63,
        i64::MAX.cast_unsigned(),
        0x00FF_FFFF_FFFF_FE00,
        0x8000_0000_0000_1000,
        0xFFFF_FFFF_0000_0000,
        0x0000_0001_FFFF_FFFF,
        0x4000_0000_0000_0000,
    ];
    let (mut complaints, mut count) = (Vec::new(), 0);
    for ((name, bytes), places) in bases()[..7].iter().zip(places()) {
        let mut words: Vec<usize> = places.iter().map(|at| at / 8 * 8).collect();
        words.dedup();
        for at in words {
            for value in EXTREMES {
                let mut changed = bytes.clone();
                changed[at..at + 8].copy_from_slice(&value.to_be_bytes());
                count += 1;
                if let Err(text) = survives(&changed) {
                    complaints.push(format!("{name}, word {at} = {value:#x}: {text}"));
                }
            }
        }
    }
    println!("{count} images");
    assert!(
        complaints.is_empty(),
        "{}:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

/// A header longer than the first sector once made the first write panic: what one write changes
/// must stand in that sector.
#[test]
fn a_header_longer_than_a_sector_is_read_and_not_written() {
    let bytes = golden::load("v3");
    for length in [464_u32, 512, 624, 4096, 65_520] {
        let mut long = bytes.clone();
        long[100..104].copy_from_slice(&length.to_be_bytes());
        long[usize::try_from(length).unwrap()..][..8].fill(0);
        read_everything(&long).unwrap().opened.unwrap();
        let (opened, after) = write_open(&long, change).unwrap();
        let feature = opened.expect_err("it must not be written");
        assert!(feature.feature().is_some(), "{length}: {feature}");
        assert!(after == long);
    }
}

#[test]
fn a_header_cut_at_any_byte_is_refused() {
    let bytes = image_with_chain();
    for len in 0..112 {
        let seen = read_everything(&bytes[..len]).unwrap();
        let error = seen.opened.expect_err("a header cannot end there");
        assert!(
            error.damage().is_some() || error.feature().is_some(),
            "{len}: {error}"
        );
        assert!(
            write_open(&bytes[..len], |_| ()).unwrap().0.is_err(),
            "{len}"
        );
    }
    for len in (112..bytes.len()).step_by(97) {
        survives(&bytes[..len]).unwrap_or_else(|text| panic!("cut at {len}: {text}"));
    }
}
