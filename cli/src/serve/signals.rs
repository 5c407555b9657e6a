//! Signals that end a server.

use std::thread;

use nix::sys::signal::{SigSet, Signal};
use tidemark_nbd::Handle;

use crate::exit::{Exit, Failure, Outcome};

/// SIGINT and SIGTERM, held back until somebody waits for them.
pub(crate) struct Signals(SigSet);

impl Signals {
    /// Holds them back on this thread and on all that it starts from now on.
    pub(crate) fn hold() -> Outcome<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block()
            .map_err(|error| Failure::new(format!("signals cannot be held: {error}")))?;
        Ok(Self(set))
    }

    /// The first one ends the server, the second one the process, as a crash would: safe, only wider
    /// bitmaps.
    pub(crate) fn end(self, handle: Handle) -> Outcome<()> {
        let wait = move || {
            if self.0.wait().is_ok() {
                handle.shut_down();
            }
            if self.0.wait().is_ok() {
                std::process::exit(Exit::Failed.code().into());
            }
        };
        let started = thread::Builder::new()
            .name("signals".to_owned())
            .spawn(wait);
        started
            .map(drop)
            .map_err(|error| Failure::new(format!("no thread could be started: {error}")))
    }
}
