//! Results: the only place that writes to stdout.

use std::fmt::Arguments;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use serde_json::Value;

use crate::exit::{Failure, Outcome};

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// Lines for people.
    #[default]
    Human,
    /// JSON for programs.
    Json,
}

/// Where results go. When the reader has gone away nothing more is written, and that is no failure.
pub(crate) struct Out {
    form: Form,
    stdout: BufWriter<StdoutLock<'static>>,
    gone: bool,
    /// Whether a bar may show on a terminal.
    pub(crate) progress: bool,
}

/// Prints one line of a result.
macro_rules! say {
    ($out:expr, $($arg:tt)*) => { $out.line(format_args!($($arg)*)) };
}
pub(crate) use say;

impl Out {
    pub(crate) fn new(form: Form, progress: bool) -> Self {
        Self {
            form,
            stdout: BufWriter::new(io::stdout().lock()),
            gone: false,
            progress,
        }
    }

    /// Whether the result is wanted as JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.form == Form::Json
    }

    /// One line.
    pub(crate) fn line(&mut self, text: Arguments<'_>) -> Outcome<()> {
        self.write(|stdout| {
            stdout.write_fmt(text)?;
            stdout.write_all(b"\n")
        })
    }

    /// Text as it is.
    pub(crate) fn text(&mut self, text: &str) -> Outcome<()> {
        self.write(|stdout| stdout.write_all(text.as_bytes()))
    }

    /// A whole answer as JSON.
    pub(crate) fn json(&mut self, value: &Value) -> Outcome<()> {
        self.write(|stdout| {
            serde_json::to_writer_pretty(&mut *stdout, value)?;
            stdout.write_all(b"\n")
        })
    }

    /// An array that may be too long to be held: one element a line.
    pub(crate) fn array(&mut self, elements: impl Iterator<Item = Outcome<Value>>) -> Outcome<()> {
        let mut gap = "[";
        for element in elements {
            let element = element?;
            self.text(gap)?;
            self.write(|stdout| Ok(serde_json::to_writer(&mut *stdout, &element)?))?;
            gap = ",\n";
        }
        self.text(if gap == "[" { "[]\n" } else { "]\n" })
    }

    /// Hands everything to the reader.
    pub(crate) fn finish(&mut self) -> Outcome<()> {
        self.write(Write::flush)
    }

    fn write(
        &mut self,
        work: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>,
    ) -> Outcome<()> {
        if self.gone {
            return Ok(());
        }
        match work(&mut self.stdout) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(())
            }
            Err(error) => Err(Failure::new(format!("stdout: write: {error}"))),
        }
    }
}

/// Says on stderr what the reader of a result should know.
pub(crate) fn warn(text: Arguments<'_>) {
    eprintln!("tidemark: {text}");
}

/// Turns on [`trace`].
pub(crate) fn be_verbose() {
    VERBOSE.store(true, Ordering::Relaxed);
}

/// Says on stderr what is being done, when asked to.
pub(crate) fn trace(text: Arguments<'_>) {
    if VERBOSE.load(Ordering::Relaxed) {
        eprintln!("tidemark: {text}");
    }
}
