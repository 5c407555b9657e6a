//! The session: requests of one client, answered out of order by a small crew of threads.
//!
//! # How it works
//! The members of a crew take turns: whoever has the turn receives one request, gives the turn
//! away, does the work and answers. So nothing is handed from thread to thread, and the number of
//! requests in flight is that of the crew. It grows, up to [`crate::Limits::workers`], when nobody
//! is left to take the turn.
//!
//! # Invariants
//! 1. Only the holder of the turn receives; only the holder of the sending lock sends, and one
//!    reply is sent in one go.
//! 2. Memory in flight is within the budget before it is allocated, and a payload only takes what
//!    has arrived.
//! 3. When a session ends, everything that was received has been answered, unless sending failed.

mod answer;
mod budget;
mod message;
mod rules;
mod status;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::Instant;

use self::budget::{Budget, Share};
use self::message::Message;
use self::rules::Rules;
use crate::convert::to_usize;
use crate::event::Ending;
use crate::handshake::Chosen;
use crate::incoming::{Incoming, Patience};
use crate::protocol::numbers::{command, flag};
use crate::protocol::reply::Style;
use crate::protocol::request::Request;
use crate::server::House;
use crate::transport::{Direction, send_all};

/// A member that holds more memory than this between two requests gives it back.
const KEPT_BYTES: usize = 1 << 20;

/// One client's session.
pub(crate) struct Session<'a> {
    house: &'a House,
    client: u64,
    chosen: &'a Chosen,
    rules: Rules,
    incoming: Mutex<&'a mut Incoming>,
    sending: Mutex<()>,
    budget: Budget,
    /// Nothing more is received, and long work stops between its pieces when sending failed.
    ended: AtomicBool,
    broken: AtomicBool,
    waiting: AtomicUsize,
    crew: AtomicUsize,
    ending: Mutex<Option<Ending>>,
}

/// A request with its place in the budget.
struct Job<'a> {
    request: Request,
    _share: Share<'a>,
}

/// Ends the session of a thread that panics: nobody else would answer its request.
struct Alarm<'a, 'b>(&'a Session<'b>);

impl Drop for Alarm<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.break_off();
        }
    }
}

/// Serves a client until it leaves, the connection breaks, or the server ends.
pub(crate) fn serve(house: &House, client: u64, mut chosen: Chosen) -> Option<Ending> {
    let mut incoming = Incoming::new(std::sync::Arc::clone(&chosen.transport));
    std::mem::swap(&mut incoming, &mut chosen.incoming);
    let [minimum, _, maximum] = house.block_sizes(&*chosen.export);
    let rules = Rules {
        size: chosen.export.size(),
        writable: chosen.export.offers().writable,
        style: chosen.style,
        minimum: minimum.into(),
        maximum: maximum.into(),
        contexts: !chosen.contexts.is_empty(),
    };
    let session = Session {
        house,
        client,
        chosen: &chosen,
        rules,
        incoming: Mutex::new(&mut incoming),
        sending: Mutex::new(()),
        budget: Budget::new(house.limits.bytes_in_flight),
        ended: AtomicBool::new(false),
        broken: AtomicBool::new(false),
        waiting: AtomicUsize::new(0),
        crew: AtomicUsize::new(1),
        ending: Mutex::new(None),
    };
    thread::scope(|scope| session.member(scope));
    if !session.broken.load(Ordering::Acquire) {
        chosen.transport.farewell();
    }
    lock(&session.ending).take()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Session<'a> {
    fn member<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let _alarm = Alarm(self);
        let mut data = Vec::new();
        while let Some(job) = self.next(&mut data) {
            self.reinforce(scope);
            self.answer(&job.request, &mut data);
            if data.len() > KEPT_BYTES {
                data = Vec::new();
            }
        }
    }

    /// Another thread, when nobody waits for the turn.
    fn reinforce<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let idle = self.waiting.load(Ordering::Relaxed) > 0;
        let full = self.crew.load(Ordering::Relaxed) >= self.house.limits.workers;
        if idle || full || self.ended.load(Ordering::Relaxed) {
            return;
        }
        self.crew.fetch_add(1, Ordering::Relaxed);
        let work = || self.member(scope);
        let started = thread::Builder::new()
            .name("nbd worker".to_owned())
            .spawn_scoped(scope, work);
        // With fewer threads it is slower, no more.
        if started.is_err() {
            self.crew.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes the turn and receives one request, whose payload is then at the front of `data`.
    fn next(&self, data: &mut Vec<u8>) -> Option<Job<'_>> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut incoming = lock(&self.incoming);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        if self.ended.load(Ordering::Acquire) {
            return None;
        }
        let received = self.receive(&mut incoming, data);
        match received {
            Ok(Some(job)) => return Some(job),
            Ok(None) => {}
            Err(ending) => {
                lock(&self.ending).get_or_insert(ending);
            }
        }
        self.ended.store(true, Ordering::Release);
        None
    }

    fn receive(
        &self,
        incoming: &mut Incoming,
        data: &mut Vec<u8>,
    ) -> Result<Option<Job<'_>>, Ending> {
        let extended = self.rules.style == Style::Extended;
        let mut bytes = [0; Request::EXTENDED];
        let bytes = match extended {
            true => &mut bytes[..],
            false => &mut bytes[..Request::COMPACT],
        };
        let limits = &self.house.limits;
        // A TCP socket goes on receiving after it was told to stop.
        if self.house.is_closing() && !incoming.is_ahead() {
            return Ok(None);
        }
        if !incoming.fill(bytes, Patience::OnceBegun(limits.request))? {
            return Ok(None);
        }
        let request = Request::decode(bytes, extended)?;
        let payload = request.payload(extended);
        if request.command == command::DISC && payload == 0 {
            return Ok(None);
        }
        if payload > self.rules.maximum {
            return Err(Ending::TooLong(payload));
        }
        let until = Instant::now() + limits.patience(payload);
        let kept = matches!(request.command, command::WRITE | command::BLOCK_STATUS);
        if !kept {
            incoming.skip(payload, until)?;
        }
        let holds = match request.command {
            command::READ => request.length.min(self.rules.maximum),
            command::BLOCK_STATUS => 0,
            _ => payload,
        };
        let _share = self.budget.share(to_usize(holds));
        if kept {
            incoming.payload(payload, data, until)?;
        }
        Ok(Some(Job { request, _share }))
    }

    /// Sends a reply. When that fails the client cannot be served any more.
    fn send(&self, message: &Message, data: &[u8]) {
        let _turn = lock(&self.sending);
        if self.broken.load(Ordering::Acquire) {
            return;
        }
        let sent = send_all(&*self.chosen.transport, &mut message.slices(data));
        if let Err(error) = sent {
            lock(&self.ending).get_or_insert(error.into());
            self.break_off();
        }
    }

    fn break_off(&self) {
        self.broken.store(true, Ordering::Release);
        self.ended.store(true, Ordering::Release);
        self.chosen.transport.hang_up(Direction::Both);
    }

    /// Whether the request's own flag is set and means anything here.
    fn is_fua(&self, request: &Request) -> bool {
        request.has(flag::FUA) && self.rules.writable
    }
}
