//! `serve --control`: checkpoints of a disk that is in use, and what a stranger may say.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::serving::client;
use common::{Place, content};
use serde_json::{Value, json};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_nbd_clients;

const MIB: u64 = 1 << 20;

struct Talk {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Talk {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let answers = BufReader::new(stream.try_clone().unwrap());
        Self { stream, answers }
    }

    fn say(&mut self, line: &str) -> Value {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\n").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn ok(&mut self, request: &Value) -> Value {
        let answer = self.say(&request.to_string());
        assert_eq!(answer["error"], Value::Null, "{request}: {answer}");
        answer["return"].clone()
    }
}

/// Writes, checkpoints and writes again, four times over; keeps what the disk was at each checkpoint.
const LIFE: &str = r#"
import json, random, socket
random.seed(3)
h.connect_uri(URI)
control = socket.socket(socket.AF_UNIX)
control.connect(CONTROL)
lines = control.makefile("r")
size = h.get_size()
for number in range(4):
    for _ in range(12):
        offset = random.randrange(size) & ~511
        length = min(random.choice((512, 4096, 70000)), size - offset)
        kind = random.randrange(4)
        if kind < 2:
            h.pwrite(random.randbytes(length), offset)
        elif kind == 2:
            h.zero(length, offset)
        else:
            h.trim(length, offset)
    # Requests are in flight while the checkpoint is taken; they write what is there already.
    still = [(at, h.pread(4096, at)) for at in range(0, 16 * 4096, 4096)]
    cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at) for at, data in still]
    request = {"execute": "checkpoint-create", "arguments": {"name": f"c{number}"}, "id": number}
    control.sendall((json.dumps(request) + "\n").encode())
    answer = json.loads(lines.readline())
    assert answer["id"] == number and answer["return"]["name"] == f"c{number}", answer
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    open(f"{FOLDER}/c{number}", "wb").write(h.pread(size, 0))
h.pwrite(b"last" * 128, 1 << 20)
h.shutdown()
"#;

#[test]
fn checkpoints_of_a_disk_in_use_miss_no_change() {
    require_nbd_clients!();
    let place = Place::new();
    let disk = place.create("disk", 4 * MIB, &[]);
    place.write("disk", &["write -P 1 0 4M"]);
    place.ok("backup --to dir --checkpoint start disk");
    let served = place.serve("--control control --since start disk");
    let setting = format!(
        "URI = {:?}\nCONTROL = {:?}\nFOLDER = {:?}\n",
        served.uri("vda"),
        place.path("control"),
        place.path("."),
    );
    client("nbdsh", &["-c", &format!("{setting}{LIFE}")]);
    let mut talk = Talk::new(&place.path("control"));
    let list = talk.ok(&json!({ "execute": "checkpoint-list" }));
    assert_eq!(list.as_array().unwrap().len(), 5);
    talk.ok(&json!({ "execute": "checkpoint-delete", "arguments": { "name": "c1" } }));
    drop(talk);
    served.stop();
    qemu_img::check(&disk).assert_clean();
    let last = content(&disk);
    let mut sectors = 0;
    for number in [0, 2, 3] {
        let then = std::fs::read(place.path(&format!("c{number}"))).unwrap();
        let served = place.serve(&format!("--read-only --since c{number} disk"));
        assert_eq!(
            served.answer["exports"][0]["since"][0]["mode"],
            "incremental"
        );
        let said = client(
            "nbdinfo",
            &[
                "--json",
                "--map=qemu:dirty-bitmap:backup-vda",
                &served.uri("vda"),
            ],
        );
        let map: Value = serde_json::from_str(&said).unwrap();
        for run in map
            .as_array()
            .unwrap()
            .iter()
            .filter(|run| run["type"] == 0)
        {
            let range = |key: &str| usize::try_from(run[key].as_u64().unwrap()).unwrap();
            let clean = range("offset")..range("offset") + range("length");
            sectors += clean.len() / 512;
            assert!(
                then[clean.clone()] == last[clean],
                "clean and changed: {run}"
            );
        }
        served.stop();
    }
    let report = place.json("backup --to dir --since start --checkpoint end disk");
    assert_eq!(report["disks"][0]["mode"], "incremental");
    place.ok("restore --from dir --to restored --format raw");
    assert!(std::fs::read(place.path("restored")).unwrap() == last);
    println!("{sectors} clean sectors compared");
    assert!(sectors > 1000);
}

#[test]
fn what_makes_no_sense_is_answered_and_changes_nothing() {
    require_nbd_clients!();
    let place = Place::new();
    place.create("disk", 4 * MIB, &[]);
    place.ok("checkpoint create monday disk");
    let before = std::fs::read(place.path("disk")).unwrap();
    let served = place.serve("--control control --bitmap monday disk");
    let mut talk = Talk::new(&place.path("control"));
    let long = format!(
        "{{\"execute\": \"status\", \"id\": \"{}\"}}",
        "x".repeat(60_000)
    );
    assert_eq!(talk.say(&long)["error"], Value::Null);
    let lines = [
        "nothing",
        "{}",
        "[]",
        "7",
        r#"{"execute": 7}"#,
        r#"{"execute": "format"}"#,
        r#"{"execute": "status", "arguments": 7}"#,
        r#"{"execute": "status", "arguments": {"x": 1}}"#,
        r#"{"execute": "checkpoint-create", "arguments": {"name": 7}}"#,
        r#"{"execute": "checkpoint-create", "arguments": {"name": "monday"}}"#,
        r#"{"execute": "checkpoint-create", "arguments": {"name": "../x"}}"#,
        r#"{"execute": "checkpoint-create", "arguments": {"nam": "x"}}"#,
        r#"{"execute": "checkpoint-delete"}"#,
        r#"{"execute": "checkpoint-delete", "arguments": {"name": "nobody"}}"#,
    ];
    for line in lines {
        let answer = talk.say(line);
        assert!(answer["error"]["message"].is_string(), "{line}: {answer}");
    }
    assert_eq!(
        talk.say(&"x".repeat(70_000))["error"]["message"],
        "the line is too long"
    );
    let mut talk = Talk::new(&place.path("control"));
    let status = talk.ok(&json!({ "execute": "status", "id": [1] }));
    assert_eq!(status["exports"][0]["name"], "vda");
    assert_eq!(
        status["exports"][0]["contexts"][2],
        "qemu:dirty-bitmap:monday"
    );
    assert!(std::fs::read(place.path("disk")).unwrap() == before);
    let mode = std::fs::metadata(place.path("control"))
        .unwrap()
        .permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o600
    );
    println!("{} lines refused", lines.len() + 1);
    talk.ok(&json!({ "execute": "shut-down" }));
    served.wait();
    assert!(!place.path("control").exists());
}
