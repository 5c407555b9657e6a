//! What a client gets that speaks the protocol by itself: every reply in every style.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{Serving, pattern, text};
use tidemark_nbd::protocol::numbers::{command, flag, transmission};
use tidemark_nbd::{
    BlockSizes, BlockStatus, Direction, Ending, ErrorCode, Event, Export, Fault, Limits,
    MemoryExport, Offers, Server, StatusRuns, Transport, UnixSocket, Zeroing,
};

const SIZE: u64 = 1 << 20;

fn disk() -> Arc<MemoryExport> {
    Arc::new(MemoryExport::with_bytes(pattern(1 << 20, 3)))
}

/// Size and flags of an export.
fn facts(answers: &[(u32, Vec<u8>)]) -> (u64, u16) {
    let data = &answers[0].1;
    assert_eq!((answers[0].0, &data[..2]), (3, &b"\0\0"[..]));
    (
        u64::from_be_bytes(data[2..10].try_into().unwrap()),
        u16::from_be_bytes(data[10..12].try_into().unwrap()),
    )
}

#[test]
fn an_export_is_described_as_it_is_asked() {
    let tiny = BlockSizes {
        minimum: 512,
        preferred: 8192,
        maximum: 1 << 20,
    };
    let strict = MemoryExport::new(SIZE).read_only().with_block_sizes(tiny);
    let exports: [(&str, Arc<dyn Export>); 2] = [("disk", disk()), ("strict", Arc::new(strict))];
    let serving = Serving::all(&exports, Limits::default());
    let mut client = serving.connect();
    client.greet();
    let names = client.agree(3, b"");
    let expected = [text("disk"), text("strict")].map(|name| (2, name));
    assert_eq!(names, expected);
    client.agree(8, b"");
    let all = client.agree(
        6,
        &[&text("disk")[..], b"\0\x03\0\x01\0\x02\0\x03"].concat(),
    );
    let writable = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES
        | transmission::SEND_FAST_ZERO
        | transmission::SEND_CACHE
        | transmission::SEND_DF
        | transmission::CAN_MULTI_CONN;
    assert_eq!(facts(&all), (SIZE, writable));
    assert_eq!(all[1].1, b"\0\x01disk");
    assert_eq!(all[2].1, b"\0\x02a disk in memory");
    assert_eq!(all[3].1, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    // Who does not ask for the block sizes of a strict export is told to.
    client.ask(7, &[&text("strict")[..], b"\0\0"].concat());
    assert_eq!(client.answer(7).0, (1 << 31) + 8);
    let strict = client.agree(7, &[&text("strict")[..], b"\0\x01\0\x03"].concat());
    assert_eq!(strict[1].1, b"\0\x03\0\0\x02\0\0\0\x20\0\0\x10\0\0");
    let flags = facts(&strict).1;
    assert_ne!(flags & transmission::READ_ONLY, 0);
    client.request(command::READ, 0, 1, 512, 512);
    assert_eq!(client.chunk().error(), None);
    client.request(command::READ, 0, 2, 256, 512);
    assert_eq!(client.chunk().error(), Some(22));
    client.request(command::WRITE, 0, 3, 0, 512);
    client.send(&[1; 512]);
    assert_eq!(client.chunk().error(), Some(1));
    // The empty name is no export when there are several.
    let mut client = serving.connect();
    client.greet();
    client.ask(7, &[&text("")[..], b"\0\0"].concat());
    assert_eq!(client.answer(7).0, (1 << 31) + 6);
}

#[test]
fn an_old_client_gets_its_export() {
    let serving = Serving::new(disk(), Limits::default());
    for (greeting, zeroes) in [(1, 124), (3, 0)] {
        let mut client = serving.connect();
        client.send(&[0, 0, 0, greeting]);
        // The only export also answers to the empty name.
        client.ask(1, if zeroes == 0 { b"" } else { b"disk" });
        assert_eq!(client.u64(), SIZE);
        client.take(2 + zeroes);
        client.request(command::READ, 0, 9, 4096, 100);
        assert_eq!(client.simple(), (0, 9));
        assert_eq!(client.take(100), pattern(1 << 20, 3)[4096..4196]);
        client.request(command::DISC, 0, 0, 0, 0);
        assert!(client.is_ended());
    }
}

#[test]
fn data_is_written_zeroed_trimmed_and_read_back_in_every_style() {
    let mut cases = 0;
    for style in 0..3 {
        let disk = disk();
        let serving = Serving::new(disk.clone(), Limits::default());
        let mut client = serving.connect();
        client.greet();
        match style {
            0 => {}
            1 => drop(client.agree(8, b"")),
            _ => drop(client.agree(11, b"")),
        }
        client.go("disk");
        let mut expected = pattern(1 << 20, 3);
        let data = pattern(70_000, 4);
        let jobs: [(u16, u16, Range<usize>); 7] = [
            (command::WRITE, 0, 5000..75_000),
            (command::WRITE, flag::FUA, 200_001..200_002),
            (command::WRITE_ZEROES, 0, 300_000..400_000),
            (command::WRITE_ZEROES, flag::NO_HOLE | flag::FUA, 1..3),
            (command::TRIM, flag::FUA, 500_000..524_288),
            (command::CACHE, 0, 0..1 << 20),
            (command::FLUSH, 0, 0..0),
        ];
        for (number, (command, flags, range)) in jobs.into_iter().enumerate() {
            let cookie = u64::try_from(number).unwrap() << 32;
            let (at, length) = (
                u64::try_from(range.start).unwrap(),
                u32::try_from(range.len()).unwrap(),
            );
            if style == 2 {
                let payload = if command == command::WRITE {
                    flag::PAYLOAD_LEN
                } else {
                    0
                };
                client.extended(command, flags | payload, cookie, at, length.into());
            } else {
                client.request(command, flags, cookie, at, length);
            }
            match command {
                command::WRITE => {
                    client.send(&data[..range.len()]);
                    let count = range.len();
                    expected[range].copy_from_slice(&data[..count]);
                }
                command::WRITE_ZEROES | command::TRIM => expected[range].fill(0),
                _ => {}
            }
            let answered = match style {
                0 => client.simple(),
                1 => (client.chunk().error().unwrap_or(0), cookie),
                _ => {
                    let (chunk, offset) = client.extended_chunk();
                    assert_eq!(offset, at);
                    assert!(chunk.done);
                    (chunk.error().unwrap_or(0), chunk.cookie)
                }
            };
            assert_eq!(answered, (0, cookie), "{command}");
            cases += 1;
        }
        assert!(disk.bytes() == expected, "style {style}");
        assert_eq!(read_all(&mut client, style), expected, "style {style}");
    }
    println!("{cases} changes");
}

/// The whole disk by one read.
fn read_all(client: &mut common::Client, style: i32) -> Vec<u8> {
    let size = usize::try_from(SIZE).unwrap();
    let mut bytes = vec![0xee; size];
    let (mut holes, mut done) = (0, false);
    match style {
        0 => {
            client.request(command::READ, 0, 5, 0, 1 << 20);
            assert_eq!(client.simple(), (0, 5));
            return client.take(size);
        }
        1 => client.request(command::READ, 0, 5, 0, 1 << 20),
        _ => client.extended(command::READ, 0, 5, 0, SIZE),
    }
    while !done {
        let chunk = if style == 1 {
            client.chunk()
        } else {
            client.extended_chunk().0
        };
        let at = usize::try_from(u64::from_be_bytes(chunk.data[..8].try_into().unwrap())).unwrap();
        match chunk.kind {
            1 => bytes[at..at + chunk.data.len() - 8].copy_from_slice(&chunk.data[8..]),
            2 => {
                let count = u32::from_be_bytes(chunk.data[8..].try_into().unwrap());
                bytes[at..at + usize::try_from(count).unwrap()].fill(0);
                holes += 1;
            }
            kind => panic!("chunk {kind}"),
        }
        done = chunk.done;
    }
    assert_eq!(holes, 2, "what reads as zero is not sent");
    bytes
}

#[test]
fn a_read_that_must_not_be_split_is_one_chunk() {
    let disk = Arc::new(MemoryExport::new(SIZE));
    let serving = Serving::new(disk, Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.agree(8, b"");
    client.go("disk");
    client.request(command::READ, 0, 1, 0, 1 << 20);
    assert_eq!(client.chunk().kind, 2);
    client.request(command::READ, flag::DF, 2, 0, 1 << 20);
    let whole = client.chunk();
    assert_eq!((whole.kind, whole.done), (1, true));
    assert_eq!(whole.data.len(), 8 + (1 << 20));
}

/// Extents of a chunk: context, lengths and flags.
fn extents(data: &[u8], wide: bool) -> (u32, Vec<(u64, u64)>) {
    let id = u32::from_be_bytes(data[..4].try_into().unwrap());
    let rest = &data[if wide { 8 } else { 4 }..];
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let half = if wide { 8 } else { 4 };
    let pairs = rest
        .chunks(2 * half)
        .map(|pair| (number(&pair[..half]), number(&pair[half..])));
    let pairs: Vec<_> = pairs.collect();
    if wide {
        let count = u32::from_be_bytes(data[4..8].try_into().unwrap());
        assert_eq!(usize::try_from(count).unwrap(), pairs.len());
    }
    (id, pairs)
}

fn with_contexts() -> Arc<MemoryExport> {
    let run = |length, flags| BlockStatus { length, flags };
    // Neighbours that say the same are joined, runs beyond the request are cut.
    let runs = vec![
        run(4096, 1),
        run(4096, 1),
        run(8192, 0),
        run(SIZE - 16_384, 1),
    ];
    let mut bytes = pattern(1 << 20, 3);
    bytes[65_536..131_072].fill(0);
    Arc::new(MemoryExport::with_bytes(bytes).with_context("test:dirty", runs))
}

#[test]
fn contexts_are_listed_chosen_and_answered() {
    let serving = Serving::new(with_contexts(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.agree(8, b"");
    let listed = client.agree(9, &[&text("disk")[..], b"\0\0\0\0"].concat());
    let names: Vec<&[u8]> = listed.iter().map(|(_, data)| &data[..]).collect();
    assert_eq!(
        names,
        [&b"\0\0\0\0base:allocation"[..], b"\0\0\0\0test:dirty"]
    );
    assert_eq!(client.choose_contexts("disk", &["test:", "x"]), []);
    let chosen = client.choose_contexts("disk", &["test:dirty", "base:allocation", "test:dirty"]);
    let expected = [(0, "base:allocation"), (1, "test:dirty")];
    assert_eq!(chosen, expected.map(|(id, name)| (id, name.to_owned())));
    client.go("disk");
    client.request(command::BLOCK_STATUS, 0, 1, 100, 200_000);
    let (first, second) = (client.chunk(), client.chunk());
    assert_eq!((first.done, second.done), (false, true));
    assert_eq!((first.kind, second.kind), (5, 5));
    let allocation = vec![(65_436, 0), (65_536, 3), (69_028, 0)];
    assert_eq!(extents(&first.data, false), (0, allocation));
    let dirty = vec![(8092, 1), (8192, 0), (183_716, 1)];
    assert_eq!(extents(&second.data, false), (1, dirty));
    client.request(command::BLOCK_STATUS, flag::REQ_ONE, 2, 0, 1 << 20);
    assert_eq!(extents(&client.chunk().data, false), (0, vec![(65_536, 0)]));
    assert_eq!(extents(&client.chunk().data, false), (1, vec![(8192, 1)]));
}

#[test]
fn contexts_count_only_for_the_export_they_were_chosen_for() {
    let exports: [(&str, Arc<dyn Export>); 2] = [("one", with_contexts()), ("two", disk())];
    let serving = Serving::all(&exports, Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.agree(8, b"");
    client.choose_contexts("one", &["test:dirty"]);
    client.go("two");
    client.request(command::BLOCK_STATUS, 0, 1, 0, 4096);
    assert_eq!(client.chunk().error(), Some(22));
}

#[test]
fn extended_headers_answer_what_was_wanted() {
    let serving = Serving::new(with_contexts(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.agree(11, b"");
    client.choose_contexts("disk", &["base:allocation", "test:dirty"]);
    let (_, flags) = facts(&client.go("disk"));
    assert_ne!(flags & transmission::BLOCK_STAT_PAYLOAD, 0);
    client.extended(command::BLOCK_STATUS, flag::REQ_ONE, 1, 0, SIZE);
    let (first, second) = (client.extended_chunk().0, client.extended_chunk().0);
    assert_eq!((first.kind, second.kind), (6, 6));
    assert_eq!(extents(&first.data, true), (0, vec![(65_536, 0)]));
    assert_eq!(extents(&second.data, true), (1, vec![(8192, 1)]));
    // Only one of them, by a payload that says so.
    client.extended(command::BLOCK_STATUS, flag::PAYLOAD_LEN, 2, 8192, 12);
    client.send(b"\0\0\0\0\0\0\x40\0\0\0\0\x01");
    let (only, offset) = client.extended_chunk();
    assert!(only.done);
    assert_eq!(offset, 8192);
    assert_eq!(extents(&only.data, true), (1, vec![(8192, 0), (8192, 1)]));
}

#[test]
fn long_answers_are_cut_at_the_limit() {
    let runs = (0..256).map(|number| BlockStatus {
        length: 4096,
        flags: number & 1,
    });
    let disk = MemoryExport::new(SIZE).with_context("test:stripes", runs.collect());
    let limits = Limits {
        extents: 10,
        ..Limits::default()
    };
    let serving = Serving::new(Arc::new(disk), limits);
    let mut client = serving.connect();
    client.greet();
    client.agree(8, b"");
    client.choose_contexts("disk", &["test:stripes"]);
    client.go("disk");
    client.request(command::BLOCK_STATUS, 0, 1, 0, 1 << 20);
    let (_, found) = extents(&client.chunk().data, false);
    assert_eq!(found.len(), 10);
    assert!(found.iter().all(|(length, _)| *length == 4096));
}

/// A disk whose reads of its first half wait until somebody lets them go on, and whose last byte
/// cannot be read.
#[derive(Default)]
struct Gated {
    open: Mutex<bool>,
    changed: Condvar,
    inside: AtomicUsize,
}

impl Gated {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait_for(&self, count: usize) {
        while self.inside.load(Ordering::SeqCst) < count {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Export for Gated {
    fn size(&self) -> u64 {
        SIZE
    }

    fn offers(&self) -> Offers {
        Offers {
            writable: true,
            ..Offers::default()
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Fault> {
        if offset == SIZE - 1 {
            return Err(Fault::new(ErrorCode::Io, "a secret about the file"));
        }
        if offset < SIZE / 2 {
            self.inside.fetch_add(1, Ordering::SeqCst);
            let open = self.open.lock().unwrap();
            drop(self.changed.wait_while(open, |open| !*open).unwrap());
        }
        buffer.fill(7);
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64) -> Result<(), Fault> {
        Err(ErrorCode::NoSpace.into())
    }

    fn zero(&self, _: u64, _: u64, how: Zeroing) -> Result<(), Fault> {
        if how.only_fast {
            return Err(ErrorCode::NotSupported.into());
        }
        panic!("on purpose");
    }

    fn trim(&self, _: u64, _: u64) -> Result<(), Fault> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn block_status<'a>(&'a self, _: &str, _: Range<u64>) -> Result<StatusRuns<'a>, Fault> {
        Ok(Box::new(std::iter::empty()))
    }
}

#[test]
fn replies_come_as_the_work_is_done() {
    let gated = Arc::new(Gated::default());
    let serving = Serving::new(gated.clone(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    for cookie in 0..5 {
        client.request(command::READ, 0, cookie, 0, 4);
    }
    client.request(command::READ, 0, 100, SIZE / 2, 4);
    // Five are held up; the sixth is not.
    assert_eq!(client.simple(), (0, 100));
    client.take(4);
    gated.wait_for(5);
    gated.open();
    let mut cookies = BTreeSet::new();
    for _ in 0..5 {
        let (error, cookie) = client.simple();
        assert_eq!((error, client.take(4)), (0, vec![7; 4]));
        cookies.insert(cookie);
    }
    assert_eq!(cookies, (0..5).collect());
}

#[test]
fn no_more_requests_are_worked_on_than_there_are_workers() {
    let gated = Arc::new(Gated::default());
    let limits = Limits {
        workers: 3,
        ..Limits::default()
    };
    let serving = Serving::new(gated.clone(), limits);
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    for cookie in 0..20 {
        client.request(command::READ, 0, cookie, 0, 4);
    }
    gated.wait_for(3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(gated.inside.load(Ordering::SeqCst), 3);
    gated.open();
    for _ in 0..20 {
        assert_eq!(client.simple().0, 0);
        client.take(4);
    }
}

#[test]
fn a_shutdown_answers_what_was_received() {
    let gated = Arc::new(Gated::default());
    let serving = Serving::new(gated.clone(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    let idle = serving.connect();
    for cookie in 0..4 {
        client.request(command::READ, 0, cookie, 0, 4);
    }
    gated.wait_for(4);
    let socket = serving.socket();
    assert!(socket.exists());
    let handle = serving.handle.clone();
    let ending = std::thread::spawn(move || serving.end());
    std::thread::sleep(Duration::from_millis(50));
    gated.open();
    for _ in 0..4 {
        assert_eq!(client.simple().0, 0);
        client.take(4);
    }
    assert!(client.is_ended());
    ending.join().unwrap().unwrap();
    assert_eq!(handle.clients(), 0);
    assert!(!socket.exists(), "the socket's name is gone");
    drop(idle);
    assert_eq!(Arc::strong_count(&gated), 1, "nobody holds the export");
}

#[test]
fn a_shutdown_does_not_wait_for_ever() {
    let gated = Arc::new(Gated::default());
    let limits = Limits {
        drain: Duration::from_millis(100),
        ..Limits::default()
    };
    let serving = Serving::new(gated.clone(), limits);
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    client.request(command::READ, 0, 1, 0, 4);
    gated.wait_for(1);
    let error = serving.end().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    gated.open();
}

#[test]
fn failures_have_their_numbers_and_keep_their_secrets() {
    let gated = Arc::new(Gated::default());
    let serving = Serving::new(gated.clone(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.agree(8, b"");
    client.go("disk");
    client.request(command::READ, 0, 1, SIZE - 1, 1);
    let failed = client.chunk();
    assert_eq!(failed.error(), Some(5));
    assert_eq!(&failed.data[6..], b"the disk failed");
    client.request(command::WRITE, 0, 2, 0, 1);
    client.send(b"x");
    assert_eq!(client.chunk().error(), Some(28));
    client.request(command::WRITE_ZEROES, flag::FAST_ZERO, 3, 0, 1);
    assert_eq!(client.chunk().error(), Some(95));
    let told = serving.events();
    let secret = |event: &&String| event.contains("read: a secret about the file");
    assert_eq!(told.iter().filter(secret).count(), 1, "{told:?}");
}

#[test]
fn a_panic_of_an_export_ends_one_connection() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let serving = Serving::new(Arc::new(Gated::default()), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    client.request(command::WRITE_ZEROES, 0, 3, 0, 1);
    assert!(client.is_ended());
    std::panic::set_hook(quiet);
    let mut other = serving.connect();
    other.greet();
    other.go("disk");
    other.request(command::READ, 0, 1, SIZE / 2, 1);
    assert_eq!(other.simple(), (0, 1));
    drop(other);
    serving.end().unwrap();
}

#[test]
fn a_socket_that_a_dead_server_left_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut first = Server::new(Limits::default()).unwrap();
    first.listen_unix(&path).unwrap();
    let mut second = Server::new(Limits::default()).unwrap();
    let error = second.listen_unix(&path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    let file = folder.path().join("file");
    std::fs::write(&file, b"precious").unwrap();
    assert!(second.listen_unix(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let private = UnixSocket::bind(&folder.path().join("private"), true).unwrap();
    let found = std::fs::metadata(folder.path().join("private")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&found.permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(private);
    drop(first);
    assert!(!path.exists());
    second.listen_unix(&path).unwrap();
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 2, "no hidden names are left");
}

#[test]
fn names_are_taken_once_and_events_tell_what_happens() {
    let mut server = Server::new(Limits::default()).unwrap();
    server.export("a", disk()).unwrap();
    assert!(server.export("a", disk()).is_err());
    assert!(server.export(&"x".repeat(4097), disk()).is_err());
    let serving = Serving::new(disk(), Limits::default());
    let mut client = serving.connect();
    client.greet();
    client.go("disk");
    client.request(command::DISC, 0, 0, 0, 0);
    assert!(client.is_ended());
    while serving.handle.clients() > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(
        serving.events(),
        [
            "client 0 connected",
            "client 0 uses 'disk'",
            "client 0 left"
        ]
    );
    let fault = Fault::from(ErrorCode::Io);
    let event = Event::Failed {
        client: 7,
        command: "read",
        fault: &fault,
    };
    assert_eq!(event.to_string(), "client 7: read: the disk failed");
}

/// A connection that is no socket: what a client says, and what it hears.
#[derive(Default)]
struct Script {
    says: Mutex<Vec<u8>>,
    hears: Mutex<Vec<u8>>,
    hung_up: AtomicUsize,
}

impl Transport for Script {
    fn receive(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        // In pieces of seven bytes, as a bad network would.
        let mut says = self.says.lock().unwrap();
        let count = says.len().min(buffer.len()).min(7);
        let rest = says.split_off(count);
        buffer[..count].copy_from_slice(&says);
        *says = rest;
        Ok(count)
    }

    fn send(&self, parts: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        let first = parts.iter().find(|part| !part.is_empty()).unwrap();
        let count = first.len().min(5);
        self.hears.lock().unwrap().extend(&first[..count]);
        Ok(count)
    }

    fn set_timeouts(&self, _: Duration, _: Duration) -> std::io::Result<()> {
        Ok(())
    }

    fn hang_up(&self, direction: Direction) {
        assert_eq!(direction, Direction::Both);
        self.hung_up.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn any_kind_of_connection_is_served_piece_by_piece() {
    let script = Arc::new(Script::default());
    let mut says = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk".to_vec();
    says.extend(b"\x25\x60\x95\x13\0\0\0\0<cookie>\0\0\0\0\0\0\x10\0\0\0\0\x40");
    says.extend(b"bad magic of a request, 28 bytes and more");
    *script.says.lock().unwrap() = says;
    let mut server = Server::new(Limits::default()).unwrap();
    server.export("disk", disk()).unwrap();
    let malformed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&malformed);
    server.observe(move |event| {
        if let Event::Ended {
            reason: Some(Ending::Malformed(_)),
            ..
        } = event
        {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    server.serve_one(script.clone());
    let hears = script.hears.lock().unwrap();
    let reply = 18 + 10;
    assert_eq!(&hears[reply..reply + 8], b"\x67\x44\x66\x98\0\0\0\0");
    assert_eq!(hears[reply + 16..], pattern(1 << 20, 3)[4096..4160]);
    assert_eq!(malformed.load(Ordering::SeqCst), 1);
    assert!(script.hung_up.load(Ordering::SeqCst) > 0);
}
