//! The last line of defence: a panic becomes one line and exit code 1, never a backtrace.

use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::exit::Exit;

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Runs `work`; its exit code, or 1 when it panicked.
pub(crate) fn run(work: fn() -> Exit) -> ExitCode {
    panic::set_hook(Box::new(report));
    match panic::catch_unwind(work) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(_) => ExitCode::from(Exit::Failed.code()),
    }
}

/// Says it once, also when several threads fail.
fn report(info: &PanicHookInfo<'_>) {
    if REPORTED.swap(true, Ordering::SeqCst) {
        return;
    }
    let payload = info.payload();
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let place = info
        .location()
        .map(|place| format!(" at {}:{}", place.file(), place.line()))
        .unwrap_or_default();
    let line = text.replace(char::is_control, " ");
    eprintln!("tidemark: internal error{place}: {line}; this is a bug, please report it");
}
