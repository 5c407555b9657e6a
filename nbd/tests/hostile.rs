//! Hostile clients: each has a verdict, nobody else notices, nothing is written.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ACK, Client, Serving, pattern, text};
use tidemark_fixtures::hostile::nbd::{
    DISK_BYTES, EXPORT, HostileClient, OPTION_BYTES, REQUEST_BYTES, Stage, Verdict, hostile_clients,
};
use tidemark_nbd::{Limits, MemoryExport};

fn limits() -> Limits {
    Limits {
        request_bytes: REQUEST_BYTES,
        option_bytes: OPTION_BYTES,
        ..Limits::default()
    }
}

/// Behaves well until the stage.
fn client_at(serving: &Serving, stage: Stage) -> Client {
    let mut client = serving.connect();
    if stage == Stage::Greeted {
        return client;
    }
    client.greet();
    match stage {
        Stage::Greeted | Stage::Options | Stage::Simple => {}
        Stage::Structured | Stage::Chunks => drop(client.agree(8, b"")),
        Stage::Extended => {
            client.agree(11, b"");
            let chosen = client.choose_contexts(EXPORT, &["base:allocation"]);
            assert_eq!(chosen, [(0, "base:allocation".to_owned())]);
        }
    }
    if matches!(stage, Stage::Simple | Stage::Chunks | Stage::Extended) {
        client.go(EXPORT);
    }
    client
}

/// Sends a small read and takes its answer.
fn still_answers(client: &mut Client, stage: Stage) {
    match stage {
        Stage::Simple => {
            client.request(0, 0, 77, 512, 512);
            assert_eq!(client.simple(), (0, 77));
            client.take(512);
        }
        Stage::Chunks => {
            client.request(0, 0, 77, 512, 512);
            assert_eq!(client.chunk().cookie, 77);
        }
        Stage::Extended => {
            client.extended(0, 0, 77, 512, 512);
            assert_eq!(client.extended_chunk().0.cookie, 77);
        }
        Stage::Greeted | Stage::Options | Stage::Structured => {
            client.agree(6, &[&text(EXPORT)[..], b"\0\0"].concat());
        }
    }
}

fn error_of_request(client: &mut Client, stage: Stage) -> u32 {
    match stage {
        Stage::Simple => client.simple().0,
        Stage::Chunks => client.chunk().error().unwrap_or(0),
        _ => client.extended_chunk().0.error().unwrap_or(0),
    }
}

fn number_of_last_option(sends: &[u8]) -> u32 {
    let at = sends.windows(8).rposition(|bytes| bytes == b"IHAVEOPT");
    let at = at.unwrap() + 8;
    u32::from_be_bytes(sends[at..at + 4].try_into().unwrap())
}

/// Answers before the one that counts: the case had to ask something else first.
fn last_answer(client: &mut Client, case: &HostileClient) -> u32 {
    let asked = case.sends.windows(8).filter(|bytes| *bytes == b"IHAVEOPT");
    if asked.count() > 1 {
        assert_eq!(client.answer(11).0, ACK);
    }
    client.answer(number_of_last_option(&case.sends)).0
}

fn check(serving: &Serving, case: &HostileClient) {
    let mut client = client_at(serving, case.stage);
    // The server may hang up before all was sent.
    let _ = client.stream.write_all(&case.sends);
    if case.half_closes {
        client.stream.shutdown(Shutdown::Write).unwrap();
    }
    let in_requests = matches!(case.stage, Stage::Simple | Stage::Chunks | Stage::Extended);
    match case.verdict {
        Verdict::Ended => assert!(client.is_ended()),
        Verdict::OptionRefused(error) => {
            assert_eq!(last_answer(&mut client, case), error);
            still_answers(&mut client, case.stage);
        }
        Verdict::OptionRefusedAndEnded(error) => {
            assert_eq!(last_answer(&mut client, case), error);
            assert!(client.is_ended());
        }
        Verdict::RequestRefused(error) => {
            assert_eq!(error_of_request(&mut client, case.stage), error);
            still_answers(&mut client, case.stage);
        }
        Verdict::Allowed if in_requests => {
            assert_eq!(error_of_request(&mut client, case.stage), 0);
            still_answers(&mut client, case.stage);
        }
        Verdict::Allowed => assert_eq!(last_answer(&mut client, case), ACK),
    }
}

#[test]
fn every_hostile_client_has_its_verdict() {
    let bytes = pattern(usize::try_from(DISK_BYTES).unwrap(), 1);
    let disk = Arc::new(MemoryExport::with_bytes(bytes.clone()));
    let serving = Serving::new(disk.clone(), limits());
    // Somebody who behaves is there all the time.
    let mut good = client_at(&serving, Stage::Simple);
    let cases = hostile_clients();
    for case in &cases {
        println!("{}", case.name);
        check(&serving, case);
        still_answers(&mut good, Stage::Simple);
        assert!(disk.bytes() == bytes, "{}: the disk changed", case.name);
    }
    drop(good);
    serving.end().unwrap();
    println!("{} hostile clients", cases.len());
    assert!(cases.len() >= 88, "the table shrank: {}", cases.len());
}

#[test]
fn clients_that_trickle_are_cut_off_and_idle_ones_are_not() {
    let limits = Limits {
        handshake: Duration::from_millis(300),
        request: Duration::from_millis(200),
        ..limits()
    };
    let serving = Serving::new(Arc::new(MemoryExport::new(DISK_BYTES)), limits);
    let mut idle = client_at(&serving, Stage::Simple);
    let trickle = |mut client: Client, bytes: &[u8]| {
        let begin = Instant::now();
        for byte in bytes.iter().cycle() {
            if client.stream.write_all(&[*byte]).is_err() || begin.elapsed().as_secs() > 10 {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        begin.elapsed()
    };
    let option = b"IHAVEOPT\0\0\0\x63\0\0\x10\0";
    let times = [
        // Greets, and then sends an option that never ends.
        trickle(client_at(&serving, Stage::Options), option),
        // Whole options, one after another: the handshake as a whole has its time.
        trickle(
            client_at(&serving, Stage::Options),
            b"IHAVEOPT\0\0\0\x63\0\0\0\0",
        ),
        trickle(
            client_at(&serving, Stage::Simple),
            b"\x25\x60\x95\x13\0\0\0\0",
        ),
        trickle(
            client_at(&serving, Stage::Simple),
            b"\x25\x60\x95\x13\0\0\0\x01<cookie>\0\0\0\0\0\0\0\0\0\0\x80\0",
        ),
    ];
    for time in times {
        assert!(time < Duration::from_secs(5), "{times:?}");
    }
    // Who says nothing in the handshake is cut off as well.
    let mut silent = serving.connect();
    assert!(silent.is_ended());
    // Who says nothing between two requests may stay.
    std::thread::sleep(Duration::from_millis(700));
    still_answers(&mut idle, Stage::Simple);
    let slow = serving
        .events()
        .into_iter()
        .filter(|event| event.ends_with("the client was too slow"));
    assert_eq!(slow.count(), 5);
}

#[test]
fn a_client_that_never_reads_holds_up_nobody_else() {
    let limits = Limits {
        stall: Duration::from_millis(300),
        bytes_in_flight: 1 << 20,
        workers: 4,
        ..limits()
    };
    let bytes = pattern(usize::try_from(DISK_BYTES).unwrap(), 2);
    let serving = Serving::new(Arc::new(MemoryExport::with_bytes(bytes)), limits);
    let mut good = client_at(&serving, Stage::Simple);
    let mut deaf = client_at(&serving, Stage::Simple);
    for cookie in 0..200 {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(u64::to_be_bytes(cookie));
        bytes.extend([0; 8]);
        bytes.extend(REQUEST_BYTES.to_be_bytes());
        if deaf.stream.write_all(&bytes).is_err() {
            break;
        }
        still_answers(&mut good, Stage::Simple);
    }
    let begin = Instant::now();
    while serving.handle.clients() > 1 && begin.elapsed() < Duration::from_secs(10) {
        still_answers(&mut good, Stage::Simple);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(serving.handle.clients(), 1, "the deaf one was sent away");
}

#[test]
fn a_flood_of_options_ends() {
    let limits = Limits {
        options: 100,
        ..limits()
    };
    let serving = Serving::new(Arc::new(MemoryExport::new(DISK_BYTES)), limits);
    let mut client = client_at(&serving, Stage::Options);
    let mut answered = 0;
    loop {
        let asked = client.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        let mut magic = [0; 8];
        if asked.is_err() || client.stream.read_exact(&mut magic).is_err() {
            break;
        }
        client.take(12 + 8);
        assert_eq!(client.answer(3).0, ACK);
        answered += 1;
    }
    assert_eq!(answered, 100);
}

#[test]
fn clients_over_the_limit_wait_for_their_turn() {
    let limits = Limits {
        clients: 2,
        ..limits()
    };
    let serving = Serving::new(Arc::new(MemoryExport::new(DISK_BYTES)), limits);
    let first = client_at(&serving, Stage::Simple);
    let mut second = client_at(&serving, Stage::Simple);
    let mut third = UnixStream::connect(serving.socket()).unwrap();
    third
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut hello = [0; 18];
    assert!(
        third.read_exact(&mut hello).is_err(),
        "nobody greets it yet"
    );
    assert_eq!(serving.handle.clients(), 2);
    still_answers(&mut second, Stage::Simple);
    drop(first);
    third
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    third.read_exact(&mut hello).unwrap();
    assert_eq!(&hello[..8], b"NBDMAGIC");
}

#[test]
fn random_bytes_at_every_stage_end_in_time_and_change_nothing_but_the_disk() {
    let cases = std::env::var("TIDEMARK_CASES");
    let cases: u64 = cases.ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let serving = Serving::new(Arc::new(MemoryExport::new(DISK_BYTES)), limits());
    let stages = [
        Stage::Greeted,
        Stage::Options,
        Stage::Structured,
        Stage::Simple,
        Stage::Chunks,
        Stage::Extended,
    ];
    for case in 0..cases {
        for stage in stages {
            let mut client = client_at(&serving, stage);
            let mut bytes = pattern(400, case);
            let magic: &[u8] = match stage {
                Stage::Greeted => b"\0\0\0\x03",
                Stage::Options | Stage::Structured => b"IHAVEOPT\0\0\0",
                Stage::Simple | Stage::Chunks => b"\x25\x60\x95\x13\0\0\0",
                Stage::Extended => b"\x21\xe4\x1c\x71\0\0\0",
            };
            bytes[..magic.len()].copy_from_slice(magic);
            bytes[magic.len()] &= 15;
            let _ = client.stream.write_all(&bytes);
            let _ = client.stream.shutdown(Shutdown::Write);
            let mut rest = Vec::new();
            let _ = client.stream.read_to_end(&mut rest);
        }
    }
    let mut good = client_at(&serving, Stage::Simple);
    still_answers(&mut good, Stage::Simple);
    drop(good);
    serving.end().unwrap();
    println!("{} random clients", cases * 6);
}
