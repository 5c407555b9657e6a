//! TLS by rustls, for clients that ask with STARTTLS.
//!
//! # Invariants
//! 1. Records leave in the order in which they were made: whoever encrypts holds the sending lock
//!    until its records are sent.
//! 2. Nobody holds the connection's own lock while it waits for the network.
//! 3. What stood in plain text behind STARTTLS is never taken for encrypted.

use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoClientAuth, WebPkiClientVerifier, danger::ClientCertVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::event::Ending;
use crate::handshake::Upgrade;
use crate::transport::{Direction, Transport, send_all};

/// Bytes of the network that are taken at once.
const BUFFER: usize = 32 << 10;

/// Plain text that is encrypted at once.
const SENT_AT_ONCE: usize = 256 << 10;

/// Certificates, and who must use them.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    required: bool,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Certificate and key do not serve.
    #[error("the certificates do not serve: {0}")]
    Unusable(String),
}

impl Tls {
    /// Takes `server-cert.pem` and `server-key.pem` from a directory, QEMU's names for them; with
    /// `verify_clients` also `ca-cert.pem`, and only clients whose certificates it signed are let in.
    /// Every client must use TLS.
    ///
    /// # Errors
    /// Files that are missing, damaged, or do not belong together.
    pub fn from_directory(directory: &Path, verify_clients: bool) -> Result<Self, TlsError> {
        let chain = certificates(&directory.join("server-cert.pem"))?;
        let path = directory.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|problem| file(&path, &problem))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier: Arc<dyn ClientCertVerifier> = if verify_clients {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(&directory.join("ca-cert.pem"))? {
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .map_err(|error| unusable(&error))?
        } else {
            Arc::new(NoClientAuth)
        };
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        Ok(Self {
            config: Arc::new(config),
            required: true,
        })
    }

    /// The same, for clients that want it; others may go on in plain text.
    pub fn optional(mut self) -> Self {
        self.required = false;
        self
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<CertificateDer<'static>> = found.map_err(|problem| file(path, &problem))?;
    if found.is_empty() {
        return Err(file(path, &"it holds no certificate"));
    }
    Ok(found)
}

fn file(path: &Path, problem: &dyn std::fmt::Display) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

fn unusable(problem: &dyn std::fmt::Display) -> TlsError {
    TlsError::Unusable(problem.to_string())
}

impl Upgrade for Tls {
    fn is_required(&self) -> bool {
        self.required
    }

    fn upgrade(
        &self,
        transport: Arc<dyn Transport>,
        until: Instant,
    ) -> Result<Arc<dyn Transport>, Ending> {
        let config = Arc::clone(&self.config);
        let mut connection = ServerConnection::new(config)
            .map_err(|error| Ending::Tls(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        connection.set_buffer_limit(Some(SENT_AT_ONCE));
        let encrypted = Encrypted {
            transport,
            connection: Mutex::new(connection),
            sending: Mutex::new(()),
            received: Mutex::default(),
        };
        encrypted.shake_hands(until)?;
        Ok(Arc::new(encrypted))
    }
}

/// Bytes of the network that were not given to rustls yet.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    start: usize,
}

/// A connection that was encrypted.
struct Encrypted {
    transport: Arc<dyn Transport>,
    connection: Mutex<ServerConnection>,
    sending: Mutex<()>,
    received: Mutex<Received>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Encrypted {
    fn shake_hands(&self, until: Instant) -> Result<(), Ending> {
        while lock(&self.connection).is_handshaking() {
            match self.pull() {
                Ok(0) => return Err(Ending::CutShort),
                Ok(_) => {}
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(Ending::Tls(error)),
            }
            if Instant::now() >= until {
                return Err(Ending::Stalled);
            }
        }
        Ok(())
    }

    /// Gives rustls some bytes of the network, waiting for them if need be; 0 at its end.
    fn pull(&self) -> io::Result<usize> {
        let mut received = lock(&self.received);
        if received.start == received.bytes.len() {
            received.bytes.resize(BUFFER, 0);
            received.start = 0;
            let count = self.transport.receive(&mut received.bytes);
            received.bytes.truncate(*count.as_ref().unwrap_or(&0));
            if count? == 0 {
                return Ok(0);
            }
        }
        let mut connection = lock(&self.connection);
        let mut rest = &received.bytes[received.start..];
        let count = connection.read_tls(&mut rest)?;
        let processed = connection.process_new_packets();
        let answers = connection.wants_write();
        drop(connection);
        received.start += count;
        if answers {
            self.push()?;
        }
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(count)
    }

    /// Sends what rustls has to say by itself.
    fn push(&self) -> io::Result<()> {
        let _turn = lock(&self.sending);
        let records = records_of(&mut lock(&self.connection))?;
        send_all(&*self.transport, &mut [IoSlice::new(&records)])
    }
}

/// All records that wait to be sent.
fn records_of(connection: &mut ServerConnection) -> io::Result<Vec<u8>> {
    let mut records = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut records)?;
    }
    Ok(records)
}

fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

impl Transport for Encrypted {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match lock(&self.connection).reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a farewell: what is cut in the middle of a message is noticed anyway.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                answer => return answer,
            }
            if self.pull()? == 0 {
                return Ok(0);
            }
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let _turn = lock(&self.sending);
        let mut connection = lock(&self.connection);
        let count = connection.writer().write_vectored(parts)?;
        let records = records_of(&mut connection)?;
        drop(connection);
        send_all(&*self.transport, &mut [IoSlice::new(&records)])?;
        Ok(count)
    }

    fn set_timeouts(&self, receive: Duration, send: Duration) -> io::Result<()> {
        self.transport.set_timeouts(receive, send)
    }

    fn hang_up(&self, direction: Direction) {
        self.transport.hang_up(direction);
    }

    fn farewell(&self) {
        lock(&self.connection).send_close_notify();
        // The client may have left already.
        let _ = self.push();
    }
}
