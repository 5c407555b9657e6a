//! Images made and grown by us and by QEMU in the same way: the same content, the same map, clean
//! checks, and places that are used when they are written.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{
    BackingReference, CreateOptions, DataFileReference, Error, Mistake, Preallocation,
};

use crate::common::{add_bitmap, alone, assert_covers, create_file, open_file, read_all};
use crate::common::{reading, writing};
use crate::{MODES, at};

/// What an image is besides its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Version2,
    Extended,
    Overlay,
    ExtendedOverlay,
    Version2Overlay,
    DataFile,
    RawDataFile,
}

use Kind::{
    DataFile, Extended, ExtendedOverlay, Overlay, Plain, RawDataFile, Version2, Version2Overlay,
};

impl Kind {
    fn version(self) -> u32 {
        if matches!(self, Version2 | Version2Overlay) {
            2
        } else {
            3
        }
    }

    fn extended(self) -> bool {
        matches!(self, Extended | ExtendedOverlay)
    }

    fn outside(self) -> bool {
        matches!(self, DataFile | RawDataFile)
    }

    fn overlay(self) -> bool {
        matches!(self, Overlay | ExtendedOverlay | Version2Overlay)
    }
}

struct Place(tempfile::TempDir);

impl Place {
    /// A folder with a backing file of `bytes` bytes.
    fn new(bytes: u64) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let base = create_file(&place.path("base"), &CreateOptions::new(bytes));
        base.write(&vec![7; at(bytes)], 0).unwrap();
        base.close().unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn options(&self, kind: Kind, cluster_bits: u32, size: u64) -> CreateOptions {
        let data = "ours.raw";
        std::fs::write(self.path(data), b"old").unwrap();
        CreateOptions {
            cluster_bits,
            version: kind.version(),
            extended_l2: kind.extended(),
            backing: kind.overlay().then(|| BackingReference {
                name: self.text("base").into_bytes(),
                format: "qcow2".to_owned(),
            }),
            data_file: kind.outside().then(|| DataFileReference {
                name: self.text(data).into_bytes(),
                raw: kind == RawDataFile,
            }),
            ..CreateOptions::new(size)
        }
    }

    /// The same image by qemu-img.
    fn by_qemu(&self, name: &str, options: &CreateOptions, mode: &str) {
        let on = |flag| if flag { "on" } else { "off" };
        let cluster = (1_u64 << options.cluster_bits).to_string();
        let (base, data) = (self.text("base"), self.text("theirs.raw"));
        let mut opts = vec![
            ("cluster_size", &cluster[..]),
            ("compat", if options.version == 2 { "0.10" } else { "1.1" }),
            ("preallocation", mode),
        ];
        if options.version == 3 {
            opts.push(("extended_l2", on(options.extended_l2)));
        }
        if options.backing.is_some() {
            opts.extend([("backing_file", &base[..]), ("backing_fmt", "qcow2")]);
        }
        if let Some(reference) = &options.data_file {
            opts.extend([
                ("data_file", &data[..]),
                ("data_file_raw", on(reference.raw)),
            ]);
        }
        qemu_img::create(&self.path(name), options.size, &opts);
    }
}

/// Runs of the map behind `from` as start, end and these keys, merged where they agree.
fn map(path: &Path, from: u64, keys: &[&str]) -> Vec<(u64, u64, Vec<Value>)> {
    let mut merged: Vec<(u64, u64, Vec<Value>)> = Vec::new();
    for entry in qemu_img::map(path).as_array().unwrap() {
        let number = |key: &str| entry[key].as_u64().unwrap();
        let end = number("start") + number("length");
        let start = number("start").max(from);
        if start >= end {
            continue;
        }
        let values: Vec<Value> = keys.iter().map(|key| entry[*key].clone()).collect();
        match merged.last_mut() {
            Some(last) if last.2 == values => last.1 = end,
            _ => merged.push((start, end, values)),
        }
    }
    merged
}

/// Two of the three, others each time.
fn modes(case: usize) -> impl Iterator<Item = (Preallocation, &'static str)> {
    MODES.into_iter().cycle().skip(case).take(2)
}

const SIZES: [u64; 4] = [3 << 20, 1_000_448, 512, 1 << 20];

#[test]
fn what_we_create_is_placed_as_qemu_places_it() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for kind in [
        Plain,
        Version2,
        Extended,
        ExtendedOverlay,
        DataFile,
        RawDataFile,
    ] {
        for cluster_bits in [9, 14, 16, 21] {
            if kind.extended() && cluster_bits < 14 {
                continue;
            }
            for (mode, name) in modes(cases) {
                let size = SIZES[cases % SIZES.len()];
                let what = format!("{kind:?}, clusters 2^{cluster_bits}, {name}, {size}");
                let place = Place::new(600_064);
                let options = CreateOptions {
                    preallocation: mode,
                    ..place.options(kind, cluster_bits, size)
                };
                create_file(&place.path("ours"), &options).close().unwrap();
                place.by_qemu("theirs", &options, name);
                check_pair(&place, kind, &options, &what);
                use_places(&place, &options, kind, &what);
                cases += 1;
            }
        }
    }
    println!("{cases} images of each");
    assert!(cases >= 40, "the matrix shrank: {cases}");
}

/// Both images say the same of the same bytes.
fn check_pair(place: &Place, kind: Kind, options: &CreateOptions, what: &str) {
    let (ours, theirs) = (place.path("ours"), place.path("theirs"));
    qemu_img::check(&ours).assert_clean();
    // What a hole is, the file system tells in units of its own; space that was only taken it
    // calls one or the other.
    let holes = options.cluster_bits >= 16
        && !kind.outside()
        && options.size.is_multiple_of(4096)
        && options.preallocation != Preallocation::Falloc;
    let known = ["depth", "present", "zero", "data"];
    let keys = if holes { &known[..] } else { &known[..2] };
    // QEMU leaves a raw data file a hole, whatever is asked.
    if kind != RawDataFile || options.preallocation == Preallocation::Metadata {
        assert_eq!(map(&ours, 0, keys), map(&theirs, 0, keys), "{what}");
    }
    let content = qemu_img::convert_to_raw(&theirs);
    assert!(qemu_img::convert_to_raw(&ours) == content, "{what}");
    assert!(read_all(&open_file(&ours, reading())) == content, "{what}");
    assert!(
        read_all(&open_file(&theirs, reading())) == content,
        "{what}: QEMU's"
    );
    let data = if kind.outside() {
        place.path("ours.raw")
    } else {
        ours
    };
    let metadata = std::fs::metadata(data).unwrap();
    if options.preallocation != Preallocation::Metadata {
        assert!(metadata.blocks() * 512 >= options.size, "{what}: no space");
    }
}

/// Writes take no further cluster, from us and from QEMU.
fn use_places(place: &Place, options: &CreateOptions, kind: Kind, what: &str) {
    let ours = place.path("ours");
    let end = |path: &Path| qemu_img::check(path).count("image-end-offset");
    let before = end(&ours);
    let image = open_file(&ours, writing());
    let mut content = read_all(&image);
    let half = at(options.size / 1024) * 512;
    content[..half].fill(5);
    image.write(&content[..half], 0).unwrap();
    image.close().unwrap();
    if half < content.len() {
        let len = content.len() - half;
        content[half..].fill(6);
        qemu_io::commands(&ours, &[&format!("write -P 6 {half} {len}")]);
    }
    assert_eq!(end(&ours), before, "{what}: the image grew");
    qemu_img::check(&ours).assert_clean();
    assert!(qemu_img::convert_to_raw(&ours) == content, "{what}");
    if kind == RawDataFile {
        let data = std::fs::read(place.path("ours.raw")).unwrap();
        assert!(data == content, "{what}: the data file is not the disk");
    }
}

const GROWTHS: [(u64, u64); 4] = [
    (1 << 19, 2 << 20),
    (300_032, 1_000_448),
    (512, 1024),
    (600_064, 700_416),
];

#[test]
fn what_a_disk_gains_is_placed_as_qemu_places_it() {
    require_qemu!();
    let _alone = alone();
    let mut cases = 0;
    for kind in [
        Plain,
        Version2,
        Extended,
        Overlay,
        ExtendedOverlay,
        Version2Overlay,
        DataFile,
        RawDataFile,
    ] {
        for cluster_bits in [9, 14, 16, 21] {
            if kind.extended() && cluster_bits < 14 {
                continue;
            }
            for (mode, name) in modes(cases) {
                let (from, to) = GROWTHS[cases % GROWTHS.len()];
                let what = format!("{kind:?}, clusters 2^{cluster_bits}, {name}, {from}-{to}");
                grow_both(kind, cluster_bits, (mode, name), (from, to), &what);
                cases += 1;
            }
        }
    }
    println!("{cases} images of each");
    assert!(cases >= 50, "the matrix shrank: {cases}");
}

fn grow_both(
    kind: Kind,
    cluster_bits: u32,
    (mode, name): (Preallocation, &str),
    (from, to): (u64, u64),
    what: &str,
) {
    let place = Place::new(700_416);
    let (ours, theirs) = (place.path("ours"), place.path("theirs"));
    let options = place.options(kind, cluster_bits, from);
    create_file(&ours, &options).close().unwrap();
    place.by_qemu("theirs", &options, "off");
    let image = open_file(&ours, writing());
    if kind.version() == 3 {
        add_bitmap(&image, "b", 4096);
    }
    let written = from / 3 / 512 * 512;
    if written > 0 {
        image.write(&vec![3; at(written)], from - written).unwrap();
        let command = format!("write -P 3 {} {written}", from - written);
        qemu_io::commands(&theirs, &[&command]);
    }
    let old = read_all(&image);
    image.grow(to, mode).unwrap();
    let content = read_all(&image);
    let mut expected = old.clone();
    expected.resize(at(to), 0);
    assert!(content == expected, "{what}");
    if kind.version() == 3 {
        let bits = image.load_bitmap("b").unwrap();
        let blank = vec![0; at(from)];
        assert_covers(
            &bits,
            &blank,
            &[blank.clone(), vec![1; at(to - from)]].concat(),
            what,
        );
    }
    image.close().unwrap();
    qemu_img::check(&ours).assert_clean();
    assert!(qemu_img::convert_to_raw(&ours) == content, "{what}: QEMU");
    let sizes = (to.to_string(), place.text("theirs"));
    let mode_option = format!("--preallocation={name}");
    let line = [
        "resize",
        "-q",
        "-f",
        "qcow2",
        &mode_option,
        &sizes.1,
        &sizes.0,
    ];
    let grown = qemu_img::run(&line).status == Some(0);
    let refusable = kind == Version2Overlay && mode == Preallocation::Metadata;
    assert!(grown || refusable, "{what}: QEMU refuses");
    if grown {
        assert!(qemu_img::convert_to_raw(&theirs) == content, "{what}");
        assert!(read_all(&open_file(&theirs, reading())) == content);
        // The cluster that holds the old end is QEMU's by subclusters and ours as a whole.
        let first = from.next_multiple_of(1 << cluster_bits);
        let runs = |path: &Path| map(path, first, &["depth", "present"]);
        assert_eq!(runs(&ours), runs(&theirs), "{what}");
    }
    let placed = || qemu_img::check(&ours).count("allocated-clusters");
    let before = placed();
    qemu_io::commands(&ours, &[&format!("write -P 6 {from} {}", to - from)]);
    assert_eq!(placed(), before, "{what}: it took further places");
    if kind == RawDataFile {
        let data = std::fs::read(place.path("ours.raw")).unwrap();
        assert!(data == qemu_img::convert_to_raw(&ours), "{what}");
    }
}

#[test]
fn whole_clusters_are_not_placed_over_a_backing_file() {
    require_qemu!();
    let place = Place::new(1 << 20);
    for kind in [Overlay, Version2Overlay] {
        for (mode, _) in MODES {
            let options = CreateOptions {
                preallocation: mode,
                ..place.options(kind, 16, 1 << 20)
            };
            let problem = options.check().unwrap_err();
            let named = matches!(
                problem,
                Mistake::Option {
                    option: "preallocation",
                    ..
                }
            );
            assert!(named, "{problem}");
        }
    }
    let image = create_file(&place.path("ours"), &CreateOptions::new(1 << 20));
    let error = image.grow(1 << 19, Preallocation::Full).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}
