//! What happens at a server, for whoever wants to know.

use std::io;

use crate::fault::Fault;
use crate::protocol::Malformed;

/// Why a connection ended before its client said so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ending {
    /// The client sent what has no meaning.
    #[error("the client sent a malformed message: {0}")]
    Malformed(#[from] Malformed),
    /// A greeting with flags that are not known.
    #[error("the client greeted with unknown flags {0:#x}")]
    UnknownGreeting(u32),
    /// The connection broke in the middle of a message.
    #[error("the client went away in the middle of a message")]
    CutShort,
    /// A message, or the handshake, took too long.
    #[error("the client was too slow")]
    Stalled,
    /// A message is longer than is taken.
    #[error("the client announced {0} bytes, which is too much")]
    TooLong(u64),
    /// Too many options.
    #[error("the client asked for too many options")]
    TooManyOptions,
    /// An export was chosen that is not there, or not without TLS, by the option that has no error.
    #[error("the client chose an export that it cannot have")]
    NoSuchExport,
    /// Bytes stood behind the request for TLS.
    #[error("the client sent plain text behind its request for TLS")]
    PlainTextBeforeTls,
    /// TLS could not be agreed on.
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    /// The server has no thread for it.
    #[error("no thread could be started: {0}")]
    NoThread(io::Error),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for Ending {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Stalled,
            _ => Self::Io(error),
        }
    }
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A client came.
    Connected {
        /// Number of the connection.
        client: u64,
    },
    /// It chose an export.
    Chosen {
        /// Number of the connection.
        client: u64,
        /// Name of the export.
        export: &'a str,
    },
    /// One of its requests failed at the export.
    Failed {
        /// Number of the connection.
        client: u64,
        /// What was asked for.
        command: &'static str,
        /// Why.
        fault: &'a Fault,
    },
    /// It left, or was made to.
    Ended {
        /// Number of the connection.
        client: u64,
        /// Why, unless it said so itself.
        reason: Option<&'a Ending>,
    },
}

impl std::fmt::Display for Event<'_> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connected { client } => write!(out, "client {client} connected"),
            Self::Chosen { client, export } => write!(out, "client {client} uses '{export}'"),
            Self::Failed {
                client,
                command,
                fault,
            } => write!(out, "client {client}: {command}: {fault}"),
            Self::Ended {
                client,
                reason: None,
            } => write!(out, "client {client} left"),
            Self::Ended {
                client,
                reason: Some(reason),
            } => write!(out, "client {client} disconnected: {reason}"),
        }
    }
}
