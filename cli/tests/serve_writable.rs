//! `serve` for writers: what clients wrote is in the image, every bitmap knows of it, and a server
//! that is killed costs no increment.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::serving::client;
use common::{Place, content};
use serde_json::Value;
use tidemark_fixtures::oracle::{nbd, qemu_img, qemu_io};
use tidemark_fixtures::require_nbd_clients;

const MIB: u64 = 1 << 20;

/// Random changes over two connections against a model in Python: after each round every byte is
/// read back, and every sector that differs from the beginning is dirty in both contexts.
const RANDOM_LIFE: &str = r#"
import random
random.seed(SEED)
other = nbd.NBD()
for handle in (h, other):
    handle.add_meta_context("qemu:dirty-bitmap:b")
    handle.add_meta_context("qemu:dirty-bitmap:backup-vda")
    handle.connect_uri(URI)
assert h.can_multi_conn()
size = h.get_size()
first = h.pread(size, 0)
model = bytearray(first)
changes = 0
for round in range(6):
    for number in range(25):
        handle = random.choice((h, other))
        offset = random.randrange(size)
        if random.random() < 0.5:
            offset &= ~4095
        length = min(random.choice((1, 512, 4096, 65536, 300000)), size - offset)
        kind = random.randrange(6)
        if kind < 3:
            data = random.randbytes(length)
            handle.pwrite(data, offset, random.choice((0, nbd.CMD_FLAG_FUA)))
            model[offset:offset + length] = data
        elif kind == 3:
            handle.zero(length, offset, random.choice((0, nbd.CMD_FLAG_NO_HOLE)))
            model[offset:offset + length] = bytes(length)
        elif kind == 4:
            handle.trim(length, offset)
            model[offset:offset + length] = h.pread(length, offset)
        else:
            try:
                handle.zero(length, offset, nbd.CMD_FLAG_FAST_ZERO)
                model[offset:offset + length] = bytes(length)
            except nbd.Error as error:
                assert error.errno in ("EOPNOTSUPP", "ENOTSUP"), error.errno
        changes += 1
    other.flush()
    assert other.pread(size, 0) == model
    dirty = {}
    def extents(context, offset, entries, error):
        seen = dirty.setdefault(context, bytearray())
        for length, flags in zip(entries[0::2], entries[1::2]):
            assert length % 512 == 0
            seen += bytes([flags & 1]) * (length // 512)
    other.block_status(size, 0, extents)
    assert len(dirty) == 2
    for context, bits in dirty.items():
        for granule in range(len(bits)):
            part = slice(granule * 512, (granule + 1) * 512)
            if first[part] != model[part]:
                assert bits[granule], (context, granule)
open(MODEL, "wb").write(model)
h.shutdown()
other.shutdown()
print(changes)
"#;

fn random_life(place: &Place, uri: &str, seed: u64) -> u64 {
    let model = place.path("model");
    let model = model.to_str().unwrap();
    let setting = format!("SEED = {seed}\nURI = {uri:?}\nMODEL = {model:?}\n");
    let said = client("nbdsh", &["-c", &format!("{setting}{RANDOM_LIFE}")]);
    said.trim().parse().unwrap()
}

#[test]
fn what_clients_write_is_in_the_image_and_in_every_bitmap() {
    require_nbd_clients!();
    let kinds: [&[(&str, &str)]; 4] = [
        &[],
        &[("cluster_size", "4096")],
        &[("extended_l2", "on"), ("cluster_size", "128k")],
        &[("lazy_refcounts", "on")],
    ];
    let (mut changes, mut seed) = (0, 0);
    for options in kinds {
        let place = Place::new();
        let disk = place.create("disk", 4 * MIB + 512, options);
        place.write("disk", &["write -P 9 1M 2M"]);
        qemu_img::bitmap_add(&disk, "b", Some(65_536));
        place.ok("bitmap add --disabled disk frozen");
        place.ok("checkpoint create monday disk");
        let served = place.serve("--bitmap b --since monday disk");
        changes += random_life(&place, &served.uri("vda"), seed);
        seed += 1;
        served.stop();
        let expected = std::fs::read(place.path("model")).unwrap();
        assert!(content(&disk) == expected, "{options:?}");
        qemu_img::check(&disk).assert_clean();
        // QEMU reads the same bits, and what was frozen stayed so.
        let dump = place.json("bitmap dump disk b");
        let dirty = |run: &&Value| run["dirty"] == true;
        let ours: u64 = dump
            .as_array()
            .unwrap()
            .iter()
            .filter(dirty)
            .map(|run| run["length"].as_u64().unwrap())
            .sum();
        let theirs = nbd::dirty_extents(&disk, "b");
        let theirs: u64 = theirs.iter().filter(|run| run.2).map(|run| run.1).sum();
        assert_eq!(ours, theirs);
        let frozen = nbd::dirty_extents(&disk, "frozen");
        assert_eq!(frozen, [(0, 4 * MIB + 512, false)]);
    }
    println!("{changes} changes on {seed} images");
    assert!(changes >= 600);
}

#[test]
fn an_overlay_takes_the_writes_and_its_backing_file_none() {
    require_nbd_clients!();
    let place = Place::new();
    let below = place.create("below", 4 * MIB, &[]);
    place.write("below", &["write -P 3 0 4M"]);
    let before = std::fs::read(&below).unwrap();
    place.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "below", "-F", "qcow2", "disk",
    ]);
    place.ok("bitmap add disk b");
    place.ok("checkpoint create monday disk");
    let served = place.serve("--bitmap b --since monday disk");
    random_life(&place, &served.uri("vda"), 77);
    served.stop();
    let disk = place.path("disk");
    assert!(content(&disk) == std::fs::read(place.path("model")).unwrap());
    assert!(std::fs::read(&below).unwrap() == before);
    qemu_img::check(&disk).assert_clean();
}

#[test]
fn fio_verifies_an_image_over_several_connections() {
    require_nbd_clients!();
    let place = Place::new();
    let disk = place.create("disk", 16 * MIB, &[]);
    place.ok("checkpoint create monday disk");
    let served = place.serve("disk");
    let uri = format!("--uri={}", served.uri("vda"));
    let args = [
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=16",
        "--size=4M",
        "--offset_increment=4M",
        "--numjobs=4",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--fsync=64",
        "--name=life",
        "--group_reporting",
        "--output-format=json",
    ];
    let said = client("fio", &args);
    let said: Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let job = &said["jobs"][0];
    assert_eq!(job["error"], 0);
    println!("{} writes verified", job["write"]["total_ios"]);
    assert_eq!(job["write"]["total_ios"], 4096);
    served.stop();
    qemu_img::check(&disk).assert_clean();
}

/// Writes for as long as it is let, with a flush now and then.
const WRITER: &str = r#"
import random
random.seed(SEED)
h.connect_uri(URI)
size = h.get_size()
while True:
    offset = random.randrange(size) & ~511
    length = min(random.choice((512, 4096, 100000)), size - offset)
    kind = random.randrange(10)
    if kind < 8:
        h.pwrite(random.randbytes(length), offset)
    elif kind == 8:
        h.zero(length, offset)
    else:
        h.trim(length, offset)
    if random.random() < 0.05:
        h.flush()
"#;

#[test]
fn after_kill_dash_nine_and_writes_of_qemu_the_next_increment_is_right() {
    require_nbd_clients!();
    let cases = std::env::var("TIDEMARK_CASES");
    let rounds: u64 = cases.ok().and_then(|text| text.parse().ok()).unwrap_or(60) / 10;
    let place = Place::new();
    let disk = place.create("disk", 16 * MIB, &[]);
    place.write("disk", &["write -P 1 0 16M"]);
    place.ok("backup --to dir --checkpoint point0 disk");
    let mut smaller = 0;
    for round in 0..rounds {
        let served = place.serve(&format!("--since point{round} disk"));
        let setting = format!("SEED = {round}\nURI = {:?}\n", served.uri("vda"));
        let mut writer = Command::new("nbdsh")
            .args(["-c", &format!("{setting}{WRITER}")])
            .env(
                "PATH",
                format!("/usr/bin:{}", std::env::var("PATH").unwrap()),
            )
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(250 + 70 * round));
        assert!(writer.try_wait().unwrap().is_none(), "it is writing");
        served.kill_dash_nine();
        writer.wait().unwrap();
        // QEMU takes the image as it is, writes, and finds at worst leaks.
        qemu_io::commands(
            &disk,
            &[&format!("write -P {} {}M 64k", round + 2, round % 16)],
        );
        let check = place.qemu_img(&["check", "--output=json", "disk"]);
        assert!(check.0 == 0 || check.0 == 3, "{check:?}");
        let next = round + 1;
        let line = format!("backup --to dir --since point{round} --checkpoint point{next} disk");
        let report = place.json(&line);
        assert_eq!(report["disks"][0]["mode"], "incremental", "{report}");
        smaller += u64::from(report["disks"][0]["bytes"].as_u64().unwrap() < 16 * MIB);
        let expected = content(&disk);
        place.ok("restore --from dir --to restored --format raw");
        assert!(std::fs::read(place.path("restored")).unwrap() == expected);
        std::fs::remove_file(place.path("restored")).unwrap();
        let path = report["disks"][0]["path"].as_str().unwrap();
        let increment = place.path("dir").join(path);
        assert!(content(&increment) == expected, "qemu-img reads the chain");
    }
    println!("{rounds} kills, {smaller} increments smaller than the disk");
    assert!(rounds >= 1);
}
