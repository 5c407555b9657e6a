//! The serialized form: bit order, tail, and the canonical chunks that a checksum runs over.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

#[expect(dead_code, reason = "the helpers serve several test files")]
mod common;

use common::{bitmap, bits, serialized};
use proptest::prelude::*;
use tidemark_bitmap::{Bitmap, CANONICAL_CHUNK_BYTES, Granularity, Page, Shape};

fn shape(bits: u64, page_bytes: u32) -> Shape {
    Shape::new(bits * 512, Granularity::MIN, page_bytes).unwrap()
}

/// The definition of the canonical chunks, by way of all serialized bytes.
fn chunks_by_definition(bitmap: &Bitmap) -> Vec<(u64, Vec<u8>)> {
    let mut bytes = serialized(bitmap);
    bytes.resize(bytes.len().next_multiple_of(CANONICAL_CHUNK_BYTES), 0);
    let chunks = bytes.chunks(CANONICAL_CHUNK_BYTES).map(<[u8]>::to_vec);
    (0..)
        .zip(chunks)
        .filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0))
        .collect()
}

fn chunks(bitmap: &Bitmap) -> Vec<(u64, Vec<u8>)> {
    bitmap
        .canonical_chunks()
        .map(|(at, chunk)| (at, chunk.to_vec()))
        .collect()
}

proptest! {
    #[test]
    fn a_page_read_from_bytes_writes_the_same_bytes(seed in any::<u64>()) {
        let bytes: Vec<u8> =
            common::noise(seed, 64).iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut written = vec![0x5a; 512];
        Page::from_bytes(&bytes).write_bytes(&mut written);
        prop_assert_eq!(written, bytes);
    }

    #[test]
    fn a_bitmap_survives_serialization(a in bitmap()) {
        let mut bytes = vec![0; usize::try_from(a.shape().page_bytes()).unwrap()];
        let mut b = Bitmap::new(a.shape());
        for page in 0..a.pages().len() {
            a.write_page(page, &mut bytes);
            b.set_page(page, Page::from_bytes(&bytes));
        }
        prop_assert_eq!(bits(&a), bits(&b));
        prop_assert_eq!(a, b);
    }

    #[test]
    fn canonical_chunks_are_the_nonzero_chunks_of_the_serialized_bits(a in bitmap()) {
        prop_assert_eq!(chunks(&a), chunks_by_definition(&a));
    }

    #[test]
    fn canonical_chunks_do_not_depend_on_page_size_or_representation(
        a in bitmap(),
        page_bytes in common::page_bytes(),
    ) {
        let mut b = a.with_page_bytes(page_bytes).unwrap();
        prop_assert_eq!(chunks(&a), chunks(&b));
        for page in 0..b.pages().len() {
            let mut words = vec![0; b.shape().words_per_page()].into_boxed_slice();
            match b.page(page) {
                Page::Zeros => {}
                Page::Ones => words.fill(u64::MAX),
                Page::Bits(bits) => words.copy_from_slice(bits),
            }
            b.set_page(page, Page::Bits(words));
        }
        prop_assert_eq!(chunks(&a), chunks(&b));
    }

    #[test]
    fn a_view_shows_the_bits_of_a_page(a in bitmap()) {
        let model = bits(&a);
        let per_page = usize::try_from(a.shape().bits_per_page()).unwrap();
        for (page, expected) in a.pages().iter().zip(model.chunks(per_page)) {
            match page.view() {
                Some(view) => prop_assert_eq!(&view[..expected.len()], expected),
                None => prop_assert!(matches!(page, Page::Zeros | Page::Ones)),
            }
        }
    }
}

#[test]
fn bit_17_is_bit_1_of_byte_2() {
    let mut bitmap = Bitmap::new(shape(100, 512));
    bitmap.mark(17 * 512..17 * 512 + 1).unwrap();
    let mut expected = vec![0; 13];
    expected[2] = 0b10;
    assert_eq!(serialized(&bitmap), expected);

    let mut bytes = vec![0; 512];
    bytes[2] = 0b10;
    bitmap.set_page(0, Page::from_bytes(&bytes));
    assert_eq!(
        bitmap.dirty_ranges().collect::<Vec<_>>(),
        [17 * 512..18 * 512]
    );
}

#[test]
fn bits_that_a_foreign_writer_left_past_the_disks_end_are_cut() {
    let mut bitmap = Bitmap::new(shape(4096 + 10, 512));
    bitmap.set_page(0, Page::Zeros);
    let mut bytes = vec![0; 512];
    bytes[..8].fill(0xff);
    bitmap.set_page(1, Page::from_bytes(&bytes));
    assert_eq!(bitmap.count(), 10);
    assert_eq!(bitmap.dirty_bytes(), 10 * 512);
    bitmap.write_page(1, &mut bytes);
    assert_eq!(bytes[..3], [0xff, 0b11, 0]);
    assert_eq!(chunks(&bitmap).len(), 1);
}

#[test]
fn an_all_ones_last_page_stands_for_the_bits_within_the_disk() {
    let all = Bitmap::all_dirty(shape(4096 + 10, 512));
    assert!(matches!(all.page(1), Page::Ones));
    assert_eq!(all.count(), 4106);
    assert!(all.complement().is_clean());
    let mut bytes = vec![0x77; 512];
    all.write_page(1, &mut bytes);
    assert_eq!(bytes[..3], [0xff, 0b11, 0]);
    assert!(bytes[3..].iter().all(|byte| *byte == 0));
    let grown = all.resize(2 * 4096 * 512, false).unwrap();
    assert_eq!(grown.count(), 4106);
}

#[test]
fn uniform_bytes_become_uniform_pages() {
    assert!(matches!(Page::from_bytes(&[0; 512]), Page::Zeros));
    assert!(matches!(Page::from_bytes(&[0xff; 512]), Page::Ones));
    let mut bytes = [0xff; 512];
    bytes[511] = 0x7f;
    assert!(matches!(Page::from_bytes(&bytes), Page::Bits(_)));
    let mut out = [3; 16];
    Page::Ones.write_bytes(&mut out);
    assert_eq!(out, [0xff; 16]);
    Page::Zeros.write_bytes(&mut out);
    assert_eq!(out, [0; 16]);
}

#[test]
fn canonical_chunks_of_a_vast_clean_disk_are_found_without_a_walk_over_its_bits() {
    let shape = Shape::new(1 << 48, Granularity::DEFAULT, 2 << 20).unwrap();
    let mut bitmap = Bitmap::new(shape);
    bitmap.mark((1 << 48) - 1..1 << 48).unwrap();
    let found: Vec<_> = bitmap.canonical_chunks().collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, (512 << 20) / 4096 - 1);
    assert_eq!(found[0].1[4095], 0x80);
}

#[test]
#[should_panic(expected = "one page of bits")]
fn a_page_of_the_wrong_length_is_the_callers_bug() {
    Bitmap::new(shape(100, 512)).set_page(0, Page::Bits(vec![0; 63].into()));
}
