//! Unix sockets and TCP.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::{Direction, Transport};

/// Seconds of silence after which a TCP peer is asked whether it is there.
const KEEPALIVE_SECONDS: u32 = 60;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// A TCP connection that answers at once, and notices that its peer has vanished.
    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        setsockopt(&stream, sockopt::KeepAlive, &true)?;
        setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_SECONDS)?;
        setsockopt(&stream, sockopt::TcpKeepInterval, &10)?;
        setsockopt(&stream, sockopt::TcpKeepCount, &6)?;
        Ok(Self::Tcp(stream))
    }
}

impl Transport for Socket {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => (&*stream).read(buffer),
            Self::Tcp(stream) => (&*stream).read(buffer),
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => (&*stream).write_vectored(parts),
            Self::Tcp(stream) => (&*stream).write_vectored(parts),
        }
    }

    fn set_timeouts(&self, receive: Duration, send: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(receive))?;
                stream.set_write_timeout(Some(send))
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(receive))?;
                stream.set_write_timeout(Some(send))
            }
        }
    }

    fn hang_up(&self, direction: Direction) {
        let how = match direction {
            Direction::Receiving => Shutdown::Read,
            Direction::Both => Shutdown::Both,
        };
        // A connection that is gone already is what was wanted.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}
