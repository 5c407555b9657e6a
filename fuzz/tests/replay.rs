//! The corpus and the regressions through every target, on any compiler.

use std::path::Path;

use tidemark_qcow2::check::Repair;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 9] = [
    ("header", tidemark_fuzz::header),
    ("directory", tidemark_fuzz::directory),
    ("table", tidemark_fuzz::table),
    ("chain", tidemark_fuzz::chain),
    ("open", tidemark_fuzz::open),
    ("operations", tidemark_fuzz::operations),
    ("damage", tidemark_fuzz::damaged),
    ("repair", tidemark_fuzz::repair),
    ("nbd", tidemark_fuzz::nbd),
];

fn inputs(folder: &str, target: &str) -> Vec<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(folder)
        .join(target);
    let Ok(list) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    list.map(|entry| std::fs::read(entry.expect("the folder can be listed").path()))
        .map(|bytes| bytes.expect("the input can be read"))
        .collect()
}

#[test]
fn every_kept_input_passes_its_target() {
    let mut count = 0;
    for (name, target) in TARGETS {
        for folder in ["corpus", "regressions"] {
            for input in inputs(folder, name) {
                target(&input);
                count += 1;
            }
        }
    }
    println!("{count} inputs");
    assert!(count >= 20, "the corpus shrank: {count}");
}

#[test]
fn every_hostile_image_passes_the_open_target() {
    let images = tidemark_fixtures::hostile::hostile_images();
    for hostile in &images {
        tidemark_fuzz::open(&hostile.bytes);
        tidemark_fuzz::header(&hostile.bytes);
    }
    println!("{} images", images.len());
    assert!(images.len() >= 200, "the table shrank: {}", images.len());
}

#[test]
fn every_hostile_image_passes_the_repair_target() {
    let images = tidemark_fixtures::hostile::hostile_images();
    let small = images.iter().filter(|image| image.bytes.len() <= 1 << 20);
    let count = small.clone().count();
    for hostile in small {
        tidemark_fuzz::repair_image(&hostile.bytes, Repair::All);
    }
    println!("{count} images");
    assert!(count >= 200, "the table shrank: {count}");
}
