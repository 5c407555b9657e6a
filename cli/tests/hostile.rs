//! Broken and malicious images: one line and a code of the table, never a panic, nothing written.

mod common;

use common::Place;
use tidemark_fixtures::golden;
use tidemark_fixtures::hostile::hostile_images;

#[test]
fn no_hostile_image_makes_a_command_panic_hang_or_write() {
    let place = Place::new();
    let path = place.path("hostile");
    for image in hostile_images() {
        std::fs::write(&path, &image.bytes).expect("the image can be written");
        for command in [
            "info hostile --output json",
            "map hostile --max-length 1G --output json",
            "check hostile",
            "bitmap list hostile",
            "checkpoint list hostile",
            "bitmap add hostile new -g 2G",
        ] {
            let reads = !command.starts_with("bitmap add");
            let answer = place.run(command);
            let what = format!("{}: {command}: {answer:?}", image.name);
            assert!(matches!(answer.code, 0..=3 | 63), "{what}");
            assert!(!answer.stderr.contains("internal error"), "{what}");
            if answer.code == 1 && !command.starts_with("check") {
                let lines = answer.stderr.lines();
                assert!(
                    lines.filter(|line| !line.contains("disk 'vda'")).count() <= 1,
                    "{what}"
                );
            }
            if reads || answer.code != 0 {
                let after = std::fs::read(&path).expect("the image can be read");
                assert!(after == image.bytes, "{}: {command} wrote", image.name);
            }
        }
    }
}

#[test]
fn every_golden_image_is_described_or_refused_by_name() {
    let place = Place::new();
    for name in golden::names() {
        std::fs::write(place.path("golden"), golden::load(name)).expect("it can be written");
        let answer = place.run("info golden --output json").ends_with(0);
        assert!(answer.json()["virtual-size"].is_u64(), "{name}");
        for command in ["map", "check", "bitmap list"] {
            let answer = place.run(&format!("{command} golden"));
            assert!(
                matches!(answer.code, 0..=3 | 63),
                "{name}: {command}: {answer:?}"
            );
        }
    }
}
