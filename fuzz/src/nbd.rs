//! A whole conversation of the NBD server with a client that says anything.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tidemark_nbd::protocol::options::{ContextRequest, InfoRequest};
use tidemark_nbd::protocol::request::decode_wanted_contexts;
use tidemark_nbd::{Direction, Export, Limits, MemoryExport, Server, Transport};

const DISK_BYTES: u64 = 64 << 10;
const REQUEST_BYTES: u32 = 8 << 10;

/// What a client says before the input, so that mutations reach every stage.
const BEGINNINGS: [&[u8]; 6] = [
    b"",
    b"\0\0\0\x03",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\0",
    b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0\
      IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
      IHAVEOPT\0\0\0\x01\0\0\0\0",
];

/// A client that has said everything, and takes everything.
struct Script {
    says: Mutex<(Vec<u8>, usize)>,
    heard: Mutex<Vec<u8>>,
}

impl Transport for Script {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut says = self.says.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, at) = &mut *says;
        let count = buffer.len().min(bytes.len() - *at);
        buffer[..count].copy_from_slice(&bytes[*at..*at + count]);
        *at += count;
        Ok(count)
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let before = heard.len();
        parts.iter().for_each(|part| heard.extend_from_slice(part));
        Ok(heard.len() - before)
    }

    fn set_timeouts(&self, _: Duration, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn hang_up(&self, _: Direction) {}
}

/// The first byte chooses how far the client behaves well, the rest is what it says then. The
/// conversation ends, the answers are in proportion, and the disk keeps its size.
pub fn nbd(data: &[u8]) {
    let _ = InfoRequest::decode(data);
    let _ = ContextRequest::decode(data);
    let _ = decode_wanted_contexts(data);
    let (stage, rest) = data.split_first().unwrap_or((&0, &[]));
    let beginning = BEGINNINGS[usize::from(*stage) % BEGINNINGS.len()];
    let limits = Limits {
        workers: 1,
        request_bytes: REQUEST_BYTES,
        option_bytes: 4096,
        ..Limits::default()
    };
    let disk = Arc::new(MemoryExport::new(DISK_BYTES));
    let mut server = Server::new(limits).expect("a socket pair can be had");
    server
        .export("disk", disk.clone())
        .expect("it is the only name");
    let client = Arc::new(Script {
        says: Mutex::new(([beginning, rest].concat(), 0)),
        heard: Mutex::default(),
    });
    server.serve_one(client.clone());
    let heard = client.heard.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(heard.starts_with(b"NBDMAGICIHAVEOPT\0\x03"));
    // No message of a client is shorter than 16 bytes, no answer longer than a request allows.
    let messages = 2 + data.len() / 16 + beginning.len() / 16;
    assert!(heard.len() <= messages * (usize::try_from(REQUEST_BYTES).unwrap_or(0) + 1024));
    assert_eq!(disk.size(), DISK_BYTES);
}
