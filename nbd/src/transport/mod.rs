//! A connection as the rest of the crate sees it: bytes in, bytes out, from two threads at once.

mod socket;

use std::io::{self, IoSlice};
use std::time::Duration;

pub(crate) use socket::Socket;

/// Which half of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the client sends.
    Receiving,
    /// Both.
    Both,
}

/// A connected client. One thread receives while another sends; neither does so twice at a time.
pub trait Transport: Send + Sync {
    /// Waits for bytes; 0 means that no more will come.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` when none came in the time that was set; I/O.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Sends some of the bytes, at least one.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` when none was taken in the time that was set; I/O.
    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize>;

    /// How long one call may wait.
    ///
    /// # Errors
    /// I/O.
    fn set_timeouts(&self, receive: Duration, send: Duration) -> io::Result<()>;

    /// Ends one half or both; whoever waits there wakes up.
    fn hang_up(&self, direction: Direction);

    /// Nothing more will be sent, and that is meant.
    fn farewell(&self) {}
}

/// Sends everything.
pub(crate) fn send_all(transport: &dyn Transport, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    let mut rest = parts;
    // Empty parts at the front would read as "nothing was taken".
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match transport.send(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut rest, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
