//! A server on a socket, and a client that speaks the protocol by itself.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use tidemark_nbd::{Export, Handle, Limits, Server};

pub(crate) const ACK: u32 = 1;

/// A server that runs on a thread until it is dropped.
pub(crate) struct Serving {
    pub(crate) handle: Handle,
    thread: Option<JoinHandle<io::Result<()>>>,
    folder: TempDir,
    events: Arc<Mutex<Vec<String>>>,
}

impl Serving {
    pub(crate) fn new(export: Arc<dyn Export>, limits: Limits) -> Self {
        Self::all(&[("disk", export)], limits)
    }

    pub(crate) fn all(exports: &[(&str, Arc<dyn Export>)], limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::new(limits).unwrap();
        for (name, export) in exports {
            server.export(name, Arc::clone(export)).unwrap();
        }
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&events);
        server.observe(move |event| told.lock().unwrap().push(event.to_string()));
        server.listen_unix(&folder.path().join("nbd")).unwrap();
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self {
            handle,
            thread,
            folder,
            events,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }

    pub(crate) fn connect(&self) -> Client {
        Client::new(&self.socket())
    }

    /// Shuts the server down and says how it ended.
    pub(crate) fn end(mut self) -> io::Result<()> {
        self.handle.shut_down();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.handle.shut_down();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A client, from its greeting on.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
}

/// A reply to a request, or a chunk of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) done: bool,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) data: Vec<u8>,
}

impl Client {
    fn new(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut client = Self { stream };
        assert_eq!(client.take(16), b"NBDMAGICIHAVEOPT");
        assert_eq!(client.take(2), [0, 3]);
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Whether the server has closed the connection, with nothing more to say.
    pub(crate) fn is_ended(&mut self) -> bool {
        match self.stream.read(&mut [0; 64]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends the client's flags: fixed newstyle, no zeroes.
    pub(crate) fn greet(&mut self) {
        self.send(&[0, 0, 0, 3]);
    }

    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.send(&bytes);
    }

    /// One answer to an option: its kind and data.
    pub(crate) fn answer(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
        assert_eq!(self.u32(), option);
        let (kind, length) = (self.u32(), self.u32());
        (kind, self.take(usize::try_from(length).unwrap()))
    }

    /// All answers up to the last one.
    pub(crate) fn answers(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut answers = vec![self.answer(option)];
        while answers.last().unwrap().0 != ACK && answers.last().unwrap().0 < 1 << 31 {
            answers.push(self.answer(option));
        }
        answers
    }

    /// An option that is acknowledged; the answers before that.
    pub(crate) fn agree(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.ask(option, data);
        let mut answers = self.answers(option);
        assert_eq!(answers.pop(), Some((ACK, vec![])), "option {option}");
        answers
    }

    /// Chooses an export.
    pub(crate) fn go(&mut self, name: &str) -> Vec<(u32, Vec<u8>)> {
        self.agree(7, &[&text(name)[..], b"\0\0"].concat())
    }

    /// Chooses contexts; their numbers and names.
    pub(crate) fn choose_contexts(&mut self, name: &str, queries: &[&str]) -> Vec<(u32, String)> {
        let mut data = text(name);
        data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        queries.iter().for_each(|query| data.extend(text(query)));
        let context = |(kind, data): (u32, Vec<u8>)| {
            assert_eq!(kind, 4);
            let (id, name) = data.split_first_chunk::<4>().unwrap();
            (
                u32::from_be_bytes(*id),
                String::from_utf8(name.to_vec()).unwrap(),
            )
        };
        self.agree(10, &data).into_iter().map(context).collect()
    }

    pub(crate) fn request(&mut self, command: u16, flags: u16, cookie: u64, at: u64, length: u32) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(at.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.send(&bytes);
    }

    pub(crate) fn extended(&mut self, command: u16, flags: u16, cookie: u64, at: u64, length: u64) {
        let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(at.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.send(&bytes);
    }

    /// Error and cookie of a simple reply.
    pub(crate) fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.u32(), 0x6744_6698);
        (self.u32(), self.u64())
    }

    /// One chunk of a structured reply.
    pub(crate) fn chunk(&mut self) -> Chunk {
        assert_eq!(self.u32(), 0x668e_33ef);
        let (flags, kind) = (self.u16(), self.u16());
        let (cookie, length) = (self.u64(), self.u32());
        Chunk {
            done: flags == 1,
            kind,
            cookie,
            data: self.take(usize::try_from(length).unwrap()),
        }
    }

    /// One chunk of an extended reply, and the offset that it repeats.
    pub(crate) fn extended_chunk(&mut self) -> (Chunk, u64) {
        assert_eq!(self.u32(), 0x6e8a_278c);
        let (flags, kind) = (self.u16(), self.u16());
        let (cookie, offset, length) = (self.u64(), self.u64(), self.u64());
        let chunk = Chunk {
            done: flags == 1,
            kind,
            cookie,
            data: self.take(usize::try_from(length).unwrap()),
        };
        (chunk, offset)
    }
}

impl Chunk {
    /// The number of an error chunk.
    pub(crate) fn error(&self) -> Option<u32> {
        let error = self.kind == (1 << 15) + 1;
        error.then(|| u32::from_be_bytes(self.data[..4].try_into().unwrap()))
    }
}

/// A string with its length before it.
pub(crate) fn text(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// Bytes that differ from place to place, none of them zero.
pub(crate) fn pattern(length: usize, seed: u64) -> Vec<u8> {
    tidemark_fixtures::ops::fill(seed, u64::try_from(length).unwrap())
}

/// Runs a client program that must work; its output.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    // The module of nbdsh belongs to the system's Python, not to another one before it in PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(args)
        .env("PATH", format!("/usr/bin:{path}"))
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Runs a script with libnbd's Python module.
pub(crate) fn nbdsh(script: &str) -> String {
    run("nbdsh", &["-c", script])
}
