//! Who is connected, and the news that it shall end.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::transport::{Direction, Transport};

/// What the server, its clients and its handles share.
pub(crate) struct Lobby {
    clients: Mutex<Clients>,
    left: Condvar,
    closing: AtomicBool,
    /// Wakes whoever waits for connections.
    bell: UnixStream,
    heard: UnixStream,
}

#[derive(Default)]
struct Clients {
    next: u64,
    present: HashMap<u64, Arc<dyn Transport>>,
}

/// A client's place, given up when it is dropped, also by a panic.
pub(crate) struct Seat {
    lobby: Arc<Lobby>,
    pub(crate) client: u64,
    pub(crate) transport: Arc<dyn Transport>,
}

impl Lobby {
    pub(crate) fn new() -> io::Result<Self> {
        let (bell, heard) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        heard.set_nonblocking(true)?;
        Ok(Self {
            clients: Mutex::default(),
            left: Condvar::new(),
            closing: AtomicBool::new(false),
            bell,
            heard,
        })
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// No request is received any more; those that were are answered.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.hang_up(Direction::Receiving);
        self.ring();
    }

    pub(crate) fn hang_up(&self, direction: Direction) {
        for transport in self.clients().present.values() {
            transport.hang_up(direction);
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.clients().present.len()
    }

    /// Waits until everybody has left; false when it takes longer.
    pub(crate) fn wait_empty(&self, until: Instant) -> bool {
        let mut clients = self.clients();
        while !clients.present.is_empty() {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            let waited = self.left.wait_timeout(clients, rest);
            clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Seats a client that has connected.
    pub(crate) fn seat(self: &Arc<Self>, transport: Arc<dyn Transport>) -> Seat {
        let mut clients = self.clients();
        let client = clients.next;
        clients.next += 1;
        clients.present.insert(client, Arc::clone(&transport));
        drop(clients);
        // Whoever closes finds it in the list, or it finds that it is closing.
        if self.is_closing() {
            transport.hang_up(Direction::Receiving);
        }
        Seat {
            lobby: Arc::clone(self),
            client,
            transport,
        }
    }

    /// What becomes readable when the bell rings.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.heard.as_fd()
    }

    /// Takes back all rings.
    pub(crate) fn quiet(&self) {
        let mut rings = [0; 64];
        while matches!((&self.heard).read(&mut rings), Ok(count) if count > 0) {}
    }

    fn ring(&self) {
        // A full pipe is loud enough.
        let _ = (&self.bell).write(&[1]);
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.transport.hang_up(Direction::Both);
        self.lobby.clients().present.remove(&self.client);
        self.lobby.left.notify_all();
        self.lobby.ring();
    }
}
