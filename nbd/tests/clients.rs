//! Real clients: QEMU's tools, libnbd's and fio, on one disk in memory.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::sync::Arc;

use common::{Serving, nbdsh, pattern, run};
use serde_json::Value;
use tidemark_fixtures::oracle::qemu_io;
use tidemark_fixtures::require_nbd_clients;
use tidemark_nbd::{BlockStatus, Limits, MemoryExport, Server};

const MIB: u64 = 1 << 20;

/// Data, zeroes and data again.
fn content() -> Vec<u8> {
    let mut bytes = pattern(8 << 20, 7);
    bytes[1 << 20..3 << 20].fill(0);
    bytes[5 << 20..(5 << 20) + 65_536].fill(0);
    bytes
}

fn disk() -> Arc<MemoryExport> {
    let run = |length, flags| BlockStatus { length, flags };
    let runs = vec![run(3 * MIB, 0), run(65_536, 1), run(5 * MIB - 65_536, 0)];
    let disk = MemoryExport::with_bytes(content());
    Arc::new(disk.with_context("qemu:dirty-bitmap:monday", runs))
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    require_nbd_clients!();
    let serving = Serving::new(disk(), Limits::default());
    let said = run("nbdinfo", &["--json", &serving.uri("disk")]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["protocol"], "newstyle-fixed");
    assert_eq!(said["structured"], true);
    let export = &said["exports"][0];
    assert_eq!(export["export-size"], 8 * MIB);
    assert_eq!(export["description"], "a disk in memory");
    assert_eq!(
        export["contexts"],
        serde_json::json!(["base:allocation", "qemu:dirty-bitmap:monday"])
    );
    let offers = [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ];
    for key in offers {
        assert_eq!(export[key], true, "{key}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let list = run("nbdinfo", &["--list", "--json", &serving.uri("")]);
    assert!(list.contains("\"export-name\": \"disk\""), "{list}");
    let map = run("nbdinfo", &["--map", "--json", &serving.uri("disk")]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let runs: Vec<_> = map.as_array().unwrap().iter().collect();
    let run_of = |entry: &Value| (entry["offset"].as_u64(), entry["type"].as_u64());
    let expected = [
        (0, 0),
        (MIB, 3),
        (3 * MIB, 0),
        (5 * MIB, 3),
        (5 * MIB + 65_536, 0),
    ];
    let expected = expected.map(|(offset, kind)| (Some(offset), Some(kind)));
    assert_eq!(
        runs.iter().map(|entry| run_of(entry)).collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn nbdcopy_takes_everything_over_several_connections() {
    require_nbd_clients!();
    let serving = Serving::new(disk(), Limits::default());
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    let path = copy.to_str().unwrap();
    for options in [&[][..], &["--connections=4", "--requests=16"]] {
        let uri = serving.uri("disk");
        let args = [options, &[&uri[..], path]].concat();
        run("nbdcopy", &args);
        assert!(std::fs::read(&copy).unwrap() == content());
    }
    // And the other way round.
    let target = Arc::new(MemoryExport::new(8 * MIB));
    let other = Serving::new(target.clone(), Limits::default());
    run(
        "nbdcopy",
        &["--flush", &serving.uri("disk"), &other.uri("disk")],
    );
    assert!(target.bytes() == content());
}

#[test]
fn libnbd_gets_right_answers_to_everything_it_can_ask() {
    require_nbd_clients!();
    let disk = disk();
    let serving = Serving::new(disk.clone(), Limits::default());
    let script = format!(
        r#"
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_uri("{uri}")
assert h.get_size() == 8 << 20
assert h.get_structured_replies_negotiated()
seen = {{}}
def extents(context, offset, entries, error):
    seen.setdefault(context, []).extend(zip(entries[0::2], entries[1::2]))
h.block_status(8 << 20, 0, extents)
assert seen["qemu:dirty-bitmap:monday"] == [(3 << 20, 0), (65536, 1), ((5 << 20) - 65536, 0)], seen
assert seen["base:allocation"][1] == (2 << 20, 3), seen
seen.clear()
h.block_status(8 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
assert [len(runs) for runs in seen.values()] == [1, 1], seen
chunks = []
def part(data, offset, status, error):
    chunks.append((len(data), offset, status))
h.pread_structured(4 << 20, 0, part)
assert chunks == [(1 << 20, 0, nbd.READ_DATA), (2 << 20, 1 << 20, nbd.READ_HOLE), (1 << 20, 3 << 20, nbd.READ_DATA)], chunks
h.pread_structured(4 << 20, 0, part, nbd.CMD_FLAG_DF)
assert chunks[-1][0] == 4 << 20
h.pwrite(b"a" * 1000, 100)
h.pwrite(b"b" * 1000, 1100, nbd.CMD_FLAG_FUA)
h.zero(300, 200)
h.zero(300, 700, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 131072)
h.cache(65536, 0)
h.flush()
assert h.pread(2000, 100) == b"a" * 100 + bytes(300) + b"a" * 200 + bytes(300) + b"a" * 100 + b"b" * 1000
h.set_strict_mode(0)
refused = 0
import errno
def no(number, what, *args):
    global refused
    try:
        what(*args)
        raise SystemExit("not refused")
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, number)
        refused += 1
no(errno.EINVAL, h.pread, 512, 8 << 20)
no(errno.ENOSPC, h.pwrite, b"x", 8 << 20)
no(errno.ENOSPC, h.zero, 512, (8 << 20) - 1)
no(errno.EINVAL, h.trim, 512, (8 << 20) - 1)
no(errno.EINVAL, h.trim, 512, 0, 1 << 9)
cookies = [h.aio_pread(nbd.Buffer(4096), at * 4096) for at in range(64)]
while cookies:
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
    if cookies:
        h.poll(-1)
h.shutdown()
print(refused)
"#,
        uri = serving.uri("disk")
    );
    assert_eq!(nbdsh(&script).trim(), "5");
    let bytes = disk.bytes();
    assert_eq!(&bytes[500..700], [b'a'; 200]);
    assert_eq!(&bytes[200..500], [0; 300]);
    assert!(bytes[8192..12_288].iter().all(|byte| *byte == 0));
}

#[test]
fn qemu_img_reads_maps_compares_and_writes() {
    require_nbd_clients!();
    let serving = Serving::new(disk(), Limits::default());
    let uri = serving.uri("disk");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let raw = path("raw");
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, &raw],
    );
    assert!(std::fs::read(&raw).unwrap() == content());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri, &raw],
    );
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let zeroes: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["zero"] == true)
        .map(|entry| (entry["start"].as_u64(), entry["length"].as_u64()))
        .collect();
    let expected = [(MIB, 2 * MIB), (5 * MIB, 65_536)].map(|(at, len)| (Some(at), Some(len)));
    assert_eq!(zeroes, expected);
    let bitmap = format!(
        "driver=nbd,export=disk,server.type=unix,server.path={},\
         x-dirty-bitmap=qemu:dirty-bitmap:monday",
        serving.socket().display()
    );
    let map = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &bitmap],
    );
    let map: Value = serde_json::from_str(&map).unwrap();
    let dirty = map
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["data"] == false);
    assert_eq!(dirty.unwrap()["start"], 3 * MIB, "{map}");
    let target = Arc::new(MemoryExport::new(8 * MIB));
    let other = Serving::new(target.clone(), Limits::default());
    let to = other.uri("disk");
    run(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &raw, &to],
    );
    assert!(target.bytes() == content());
}

#[test]
fn qemu_io_writes_what_qemu_io_reads() {
    require_nbd_clients!();
    let disk = Arc::new(MemoryExport::new(8 * MIB));
    let serving = Serving::new(disk.clone(), Limits::default());
    let uri = serving.uri("disk");
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512k 64k",
        "write -z 256k 64k",
        "write -z -u 128k 4k",
        "discard 7M 1M",
        "aio_write -P 0x33 2M 1M",
        "aio_write -P 0x44 3M 1M",
        "aio_flush",
        "flush",
        "read -P 0x22 512k 64k",
        "read -P 0 256k 64k",
        "read -P 0x33 2M 1M",
        "read -P 0x44 3M 1M",
    ];
    qemu_io::raw(&uri, &commands);
    let bytes = disk.bytes();
    assert!(bytes[2 << 20..3 << 20].iter().all(|byte| *byte == 0x33));
    assert!(bytes[128 << 10..132 << 10].iter().all(|byte| *byte == 0));
}

#[test]
fn fio_verifies_what_it_wrote_in_disorder() {
    require_nbd_clients!();
    let serving = Serving::new(Arc::new(MemoryExport::new(8 * MIB)), Limits::default());
    let uri = format!("--uri={}", serving.uri("disk"));
    let said = run(
        "fio",
        &[
            "--name=life",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--blockalign=512",
            "--iodepth=32",
            "--size=8M",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--randseed=5",
            "--output-format=json",
        ],
    );
    let start = said.find('{').unwrap();
    let said: Value = serde_json::from_str(&said[start..]).unwrap();
    assert_eq!(said["jobs"][0]["error"], 0);
    let total = |key: &str| said["jobs"][0][key]["total_ios"].as_u64().unwrap();
    println!("{} writes, {} verified", total("write"), total("read"));
    assert!(total("write") > 100 && total("read") > 100);
}

#[test]
fn clients_over_tcp_are_served_too() {
    require_nbd_clients!();
    let mut server = Server::new(Limits::default()).unwrap();
    server.export("disk", disk()).unwrap();
    let place = server.listen_tcp("127.0.0.1:0").unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run());
    let uri = format!("nbd://{place}/disk");
    let size = run("nbdinfo", &["--size", &uri]);
    assert_eq!(size.trim(), (8 * MIB).to_string());
    qemu_io::raw(&uri, &["write -P 0x55 1M 2M", "read -P 0x55 1M 2M"]);
    handle.shut_down();
    thread.join().unwrap().unwrap();
}

#[test]
fn qemu_negotiates_extended_headers_and_asks_for_more_than_4_gib() {
    require_nbd_clients!();
    // Sparse memory: nothing of it is touched until it is read.
    let run_of = |length, flags| BlockStatus { length, flags };
    let runs = vec![
        run_of(5 << 30, 0),
        run_of(1 << 20, 1),
        run_of((1 << 30) - MIB, 0),
    ];
    let serving = Serving::new(Arc::new(Huge(runs)), Limits::default());
    let bitmap = format!(
        "driver=nbd,export=disk,server.type=unix,server.path={},x-dirty-bitmap=test:huge",
        serving.socket().display()
    );
    let map = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &bitmap],
    );
    let map: Value = serde_json::from_str(&map).unwrap();
    let dirty = map
        .as_array()
        .unwrap()
        .iter()
        .find(|run| run["data"] == false);
    assert_eq!(dirty.unwrap()["start"], 5_u64 << 30, "{map}");
    assert_eq!(dirty.unwrap()["length"], MIB);
}

/// A disk of 6 GiB that only has a context.
struct Huge(Vec<BlockStatus>);

impl tidemark_nbd::Export for Huge {
    fn size(&self) -> u64 {
        6 << 30
    }
    fn read(&self, buffer: &mut [u8], _: u64) -> Result<(), tidemark_nbd::Fault> {
        buffer.fill(0);
        Ok(())
    }
    fn write(&self, _: &[u8], _: u64) -> Result<(), tidemark_nbd::Fault> {
        Err(tidemark_nbd::ErrorCode::NotPermitted.into())
    }
    fn zero(&self, _: u64, _: u64, _: tidemark_nbd::Zeroing) -> Result<(), tidemark_nbd::Fault> {
        Err(tidemark_nbd::ErrorCode::NotPermitted.into())
    }
    fn trim(&self, _: u64, _: u64) -> Result<(), tidemark_nbd::Fault> {
        Err(tidemark_nbd::ErrorCode::NotPermitted.into())
    }
    fn flush(&self) -> Result<(), tidemark_nbd::Fault> {
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        vec!["test:huge".to_owned()]
    }
    fn block_status<'a>(
        &'a self,
        _: &str,
        range: std::ops::Range<u64>,
    ) -> Result<tidemark_nbd::StatusRuns<'a>, tidemark_nbd::Fault> {
        let mut start = 0;
        let mut at = range.start;
        Ok(Box::new(self.0.iter().filter_map(move |run| {
            start += run.length;
            let length = start.checked_sub(at).filter(|length| *length > 0)?;
            at = start;
            Some(Ok(BlockStatus { length, ..*run }))
        })))
    }
}
