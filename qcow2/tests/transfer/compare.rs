//! Comparing says what qemu-img says.

use std::path::Path;

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::{random::Random, require_qemu};
use tidemark_qcow2::transfer::{CompareError, CompareOptions, Comparison, Source, compare};
use tidemark_qcow2::{CreateOptions, MemoryStorage};

use crate::common::{self, alone, built};
use crate::scene::{Scene, silent, source};

fn ask(left: &Source, right: &Source) -> Comparison {
    let options = CompareOptions {
        threads: 3,
        ..CompareOptions::default()
    };
    compare(left, right, &options, &silent).unwrap()
}

/// What qemu-img says: the offset of the first difference, none for equal disks.
fn theirs(left: (&Path, &str), right: (&Path, &str)) -> Option<u64> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (left_path, right_path) = (text(left.0), text(right.0));
    let args = [
        "compare",
        "-f",
        left.1,
        "-F",
        right.1,
        &left_path,
        &right_path,
    ];
    let output = qemu_img::run(&args);
    let said = output.text();
    let word = said
        .lines()
        .find_map(|line| line.strip_prefix("Content mismatch at offset "));
    match output.status {
        Some(0) => None,
        Some(1) => Some(word.unwrap().trim_end_matches('!').parse().unwrap()),
        other => panic!("{other:?}: {said}{}", output.stderr),
    }
}

fn ours(left: (&Path, &str), right: (&Path, &str)) -> Option<u64> {
    match ask(&source(left.0, left.1), &source(right.0, right.1)) {
        Comparison::Identical { .. } => None,
        Comparison::Content(at) => Some(at),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_first_difference_is_where_qemu_finds_it() {
    require_qemu!();
    let _alone = alone();
    let (mut cases, mut equal) = (0, 0);
    for seed in 300..308 {
        let scene = Scene::new(seed, 1 + usize::try_from(seed % 3).unwrap());
        let top = scene.top();
        let left = (top.path.as_path(), top.format);
        let copy = scene.path("copy");
        qemu_img::convert(left.0, left.1, &copy, "qcow2", &["-o", "cluster_size=4096"]);
        let mut random = Random::new(seed);
        let size = qemu_img::info(&copy)["virtual-size"].as_u64().unwrap();
        for round in 0..4 {
            let right = (copy.as_path(), "qcow2");
            let (mine, other) = (ours(left, right), theirs(left, right));
            assert_eq!(mine, other, "{}, round {round}", scene.name);
            assert_eq!(ours(right, left), mine, "{}, round {round}", scene.name);
            equal += usize::from(mine.is_none());
            cases += 1;
            let at = random.within(0..size / 2);
            let at = if round == 0 {
                size - 1 - at
            } else {
                at / (1 << round)
            };
            qemu_io::commands(&copy, &[&format!("write -P 0xee {at} 1")]);
        }
        // A longer disk is equal as long as it ends in zeros.
        qemu_img::resize(&copy, size + (1 << 20));
        qemu_io::commands(&copy, &[&format!("write -P 0 {size} 64k")]);
        let right = (copy.as_path(), "qcow2");
        assert_eq!(ours(left, right), theirs(left, right), "{}", scene.name);
        cases += 1;
    }
    println!("{cases} comparisons, {equal} equal");
    assert!(cases >= 40 && equal >= 8);
}

#[test]
fn sizes_and_allocation_count_when_asked() {
    let left = memory(1 << 20, |_| {});
    let same = memory(1 << 20, |_| {});
    let longer = memory(2 << 20, |_| {});
    let zeroed = memory(1 << 20, |image| image.write(&[0; 65536], 131_072).unwrap());
    let strict = CompareOptions {
        strict: true,
        ..CompareOptions::default()
    };
    let ask_strictly = |left, right| compare(left, right, &strict, &silent).unwrap();
    assert_eq!(ask(&left, &same), Comparison::Identical { same_size: true });
    assert_eq!(
        ask(&left, &longer),
        Comparison::Identical { same_size: false }
    );
    assert_eq!(
        ask(&left, &zeroed),
        Comparison::Identical { same_size: true }
    );
    assert_eq!(
        ask_strictly(&left, &same),
        Comparison::Identical { same_size: true }
    );
    assert_eq!(ask_strictly(&left, &longer), Comparison::Sizes);
    assert_eq!(
        ask_strictly(&left, &zeroed),
        Comparison::Allocation(131_072)
    );
    let both = memory(1 << 20, |image| {
        image.write(&[1; 512], 66_048).unwrap();
        image.write(&[0; 65536], 131_072).unwrap();
    });
    let content = memory(1 << 20, |image| image.write(&[2; 512], 66_048).unwrap());
    assert_eq!(ask_strictly(&both, &content), Comparison::Content(66_048));
}

#[test]
fn what_could_not_be_compared_is_said() {
    let good = memory(1 << 20, |image| image.write(&[1; 512], 0).unwrap());
    // An L2 entry that is not aligned.
    let mut bytes = built(&CreateOptions::new(1 << 20), |image| {
        image.write(&[1; 512], 0).unwrap();
    });
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    let at = usize::try_from(l1).unwrap();
    let l2 = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & (u64::MAX >> 1);
    bytes[usize::try_from(l2).unwrap() + 6] ^= 2;
    let bad = Source::image(common::open_bytes(bytes, common::reading()).unwrap());
    let error = compare(&good, &bad, &CompareOptions::default(), &silent).unwrap_err();
    assert!(matches!(error, CompareError::Map(_)), "{error:?}");
}

fn memory(size: u64, fill: impl FnOnce(&tidemark_qcow2::Image)) -> Source {
    let bytes = built(&CreateOptions::new(size), fill);
    let storage = MemoryStorage::from_bytes(bytes);
    let image = tidemark_qcow2::Image::open(Box::new(storage), common::reading()).unwrap();
    Source::image(image)
}
