//! What a client sends, in the pieces that the protocol has, each within its time.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::convert::{to_u64, to_usize};
use crate::event::Ending;
use crate::transport::Transport;

/// Bytes that are received ahead.
const BUFFER: usize = 64 << 10;
/// A payload is given memory in such steps, as it arrives.
const PIECE: usize = 1 << 20;

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// Until then.
    Until(Instant),
    /// For ever for the first byte; then this long.
    OnceBegun(Duration),
}

/// The receiving half of a connection.
pub(crate) struct Incoming {
    transport: Arc<dyn Transport>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(crate) fn new(transport: Arc<dyn Transport>) -> Self {
        Self {
            transport,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
        }
    }

    /// Whether bytes were received ahead.
    pub(crate) fn is_ahead(&self) -> bool {
        self.start < self.end
    }

    /// Fills `out`; false when the client ended before its first byte.
    pub(crate) fn fill(&mut self, out: &mut [u8], patience: Patience) -> Result<bool, Ending> {
        let mut done = self.take_ahead(out);
        let mut until = match patience {
            Patience::Until(instant) => Some(instant),
            Patience::OnceBegun(time) => (done > 0).then(|| Instant::now() + time),
        };
        while done < out.len() {
            let direct = out.len() - done >= BUFFER;
            let received = if direct {
                self.transport.receive(&mut out[done..])
            } else {
                self.transport.receive(&mut self.buffer)
            };
            match received {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(Ending::CutShort),
                Ok(count) if direct => done += count,
                Ok(count) => {
                    (self.start, self.end) = (0, count);
                    done += self.take_ahead(&mut out[done..]);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
            if let Patience::OnceBegun(time) = patience
                && done > 0
            {
                until.get_or_insert_with(|| Instant::now() + time);
            }
            if done < out.len() && until.is_some_and(|until| Instant::now() >= until) {
                return Err(Ending::Stalled);
            }
        }
        Ok(true)
    }

    /// Receives `length` bytes into the front of `out`, which grows as they come.
    pub(crate) fn payload(
        &mut self,
        length: u64,
        out: &mut Vec<u8>,
        until: Instant,
    ) -> Result<(), Ending> {
        let length = to_usize(length);
        let mut done = 0;
        while done < length {
            let next = length.min(done + PIECE);
            if out.len() < next {
                out.resize(next, 0);
            }
            if !self.fill(&mut out[done..next], Patience::Until(until))? {
                return Err(Ending::CutShort);
            }
            done = next;
        }
        Ok(())
    }

    /// Receives bytes that nobody wants.
    pub(crate) fn skip(&mut self, length: u64, until: Instant) -> Result<(), Ending> {
        let mut rest = length;
        let mut waste = vec![0; BUFFER];
        while rest > 0 {
            let piece = to_usize(rest.min(to_u64(BUFFER)));
            if !self.fill(&mut waste[..piece], Patience::Until(until))? {
                return Err(Ending::CutShort);
            }
            rest -= to_u64(piece);
        }
        Ok(())
    }

    fn take_ahead(&mut self, out: &mut [u8]) -> usize {
        let ready = &self.buffer[self.start..self.end];
        let count = ready.len().min(out.len());
        out[..count].copy_from_slice(&ready[..count]);
        self.start += count;
        count
    }
}
