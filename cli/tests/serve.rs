//! `serve`: what NBD clients see of an image, beside what QEMU's own server shows of it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::serving::{Served, client};
use common::{Place, content};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidemark_fixtures::oracle::{nbd, qemu_img, qemu_io};
use tidemark_fixtures::{certificates, require_nbd_clients};

const MIB: u64 = 1 << 20;

/// QEMU's own server for one image, with its allocation depth and some bitmaps.
struct QemuNbd {
    child: Child,
    uri: String,
}

impl QemuNbd {
    fn new(place: &Place, image: &str, bitmaps: &[&str]) -> Self {
        let socket = place.path("qemu.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-A", "-e", "8", "-f", "qcow2", "-k"]);
        command.arg(&socket);
        for name in bitmaps {
            command.args(["-B", name]);
        }
        let child = command
            .arg(place.path(image))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(30), "it listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Self { child, uri }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a context says: offsets, lengths and flags, neighbours that agree joined.
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let said = client("nbdinfo", &["--json", &format!("--map={context}"), uri]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    for run in said.as_array().unwrap() {
        let number = |key: &str| run[key].as_u64().unwrap();
        let (at, length, flags) = (number("offset"), number("length"), number("type"));
        match runs.last_mut() {
            Some(last) if last.2 == flags => last.1 += length,
            _ => runs.push((at, length, flags)),
        }
    }
    runs
}

/// Asserts that all of the ranges are dirty, and little besides: a recording bitmap carries witnesses,
/// up to 32 granules that are marked from the start.
fn assert_covers(map: &[(u64, u64, u64)], ranges: &[(u64, u64)]) {
    for (at, length) in ranges {
        let covers = |run: &&(u64, u64, u64)| run.0 <= *at && run.0 + run.1 >= at + length;
        let found = map.iter().find(covers);
        assert_eq!(found.map(|run| run.2), Some(1), "{at}+{length} in {map:?}");
    }
    let total = |runs: &mut dyn Iterator<Item = u64>| runs.sum::<u64>();
    let dirty = total(&mut map.iter().filter(|run| run.2 == 1).map(|run| run.1));
    let asked = total(&mut ranges.iter().map(|range| range.1));
    assert!(dirty <= asked + 32 * 65_536, "{dirty} of {asked}: {map:?}");
}

/// Images of many kinds, each with a disk called `disk`.
fn images(place: &Place) -> Vec<&'static str> {
    let work = [
        "write -P 0x11 0 64k",
        "write -P 0x22 1M 192k",
        "write -z 2M 128k",
        "write -P 0x33 3000k 5k",
        "write -P 0x44 7M 1M",
        "discard 7M 64k",
    ];
    let kinds: [(&str, &[(&str, &str)]); 5] = [
        ("plain", &[]),
        ("small", &[("cluster_size", "4096")]),
        ("large", &[("cluster_size", "2M")]),
        (
            "extended",
            &[("extended_l2", "on"), ("cluster_size", "128k")],
        ),
        ("old", &[("compat", "0.10")]),
    ];
    let mut all = Vec::new();
    for (name, options) in kinds {
        place.create(name, 8 * MIB, options);
        place.write(name, &work);
        all.push(name);
    }
    place.create("below", 6 * MIB, &[]);
    place.write("below", &["write -P 0x77 512k 1M", "write -P 0x78 5M 1M"]);
    let run = |args: &[&str]| assert_eq!(place.qemu_img(args).0, 0, "{args:?}");
    run(&[
        "create", "-q", "-f", "qcow2", "-b", "below", "-F", "qcow2", "middle", "7M",
    ]);
    run(&[
        "create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "chain", "8M",
    ]);
    place.write("middle", &["write -P 0x79 1M 64k", "write -z 5M 64k"]);
    place.write("chain", &["write -P 0x7a 64k 64k", "write -z 5100k 128k"]);
    run(&[
        "convert", "-q", "-f", "qcow2", "-O", "qcow2", "-c", "plain", "packed",
    ]);
    all.extend(["chain", "packed"]);
    all
}

#[test]
fn contents_and_maps_are_those_that_qemu_serves() {
    require_nbd_clients!();
    let place = Place::new();
    let images = images(&place);
    for image in &images {
        let served = place.serve(&format!("--read-only {image}"));
        let uri = served.uri("vda");
        let ours = place.path("ours.raw");
        client("nbdcopy", &[&uri, ours.to_str().unwrap()]);
        let expected = content(&place.path(image));
        assert!(std::fs::read(&ours).unwrap() == expected, "{image}");
        client(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "raw",
                &uri,
                ours.to_str().unwrap(),
            ],
        );
        assert!(std::fs::read(&ours).unwrap() == expected, "{image}");
        let file = place.path(image);
        let file = file.to_str().unwrap();
        client(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "qcow2", &uri, file],
        );
        let theirs = QemuNbd::new(&place, image, &[]);
        for context in ["base:allocation", "qemu:allocation-depth"] {
            let (ours, theirs) = (map(&uri, context), map(&theirs.uri, context));
            assert_eq!(ours, theirs, "{context} of {image}");
        }
        served.stop();
    }
    println!("{} images", images.len());
    assert!(images.len() >= 7);
}

#[test]
fn a_bitmap_is_what_qemu_serves_and_what_a_dump_says() {
    require_nbd_clients!();
    let place = Place::new();
    let mut cases = 0;
    for (size, granularity) in [(8 * MIB + 512, 65_536), (3 * MIB, 512), (5 * MIB, 2 * MIB)] {
        let disk = place.create("disk", size, &[]);
        qemu_img::bitmap_add(&disk, "b", Some(granularity));
        place.ok("bitmap add --disabled disk frozen");
        let writes = ["write 512 512", "write 1M 700k", "write -z 2500k 8k"];
        place.write("disk", &writes);
        let served = place.serve("--read-only --bitmap b -B frozen disk");
        let contexts = &served.answer["exports"][0]["contexts"];
        let expected = json!([
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b",
            "qemu:dirty-bitmap:frozen"
        ]);
        assert_eq!(*contexts, expected);
        let ours = map(&served.uri("vda"), "qemu:dirty-bitmap:b");
        assert_eq!(
            ours,
            map(
                &QemuNbd::new(&place, "disk", &["b"]).uri,
                "qemu:dirty-bitmap:b"
            )
        );
        let by_image = nbd::map_dirty(served.socket.to_str().unwrap(), "vda", "b");
        assert_eq!(by_image, nbd::dirty_extents(&disk, "b"));
        let dump: Vec<_> = place
            .json("bitmap dump disk b")
            .as_array()
            .unwrap()
            .iter()
            .map(|run| {
                let number = |key: &str| run[key].as_u64().unwrap();
                let dirty = u64::from(run["dirty"].as_bool().unwrap());
                (number("start"), number("length"), dirty)
            })
            .collect();
        assert_eq!(ours, dump);
        let clean = map(&served.uri("vda"), "qemu:dirty-bitmap:frozen");
        assert_eq!(clean, [(0, size, 0)]);
        served.stop();
        cases += 1;
    }
    println!("{cases} bitmaps");
}

#[test]
fn since_is_computed_for_each_disk_and_pulls_an_increment() {
    require_nbd_clients!();
    let place = Place::new();
    place.create("a", 8 * MIB, &[]);
    place.create("b", 4 * MIB, &[]);
    place.write("a", &["write -P 1 0 8M"]);
    place.ok("checkpoint create monday --disk vda=a --disk vdb=b");
    let base = content(&place.path("a"));
    place.write("a", &["write -P 2 1M 64k"]);
    place.ok("checkpoint create tuesday --disk vda=a --disk vdb=b");
    place.write("a", &["write -P 3 3M 128k", "discard 5M 1M"]);
    place.write("b", &["write -P 4 0 1M"]);
    let served = place.serve("--read-only --since monday --disk vda=a --disk vdb=b");
    let exports = served.answer["exports"].as_array().unwrap().clone();
    assert_eq!(exports.len(), 2);
    assert_eq!(exports[0]["since"][0]["mode"], "incremental");
    assert_eq!(
        exports[1]["since"][0]["context"],
        "qemu:dirty-bitmap:backup-vdb"
    );
    let list = client("nbdinfo", &["--list", "--json", &served.uri("")]);
    assert!(list.contains("vda") && list.contains("vdb"));
    let changes = map(&served.uri("vda"), "qemu:dirty-bitmap:backup-vda");
    let changed = [(MIB, 65_536), (3 * MIB, 131_072), (5 * MIB, MIB)];
    assert_covers(&changes, &changed);
    let changes_b = map(&served.uri("vdb"), "qemu:dirty-bitmap:backup-vdb");
    assert_covers(&changes_b, &[(0, MIB)]);
    // A pull backup: only what is dirty is read, over what was copied on Monday.
    let script = format!(
        r#"
h.add_meta_context("qemu:dirty-bitmap:backup-vda")
h.connect_uri("{}")
disk = open("{}", "r+b")
runs = []
def extents(context, offset, entries, error):
    for length, flags in zip(entries[0::2], entries[1::2]):
        runs.append((offset, length, flags))
        offset += length
h.block_status(h.get_size(), 0, extents)
for offset, length, flags in runs:
    if flags & 1:
        disk.seek(offset)
        disk.write(h.pread(length, offset))
disk.close()
"#,
        served.uri("vda"),
        place.path("copy").display()
    );
    std::fs::write(place.path("copy"), &base).unwrap();
    client("nbdsh", &["-c", &script]);
    assert!(std::fs::read(place.path("copy")).unwrap() == content(&place.path("a")));
    served.stop();
    // Several moments at once have names of their own.
    let served = place.serve("--read-only --since monday --since tuesday a");
    let uri = served.uri("vda");
    let tuesday = map(&uri, "qemu:dirty-bitmap:backup-vda:tuesday");
    assert_covers(&tuesday, &changed[1..]);
    served.stop();
}

#[test]
fn a_disk_that_cannot_be_incremental_is_all_dirty_and_says_why() {
    require_nbd_clients!();
    let place = Place::new();
    place.create("a", 4 * MIB, &[]);
    place.create("b", 4 * MIB + 512, &[]);
    place.ok("checkpoint create monday --disk vda=a");
    let served = place.serve("--read-only --since monday --disk vda=a --disk vdb=b");
    let since = &served.answer["exports"][1]["since"][0];
    assert_eq!(since["mode"], "full");
    assert!(since["reason"].is_string());
    let all = map(&served.uri("vdb"), "qemu:dirty-bitmap:backup-vdb");
    assert_eq!(all, [(0, 4 * MIB + 512, 1)]);
    let none = map(&served.uri("vda"), "qemu:dirty-bitmap:backup-vda");
    assert_covers(&none, &[]);
    let stderr = served.stop();
    assert!(
        stderr.contains("disk 'vdb' is all dirty since 'monday'"),
        "{stderr}"
    );
}

#[test]
fn a_read_only_export_is_one_and_leaves_every_byte_as_it_was() {
    require_nbd_clients!();
    let place = Place::new();
    let disk = place.create("disk", 4 * MIB, &[]);
    place.ok("checkpoint create monday disk");
    place.write("disk", &["write -P 5 0 1M"]);
    let before = std::fs::read(&disk).unwrap();
    let served = place.serve("--read-only --since monday disk");
    let info = client("nbdinfo", &["--json", &served.uri("vda")]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true);
    let refused = qemu_io::run(&["-f", "raw"], &["write 0 512"], &served.uri("vda"));
    assert!(!refused.success());
    served.stop();
    assert!(std::fs::read(&disk).unwrap() == before);
}

#[test]
fn signals_end_it_cleanly_and_remove_the_socket() {
    require_nbd_clients!();
    let place = Place::new();
    let disk = place.create("disk", 4 * MIB, &[]);
    place.ok("bitmap add disk b");
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let served = place.serve("disk");
        let socket = served.socket.clone();
        qemu_io::raw(&served.uri("vda"), &["write -P 7 1M 64k"]);
        // Somebody who stays connected does not hold it up.
        let idle = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        served.stop_by(signal);
        assert!(!socket.exists());
        drop(idle);
        let info = qemu_img::info(&disk);
        let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
        assert_eq!(*flags, json!(["auto"]), "not in use");
        qemu_img::check(&disk).assert_clean();
        qemu_io::read_only(&disk, &["read -P 7 1M 64k"]);
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_opened() {
    let place = Place::new();
    place.ok("create disk 4M");
    place.ok("create other 4M");
    place.run("serve disk").ends_with(64);
    place.run("serve --socket s").ends_with(64);
    place.run("serve --socket s -U disk").ends_with(64);
    place.run("serve --socket s --shared 0 disk").ends_with(64);
    place
        .run("serve --socket s -x one --disk a=disk --disk b=other")
        .ends_with(64);
    place
        .run("serve --socket s --bitmap nobody disk")
        .ends_with(1);
    place
        .run("serve --socket s --since never disk")
        .ends_with(1);
    place.run("serve --socket s missing").ends_with(1);
    place.run("serve --socket disk disk").ends_with(1);
    place
        .run("serve --listen nowhere.invalid:1 disk")
        .ends_with(1);
    assert!(!place.path("s").exists());
    assert!(Path::new(&place.path("disk")).exists());
}

#[test]
fn tcp_export_names_and_descriptions_are_as_given() {
    require_nbd_clients!();
    let place = Place::new();
    place.create("disk", 4 * MIB, &[]);
    let served: Served = place.serve("--listen 127.0.0.1:0 -x backup/one -D text disk");
    let address = served.answer["address"].as_str().unwrap();
    let uri = format!("nbd://{address}/backup/one");
    assert_eq!(served.answer["exports"][0]["uris"][1], json!(uri));
    let info = client("nbdinfo", &["--json", &uri]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["exports"][0]["description"], "text");
    assert_eq!(info["exports"][0]["export-size"], 4 * MIB);
    // The second server of the same image is refused by its locks.
    place.run("serve --socket other disk").ends_with(1);
    served.stop();
}

#[test]
fn tls_is_required_of_all_clients_unless_it_is_only_offered() {
    require_nbd_clients!();
    let place = Place::new();
    place.create("disk", 4 * MIB, &[]);
    place
        .run("serve --socket s --tls-verify-peer disk")
        .ends_with(64);
    place
        .run("serve --socket s --tls-certificates nowhere disk")
        .ends_with(1);
    certificates::make(&place.path("pki"));
    let size = |served: &Served, secure: bool| {
        let scheme = if secure { "nbds" } else { "nbd" };
        let uri = format!(
            "{scheme}+unix:///vda?socket={}&tls-certificates={}&tls-hostname=localhost",
            served.socket.display(),
            place.path("pki").display()
        );
        let mut command = Command::new("nbdinfo");
        command.args(["--size", &uri]).stderr(Stdio::null());
        command.output().unwrap().status.success()
    };
    let served = place.serve("--tls-certificates pki --tls-verify-peer disk");
    assert_eq!((size(&served, true), size(&served, false)), (true, false));
    let uri = served.answer["exports"][0]["uris"][0].as_str().unwrap();
    assert!(uri.starts_with("nbds+unix:///vda?socket="), "{uri}");
    served.stop();
    let served = place.serve("--tls-certificates pki --tls on disk");
    assert_eq!((size(&served, true), size(&served, false)), (true, true));
    served.stop();
}
