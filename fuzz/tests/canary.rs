//! The harness can fail: a model, or an image, that is wrong on purpose is found.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tidemark_fixtures::ops::Op;
use tidemark_fixtures::random::Random;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let list = std::fs::read_dir(folder).expect("the corpus is there");
    list.map(|entry| std::fs::read(entry.expect("it can be listed").path()))
        .map(|bytes| bytes.expect("it can be read"))
        .collect()
}

/// How many inputs of the corpus of `operations` notice a model that is told lies.
fn noticed(told: impl Fn(&Op) -> Op) -> usize {
    let fails = |input: &Vec<u8>| {
        let run = || tidemark_fuzz::operations_with(input, &told);
        catch_unwind(AssertUnwindSafe(run)).is_err()
    };
    corpus("operations")
        .iter()
        .filter(|input| fails(input))
        .count()
}

#[test]
fn the_corpus_finds_a_model_that_is_wrong() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let truth = noticed(Op::clone);
    let short_write = noticed(|op| match *op {
        Op::Write { offset, len, seed } if len > 1 => Op::Write {
            offset,
            len: len - 1,
            seed,
        },
        ref other => other.clone(),
    });
    let lost_zeroes = noticed(|op| match op {
        Op::WriteZeroes { .. } => Op::Flush,
        other => other.clone(),
    });
    let discard_is_write = noticed(|op| match *op {
        Op::Discard { offset, len } => Op::WriteZeroes {
            offset: offset / 2,
            len,
        },
        ref other => other.clone(),
    });
    std::panic::set_hook(quiet);
    println!("wrong writes {short_write}, zeroes {lost_zeroes}, discards {discard_is_write}");
    assert_eq!(truth, 0, "a true account passes");
    assert!(short_write > 8 && lost_zeroes > 4 && discard_is_write > 4);
}

#[test]
fn guest_data_on_metadata_is_found() {
    let mut found = 0;
    let mut differ = 0;
    for input in corpus("damage") {
        let (image, sound) = tidemark_fuzz::damage_of(&input);
        differ += usize::from(image != sound);
        tidemark_fuzz::no_guest_data_on_metadata(sound);
        let bad = tidemark_fuzz::with_guest_data_on_a_table(sound);
        let run = || tidemark_fuzz::no_guest_data_on_metadata(&bad);
        found += usize::from(catch_unwind(run).is_err());
    }
    println!("{differ} damaged images, {found} found");
    assert!(found > 40 && differ > 40);
}

/// Random inputs, on any compiler: what `make fuzz` does without its feedback.
#[test]
fn random_inputs_pass() {
    let cases = std::env::var("TIDEMARK_CASES");
    let cases = cases.ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    for number in 0..cases * 4 {
        let mut random = Random::stream(11, number);
        let len = random.within(4..400);
        let input: Vec<u8> = (0..len)
            .map(|_| random.next_u64().to_le_bytes()[0])
            .collect();
        if number % 4 == 0 {
            tidemark_fuzz::operations(&input);
        }
        tidemark_fuzz::damaged(&input[..input.len().min(24)]);
        tidemark_fuzz::repair(&input[..input.len().min(24)]);
        tidemark_fuzz::nbd(&input);
    }
    println!("{cases} lists of operations, {} damages", cases * 4);
}
