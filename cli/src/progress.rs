//! A bar on stderr for what can last: only on a terminal, only when it lasts over a second.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long a command stays silent.
const SILENCE: Duration = Duration::from_secs(1);

/// A bar that appears late, or never.
pub(crate) struct Progress {
    bar: ProgressBar,
    begun: Instant,
    wanted: bool,
    silence: Duration,
}

impl Progress {
    /// A bar of bytes; `wanted` is false with `--no-progress`.
    pub(crate) fn new(wanted: bool, what: &str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Self {
            bar,
            begun: Instant::now(),
            wanted,
            silence: SILENCE,
        }
    }

    /// The same bar, but shown from the start when `eager`.
    pub(crate) fn eager(mut self, eager: bool) -> Self {
        if eager {
            self.silence = Duration::ZERO;
        }
        self
    }

    /// So much is done.
    pub(crate) fn at(&self, done: u64) {
        // indicatif draws nothing unless stderr is a terminal.
        if self.wanted && self.bar.is_hidden() && self.begun.elapsed() > self.silence {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done);
    }
}

impl Progress {
    /// So much of so much is done.
    pub(crate) fn of(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.at(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
