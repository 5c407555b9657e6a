//! The server: exports, sockets, clients, and an end that answers what was received.

mod listener;
mod lobby;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::listener::Listener;
pub use self::listener::UnixSocket;
use self::lobby::{Lobby, Seat};
use crate::event::{Ending, Event};
use crate::export::Export;
use crate::handshake::{Handshake, Upgrade};
use crate::limits::Limits;
use crate::protocol::numbers::MAX_STRING;
use crate::session;
use crate::transport::{Direction, Transport};

/// After the system refused a connection, for want of descriptors or memory.
const RECOVERY: Duration = Duration::from_millis(100);

/// Who is told what happens.
type Observer = Box<dyn Fn(&Event<'_>) + Send + Sync>;

/// What all connections share.
pub(crate) struct House {
    pub(crate) limits: Limits,
    pub(crate) exports: Vec<(String, Arc<dyn Export>)>,
    observer: Option<Observer>,
    pub(crate) upgrade: Option<Box<dyn Upgrade>>,
    lobby: Arc<Lobby>,
}

impl House {
    /// The export of a name. The empty name is the only one, when there is one.
    pub(crate) fn find(&self, name: &[u8]) -> Option<(String, Arc<dyn Export>)> {
        let named = self.exports.iter().find(|(own, _)| own.as_bytes() == name);
        let (name, export) = match (named, &self.exports[..]) {
            (Some(found), _) => found,
            (None, [only]) if name.is_empty() => only,
            _ => return None,
        };
        Some((name.clone(), Arc::clone(export)))
    }

    /// Smallest, preferred and largest request of an export under our limits.
    pub(crate) fn block_sizes(&self, export: &dyn Export) -> [u32; 3] {
        let sizes = export.block_sizes();
        let minimum = sizes.minimum.clamp(1, 1 << 16).next_power_of_two();
        let maximum = sizes.maximum.min(self.limits.request_bytes);
        let maximum = (maximum / minimum * minimum).max(minimum);
        let preferred = sizes.preferred.clamp(minimum.max(512), 32 << 20);
        [minimum, preferred.next_power_of_two(), maximum]
    }

    pub(crate) fn tell(&self, event: &Event<'_>) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.lobby.is_closing()
    }

    /// Serves one client from its greeting to its end.
    fn receive(&self, seat: &Seat) {
        let client = seat.client;
        self.tell(&Event::Connected { client });
        let ending = self.converse(seat).err();
        seat.transport.hang_up(Direction::Both);
        let reason = ending.as_ref();
        self.tell(&Event::Ended { client, reason });
    }

    fn converse(&self, seat: &Seat) -> Result<(), Ending> {
        let shortest = self.limits.request.min(self.limits.handshake);
        let tick = (shortest / 4).clamp(Duration::from_millis(10), Duration::from_secs(5));
        seat.transport.set_timeouts(tick, self.limits.stall)?;
        let transport = Arc::clone(&seat.transport);
        let Some(chosen) = Handshake::new(self, transport).run()? else {
            return Ok(());
        };
        self.tell(&Event::Chosen {
            client: seat.client,
            export: &chosen.name,
        });
        session::serve(self, seat.client, chosen).map_or(Ok(()), Err)
    }
}

/// Serves exports on sockets.
pub struct Server {
    limits: Limits,
    exports: Vec<(String, Arc<dyn Export>)>,
    observer: Option<Observer>,
    upgrade: Option<Box<dyn Upgrade>>,
    lobby: Arc<Lobby>,
    listeners: Vec<Listener>,
}

/// Ends a server from another thread, or asks it.
#[derive(Clone)]
pub struct Handle(Arc<Lobby>);

impl Handle {
    /// Lets no client and no request in any more. [`Server::run`] returns when those that were
    /// received have been answered.
    pub fn shut_down(&self) {
        self.0.close();
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.0.count()
    }
}

impl Server {
    /// A server of nothing yet.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(Self {
            limits,
            exports: Vec::new(),
            observer: None,
            upgrade: None,
            lobby: Arc::new(Lobby::new()?),
            listeners: Vec::new(),
        })
    }

    /// Serves a disk under a name; the only one also answers to the empty name.
    ///
    /// # Errors
    /// The name is taken, or longer than the protocol allows (4,096 bytes).
    pub fn export(&mut self, name: &str, export: Arc<dyn Export>) -> io::Result<()> {
        if name.len() > MAX_STRING {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.exports.iter().any(|(own, _)| own == name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.exports.push((name.to_owned(), export));
        Ok(())
    }

    /// Tells somebody what happens, from the threads on which it does.
    pub fn observe(&mut self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) {
        self.observer = Some(Box::new(observer));
    }

    /// Lets clients use TLS, or makes them.
    #[cfg(feature = "tls")]
    pub fn use_tls(&mut self, tls: crate::tls::Tls) {
        self.upgrade = Some(Box::new(tls));
    }

    /// Listens at a Unix socket. Clients may connect as soon as its name exists, and are served from
    /// [`run`](Self::run) on; then its name is removed.
    ///
    /// # Errors
    /// Something else has that name, or somebody listens there.
    pub fn listen_unix(&mut self, path: &Path) -> io::Result<()> {
        self.listeners.push(Listener::unix(path)?);
        Ok(())
    }

    /// Listens at a TCP address; port 0 is any free one. Returns where.
    ///
    /// # Errors
    /// The address cannot be had.
    pub fn listen_tcp(&mut self, address: impl ToSocketAddrs) -> io::Result<SocketAddr> {
        let (listener, place) = Listener::tcp(address)?;
        self.listeners.push(listener);
        Ok(place)
    }

    /// What ends it.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.lobby))
    }

    /// Serves until [`Handle::shut_down`]. Nobody holds the exports any more when it returns without
    /// an error.
    ///
    /// # Errors
    /// The sockets failed, or requests were still in flight after [`Limits::drain`].
    pub fn run(self) -> io::Result<()> {
        let Self {
            limits,
            exports,
            observer,
            upgrade,
            lobby,
            listeners,
        } = self;
        let house = Arc::new(House {
            limits,
            exports,
            observer,
            upgrade,
            lobby,
        });
        let mut threads = Vec::new();
        let accepted = accept_all(&house, &listeners, &mut threads);
        drop(listeners);
        house.lobby.close();
        let drained = drain(&house);
        for thread in threads {
            // Who is not finished by now hangs in an export: better an error than to hang as well.
            if drained || thread.is_finished() {
                let _ = thread.join();
            }
        }
        accepted?;
        if drained {
            Ok(())
        } else {
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    /// Serves one client that is connected already, on this thread, until it ends.
    pub fn serve_one(self, transport: Arc<dyn Transport>) {
        let house = House {
            limits: self.limits,
            exports: self.exports,
            observer: self.observer,
            upgrade: self.upgrade,
            lobby: self.lobby,
        };
        let seat = house.lobby.seat(transport);
        house.receive(&seat);
    }
}

fn drain(house: &House) -> bool {
    if house.lobby.wait_empty(Instant::now() + house.limits.drain) {
        return true;
    }
    // Who takes no replies is not waited for any longer.
    house.lobby.hang_up(Direction::Both);
    house.lobby.wait_empty(Instant::now() + house.limits.drain)
}

/// Takes clients as long as there are seats, until it is closing.
fn accept_all(
    house: &Arc<House>,
    listeners: &[Listener],
    threads: &mut Vec<JoinHandle<()>>,
) -> io::Result<()> {
    while !house.is_closing() {
        threads.retain(|thread| !thread.is_finished());
        let full = house.lobby.count() >= house.limits.clients;
        let open = if full { &[][..] } else { listeners };
        let mut waiting = vec![PollFd::new(house.lobby.bell(), PollFlags::POLLIN)];
        waiting.extend(
            open.iter()
                .map(|listener| PollFd::new(listener.descriptor(), PollFlags::POLLIN)),
        );
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        house.lobby.quiet();
        for listener in open {
            if house.lobby.count() < house.limits.clients {
                accept_one(house, listener, threads);
            }
        }
    }
    Ok(())
}

fn accept_one(house: &Arc<House>, listener: &Listener, threads: &mut Vec<JoinHandle<()>>) {
    let transport = match listener.accept() {
        Ok(transport) => transport,
        Err(error) => {
            let passing = matches!(
                error.kind(),
                io::ErrorKind::WouldBlock
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::Interrupted
            );
            if !passing {
                thread::sleep(RECOVERY);
            }
            return;
        }
    };
    let seat = house.lobby.seat(transport);
    let client = seat.client;
    let own = Arc::clone(house);
    let started = thread::Builder::new()
        .name("nbd client".to_owned())
        .spawn(move || own.receive(&seat));
    match started {
        Ok(thread) => threads.push(thread),
        Err(error) => house.tell(&Event::Ended {
            client,
            reason: Some(&Ending::NoThread(error)),
        }),
    }
}
