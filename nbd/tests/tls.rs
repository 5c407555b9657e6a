//! TLS: real clients with certificates, and clients that try to get around them.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{pattern, run};
use tidemark_fixtures::{certificates, require_nbd_clients};
use tidemark_nbd::{Handle, Limits, MemoryExport, Server, Tls, TlsError};

struct Serving {
    handle: Handle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    place: SocketAddr,
    events: Arc<Mutex<Vec<String>>>,
}

impl Serving {
    fn new(tls: Option<Tls>) -> Self {
        let limits = Limits {
            handshake: Duration::from_secs(2),
            ..Limits::default()
        };
        let mut server = Server::new(limits).unwrap();
        let disk = MemoryExport::with_bytes(pattern(4 << 20, 1));
        server.export("disk", Arc::new(disk)).unwrap();
        let place = server.listen_tcp("127.0.0.1:0").unwrap();
        if let Some(tls) = tls {
            server.use_tls(tls);
        }
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&events);
        server.observe(move |event| told.lock().unwrap().push(event.to_string()));
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self {
            handle,
            thread,
            place,
            events,
        }
    }

    fn uri(&self, certificates: &Path) -> String {
        format!(
            "nbds://localhost:{}/disk?tls-certificates={}",
            self.place.port(),
            certificates.display()
        )
    }

    /// A connection that has been greeted, and has greeted.
    fn connect(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.place).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.handle.shut_down();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

fn fails(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success(), "{program} {args:?}");
}

#[test]
fn clients_read_and_write_through_tls() {
    require_nbd_clients!();
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path());
    let serving = Serving::new(Some(Tls::from_directory(folder.path(), false).unwrap()));
    let uri = serving.uri(folder.path());
    assert!(run("nbdinfo", &[&uri]).contains("TLS"));
    let copy = folder.path().join("copy");
    let (copy, options) = (copy.to_str().unwrap(), "--connections=2");
    run("nbdcopy", &[options, &uri, copy]);
    assert!(std::fs::read(copy).unwrap() == pattern(4 << 20, 1));
    std::fs::write(copy, pattern(4 << 20, 2)).unwrap();
    run("nbdcopy", &[copy, &uri]);
    let credentials = format!(
        "tls-creds-x509,id=tls,endpoint=client,dir={}",
        folder.path().display()
    );
    let image = format!(
        "driver=nbd,host=localhost,port={},export=disk,tls-creds=tls",
        serving.place.port()
    );
    let args = ["--object", &credentials, "--image-opts", &image];
    let raw = folder.path().join("raw");
    let raw = raw.to_str().unwrap();
    run(
        "qemu-img",
        &[&["convert"], &args[..], &["-O", "raw", raw]].concat(),
    );
    assert!(std::fs::read(raw).unwrap() == pattern(4 << 20, 2));
    let work = ["-c", "write -P 5 1M 1M", "-c", "read -P 5 1M 1M"];
    let said = run("qemu-io", &[&args[..2], &work, &args[2..]].concat());
    assert!(said.contains("read 1048576/1048576"), "{said}");
    // Whoever does not come with TLS learns nothing, not even names.
    let plain = format!("nbd://localhost:{}/disk", serving.place.port());
    fails("nbdinfo", &[&plain]);
    fails("nbdinfo", &["--list", &plain]);
    // Another authority is not trusted by the client.
    let other = tempfile::tempdir().unwrap();
    certificates::make(other.path());
    fails("nbdinfo", &[&serving.uri(other.path())]);
}

#[test]
fn only_clients_with_a_certificate_are_let_in_when_that_is_wanted() {
    require_nbd_clients!();
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path());
    let serving = Serving::new(Some(Tls::from_directory(folder.path(), true).unwrap()));
    run("nbdinfo", &["--size", &serving.uri(folder.path())]);
    let anonymous = tempfile::tempdir().unwrap();
    let authority = anonymous.path().join("ca-cert.pem");
    std::fs::copy(folder.path().join("ca-cert.pem"), authority).unwrap();
    fails("nbdinfo", &["--size", &serving.uri(anonymous.path())]);
    // A certificate of another authority is none.
    let other = tempfile::tempdir().unwrap();
    certificates::make(other.path());
    let authority = other.path().join("ca-cert.pem");
    std::fs::copy(folder.path().join("ca-cert.pem"), authority).unwrap();
    fails("nbdinfo", &["--size", &serving.uri(other.path())]);
}

#[test]
fn optional_tls_is_for_those_who_want_it() {
    require_nbd_clients!();
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path());
    let tls = Tls::from_directory(folder.path(), false).unwrap();
    let serving = Serving::new(Some(tls.optional()));
    let plain = format!("nbd://localhost:{}/disk", serving.place.port());
    run("nbdinfo", &["--size", &plain]);
    run("nbdinfo", &["--size", &serving.uri(folder.path())]);
    // Where there is none it cannot be had.
    let without = Serving::new(None);
    fails("nbdinfo", &["--size", &without.uri(folder.path())]);
}

fn answer(stream: &mut TcpStream) -> u32 {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    u32::from_be_bytes(head[12..16].try_into().unwrap())
}

fn is_ended(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    // What the server says of a broken handshake is an alert, no answer.
    match stream.read_to_end(&mut rest) {
        Ok(_) => !rest.starts_with(&[0, 3, 0xe8, 0x89]),
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn clients_that_try_to_get_around_tls_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path());
    let serving = Serving::new(Some(Tls::from_directory(folder.path(), false).unwrap()));
    // Everything but STARTTLS and ABORT is refused before.
    let mut stream = serving.connect();
    for option in [3_u8, 6, 7, 8, 9, 10, 11, 99] {
        let head = [b"IHAVEOPT\0\0\0", &[option][..], &[0; 4]].concat();
        stream.write_all(&head).unwrap();
        assert_eq!(answer(&mut stream), (1 << 31) + 5, "option {option}");
    }
    stream.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\x01x").unwrap();
    assert_eq!(answer(&mut stream), (1 << 31) + 3, "STARTTLS with data");
    stream
        .write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk")
        .unwrap();
    assert!(is_ended(&mut stream), "EXPORT_NAME");
    // Plain text right behind the request.
    let mut stream = serving.connect();
    let both = b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0";
    stream.write_all(both).unwrap();
    assert!(is_ended(&mut stream));
    // Plain text in place of a handshake, half of a handshake, and none at all.
    let nonsense: [&[u8]; 3] = [
        b"IHAVEOPT\0\0\0\x03\0\0\0\0",
        b"\x16\x03\x01\x02\0\x01",
        b"",
    ];
    for bytes in nonsense {
        let mut stream = serving.connect();
        stream.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
        assert_eq!(answer(&mut stream), 1);
        stream.write_all(bytes).unwrap();
        assert!(is_ended(&mut stream), "{bytes:?}");
    }
    while serving.handle.clients() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let told = serving.events.lock().unwrap().clone();
    let count = |text: &str| told.iter().filter(|event| event.contains(text)).count();
    assert_eq!(count("cannot have"), 1, "{told:?}");
    assert_eq!(count("plain text behind"), 1, "{told:?}");
    assert_eq!(count("TLS handshake failed"), 1, "{told:?}");
    assert_eq!(count("too slow"), 2, "{told:?}");
}

#[test]
fn certificates_that_do_not_serve_are_refused_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Tls::from_directory(folder.path(), false).unwrap_err();
    assert!(matches!(missing, TlsError::File { .. }));
    assert!(missing.to_string().contains("server-cert.pem"), "{missing}");
    certificates::make(folder.path());
    std::fs::write(folder.path().join("ca-cert.pem"), b"nothing").unwrap();
    assert!(Tls::from_directory(folder.path(), false).is_ok());
    let empty = Tls::from_directory(folder.path(), true).unwrap_err();
    assert!(empty.to_string().contains("ca-cert.pem"), "{empty}");
    let other = tempfile::tempdir().unwrap();
    certificates::make(other.path());
    let key = other.path().join("server-key.pem");
    std::fs::copy(key, folder.path().join("server-key.pem")).unwrap();
    let strange = Tls::from_directory(folder.path(), false).unwrap_err();
    assert!(matches!(strange, TlsError::Unusable(_)), "{strange}");
}
