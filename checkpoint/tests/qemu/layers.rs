//! Backing chains: bitmaps of one name through the layers, held against libvirt's published layer
//! sets, which are rebuilt here with QEMU's own tools.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_checkpoint::layers::{commit_list, delete_list, is_valid, merge_list, overlay_list};
use tidemark_checkpoint::{
    CommittedBitmap, DiskDelta, Domain, DomainOptions, FullReason, SinceOptions,
};
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::{BitmapInfo, FileStorage, Image, Sharing};

use super::desk::{Desk, SIZE, covers};

/// A bitmap of one layer: its name and what is wrong with it.
type Named = (&'static str, Flaw);

#[derive(Clone, Copy, PartialEq)]
enum Flaw {
    None,
    Inactive,
    Inconsistent,
}

const fn whole<const N: usize>(names: [&'static str; N]) -> [Named; N] {
    let mut bitmaps = [("", Flaw::None); N];
    let mut at = 0;
    while at < N {
        bitmaps[at].0 = names[at];
        at += 1;
    }
    bitmaps
}

/// libvirt's sets, top layer first; a transient bitmap is in no image.
fn sets() -> Vec<(&'static str, Vec<Vec<Named>>)> {
    let all = ["a", "b", "c", "d", "current"];
    vec![
        ("empty", vec![Vec::new(); 5]),
        (
            "basic",
            [vec![whole(all).to_vec()], vec![Vec::new(); 4]].concat(),
        ),
        (
            "snapshots",
            vec![
                whole(["d", "a", "b", "c", "current"]).to_vec(),
                whole(["c", "b", "a", "d"]).to_vec(),
                whole(["a", "b", "c"]).to_vec(),
                whole(["a"]).to_vec(),
                whole(["a"]).to_vec(),
            ],
        ),
        (
            "synthetic",
            vec![
                vec![
                    ("current", Flaw::Inconsistent),
                    ("top-ok", Flaw::None),
                    ("top-inactive", Flaw::Inactive),
                ],
                whole(["d"]).to_vec(),
                vec![("c", Flaw::Inactive), ("d", Flaw::None)],
                Vec::new(),
                whole(["a"]).to_vec(),
            ],
        ),
    ]
}

/// The layers of a set as images made by qemu-img, and what our engine reads of them.
struct Layers {
    _desk: Desk,
    bitmaps: Vec<Vec<BitmapInfo>>,
}

impl Layers {
    fn new(set: &[Vec<Named>]) -> Self {
        let desk = Desk::empty();
        for (number, bitmaps) in set.iter().enumerate().rev() {
            let path = layer(&desk, number);
            match number + 1 == set.len() {
                true => qemu_img::create(&path, SIZE, &[]),
                false => {
                    qemu_img::create_overlay(&path, &format!("layer{}.qcow2", number + 1), "qcow2")
                }
            }
            build(&path, bitmaps);
        }
        let read = |number| open(&layer(&desk, number)).bitmaps().unwrap();
        let bitmaps = (0..set.len()).map(read).collect();
        Self {
            _desk: desk,
            bitmaps,
        }
    }
}

fn layer(desk: &Desk, number: usize) -> PathBuf {
    desk.path(&format!("layer{number}.qcow2"))
}

fn open(path: &std::path::Path) -> Image {
    let storage = FileStorage::open(path, false, Sharing::Exclusive).unwrap();
    Image::open_unbacked(Box::new(storage), false).unwrap()
}

fn build(path: &std::path::Path, bitmaps: &[Named]) {
    let inconsistent = bitmaps
        .iter()
        .filter(|(_, flaw)| *flaw == Flaw::Inconsistent);
    let mut killed = false;
    for (name, _) in inconsistent {
        qemu_img::bitmap_add(path, name, Some(65_536));
        killed = true;
    }
    if killed {
        let mut daemon = QemuStorageDaemon::spawn();
        daemon.open_image(path);
        daemon.kill_dash_nine();
    }
    for (name, flaw) in bitmaps
        .iter()
        .filter(|(_, flaw)| *flaw != Flaw::Inconsistent)
    {
        qemu_img::bitmap_add(path, name, Some(65_536));
        if *flaw == Flaw::Inactive {
            qemu_img::bitmap_disable(path, name);
        }
    }
}

#[test]
fn libvirts_twenty_verdicts_hold() {
    tidemark_fixtures::require_qemu!();
    let expected: [(&str, &[(&str, bool)]); 4] = [
        ("empty", &[("a", false)]),
        (
            "basic",
            &[
                ("a", true),
                ("b", true),
                ("c", true),
                ("d", true),
                ("current", true),
            ],
        ),
        (
            "snapshots",
            &[
                ("a", true),
                ("b", true),
                ("c", true),
                ("d", true),
                ("current", true),
            ],
        ),
        (
            "synthetic",
            &[
                ("a", false),
                ("b", false),
                ("c", false),
                ("d", false),
                ("current", false),
                ("top-ok", true),
                ("top-inactive", false),
                ("top-transient", false),
                ("top-inactive-transient", false),
            ],
        ),
    ];
    let mut verdicts = 0;
    for ((name, set), (also, cases)) in sets().into_iter().zip(expected) {
        assert_eq!(name, also);
        let layers = Layers::new(&set);
        for (bitmap, valid) in cases {
            assert_eq!(is_valid(&layers.bitmaps, bitmap), *valid, "{name}/{bitmap}");
            verdicts += 1;
        }
    }
    println!("{verdicts} verdicts");
    assert_eq!(verdicts, 20);
}

/// The merge lists and delete lists: verified where libvirt's are published, derived from its rule
/// ("the same name from each layer that has it") elsewhere.
#[test]
fn merge_and_delete_lists_are_libvirts() {
    tidemark_fixtures::require_qemu!();
    let mut lists = 0;
    for (name, set) in sets() {
        let layers = Layers::new(&set).bitmaps;
        let merges: &[(&str, Option<&[usize]>)] = match name {
            "empty" => &[("a", None)],
            "basic" => &[
                ("current", Some(&[0])),
                ("d", Some(&[0])),
                ("a", Some(&[0])),
            ],
            "snapshots" => &[
                ("current", Some(&[0])),
                ("d", Some(&[0, 1])),
                ("a", Some(&[0, 1, 2, 3, 4])),
            ],
            _ => &[("top-ok", Some(&[0])), ("d", None)],
        };
        for (bitmap, expected) in merges {
            assert_eq!(
                merge_list(&layers, bitmap).as_deref(),
                *expected,
                "{name}/{bitmap}"
            );
            lists += 1;
        }
        let deletes: &[(&str, &[usize])] = match name {
            "empty" => &[("a", &[])],
            "basic" => &[
                ("a", &[0]),
                ("b", &[0]),
                ("c", &[0]),
                ("d", &[0]),
                ("current", &[0]),
            ],
            "snapshots" => &[
                ("a", &[0, 1, 2, 3, 4]),
                ("b", &[0, 1, 2]),
                ("c", &[0, 1, 2]),
                ("d", &[0, 1]),
                ("current", &[0]),
            ],
            // Also where the chain is not valid.
            _ => &[
                ("a", &[4]),
                ("b", &[]),
                ("c", &[2]),
                ("d", &[1, 2]),
                ("current", &[0]),
            ],
        };
        for (bitmap, expected) in deletes {
            assert_eq!(delete_list(&layers, bitmap), *expected, "{name}/{bitmap}");
            lists += 1;
        }
    }
    println!("{lists} lists");
    assert_eq!(lists, 9 + 16);
}

/// Every pair of layers of libvirt's commit cases, by its rule; 2 to 4 is published.
#[test]
fn commit_lists_are_libvirts() {
    tidemark_fixtures::require_qemu!();
    let mut pairs = 0;
    for (name, set) in sets() {
        let layers = Layers::new(&set).bitmaps;
        for top in 0..4 {
            for base in top + 1..5 {
                let plan = commit_list(&layers, top, base);
                pairs += 1;
                for committed in &plan {
                    assert!(
                        is_valid(&layers[top..], &committed.name),
                        "{name} {top} to {base}"
                    );
                    let has = layers[base].iter().any(|info| info.name == committed.name);
                    assert_eq!(committed.create, !has);
                    let expected: Vec<usize> = (top..base)
                        .filter(|at| layers[*at].iter().any(|info| info.name == committed.name))
                        .collect();
                    assert_eq!(committed.sources, expected);
                }
                let valid = layers[top]
                    .iter()
                    .filter(|info| is_valid(&layers[top..], &info.name));
                assert_eq!(plan.len(), valid.count());
            }
        }
        if name == "snapshots" {
            let mut plan = commit_list(&layers, 1, 3);
            plan.sort_by(|a, b| a.name.cmp(&b.name));
            let one = |name: &str, create, sources: &[usize]| CommittedBitmap {
                name: name.to_owned(),
                create,
                sources: sources.to_vec(),
            };
            let expected = [
                one("a", false, &[1, 2]),
                one("b", true, &[1, 2]),
                one("c", true, &[1, 2]),
                one("d", true, &[1]),
            ];
            assert_eq!(plan, expected);
        }
        let carried: Vec<String> = overlay_list(&layers)
            .into_iter()
            .map(|info| info.name)
            .collect();
        assert!(carried.iter().all(|bitmap| is_valid(&layers, bitmap)));
    }
    println!("{pairs} pairs of layers");
    assert_eq!(pairs, 40);
}

/// As libvirt makes an external snapshot: the overlay gets the bitmaps of the layer below, empty.
fn overlaid() -> (Desk, Vec<u8>, Vec<u8>) {
    let desk = Desk::empty();
    let base = layer(&desk, 1);
    qemu_img::create(&base, SIZE, &[]);
    qemu_io::commands(&base, &["write -P 1 0 300k"]);
    let at_a = qemu_img::convert_to_raw(&base);
    qemu_img::bitmap_add(&base, "a", Some(65_536));
    qemu_io::commands(&base, &["write -P 2 1M 100k"]);
    let at_b = qemu_img::convert_to_raw(&base);
    qemu_img::bitmap_add(&base, "b", Some(65_536));
    qemu_io::commands(&base, &["write -P 3 2M 100k"]);
    let top = layer(&desk, 0);
    qemu_img::create_overlay(&top, "layer1.qcow2", "qcow2");
    for name in ["a", "b"] {
        qemu_img::bitmap_add(&top, name, Some(65_536));
    }
    qemu_io::commands(&top, &["write -P 4 3M 100k"]);
    (desk, at_a, at_b)
}

fn domain(desk: &Desk, with_layers: bool, writable: bool) -> Domain {
    let storage = FileStorage::open(&layer(desk, 0), writable, Sharing::Exclusive).unwrap();
    let image = Image::open_unbacked(Box::new(storage), writable).unwrap();
    let disk = tidemark_checkpoint::Disk {
        name: "vda".to_owned(),
        image: Arc::new(image),
    };
    let layers = match with_layers {
        true => HashMap::from([("vda".to_owned(), vec![Arc::new(open(&layer(desk, 1)))])]),
        false => HashMap::new(),
    };
    Domain::with_layers(vec![disk], layers, DomainOptions::default()).unwrap()
}

fn asked(domain: &Domain, name: &str, trust_inferred: bool) -> DiskDelta {
    let options = SinceOptions { trust_inferred };
    domain.changed_since(name, options).unwrap().remove(0).delta
}

#[test]
fn what_the_layers_below_recorded_is_never_left_out() {
    tidemark_fixtures::require_qemu!();
    let (desk, at_a, at_b) = overlaid();
    let now = qemu_img::convert_to_raw(&layer(&desk, 0));
    {
        let domain = domain(&desk, true, false);
        for (name, before) in [("a", &at_a), ("b", &at_b)] {
            let DiskDelta::Incremental(bits) = asked(&domain, name, true) else {
                panic!("since {name}")
            };
            covers(&bits, before, &now, name);
            assert!(!bits.test(0), "not everything");
        }
        assert_eq!(domain.rebuild(false).unwrap().checkpoints.len(), 2);
    }
    // Adopted with the layers at hand, the top has it all from then on.
    {
        let adopted = domain(&desk, true, true);
        adopted.adopt(false).unwrap();
        for (name, before) in [("a", &at_a), ("b", &at_b)] {
            let DiskDelta::Incremental(bits) = asked(&adopted, name, false) else {
                panic!("since {name}")
            };
            covers(&bits, before, &now, name);
        }
        super::desk::close(adopted);
    }
    qemu_img::check(&layer(&desk, 0)).assert_clean();
}

#[test]
fn without_the_layers_an_overlay_is_not_believed() {
    tidemark_fixtures::require_qemu!();
    let (desk, ..) = overlaid();
    let adopted = domain(&desk, false, true);
    adopted.adopt(false).unwrap();
    let DiskDelta::Full { reason } = asked(&adopted, "a", false) else {
        panic!("it misses what was written below")
    };
    assert!(matches!(reason, FullReason::BadBitmap { .. }), "{reason}");
    drop(adopted);
    // A gap, or a bitmap that is not whole below, is no chain.
    let (desk, ..) = {
        drop(desk);
        overlaid()
    };
    qemu_img::bitmap_disable(&layer(&desk, 1), "a");
    let looked = domain(&desk, true, false);
    let DiskDelta::Full { reason } = asked(&looked, "a", true) else {
        panic!("it does not record below")
    };
    assert_eq!(reason, FullReason::LayersUnknown);
    assert!(matches!(
        asked(&looked, "b", true),
        DiskDelta::Incremental(_)
    ));
}
