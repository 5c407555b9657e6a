//! What a client may cost, in one place.

use std::time::Duration;

/// Bounds on everything that clients can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; further ones wait until one ends.
    pub clients: usize,
    /// Requests of one connection that are worked on at a time, each by a thread of its own.
    pub workers: usize,
    /// Most bytes of one read or write. A write over it ends the connection, a read is refused.
    pub request_bytes: u32,
    /// Bytes of requests in flight on one connection; at least one request's.
    pub bytes_in_flight: usize,
    /// Extents of one context in one reply. QEMU's limit: what is longer its clients refuse.
    pub extents: usize,
    /// Data of one option, bytes.
    pub option_bytes: u32,
    /// Options of one connection.
    pub options: usize,
    /// From the connection to the choice of an export, TLS included.
    pub handshake: Duration,
    /// For a request that has begun, and 16 seconds more for each MiB of its data.
    pub request: Duration,
    /// How long a client may take nothing of a reply.
    pub stall: Duration,
    /// How long a shutdown waits for requests in flight.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 64,
            workers: 16,
            request_bytes: 32 << 20,
            bytes_in_flight: 64 << 20,
            extents: (1 << 20) / 8,
            option_bytes: 64 << 10,
            options: 1000,
            handshake: Duration::from_secs(20),
            request: Duration::from_secs(30),
            stall: Duration::from_secs(120),
            drain: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// Time for a request that `payload` bytes follow.
    pub(crate) fn patience(&self, payload: u64) -> Duration {
        self.request + Duration::from_secs(16) * u32::try_from(payload >> 20).unwrap_or(u32::MAX)
    }
}
