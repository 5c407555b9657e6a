//! Threads that share a row of pieces.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::error::Result;

/// The pieces that are left, and the first failure.
struct Row<I, E> {
    pieces: I,
    failure: Option<E>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands every piece, in order, to whichever of `threads` threads is free; each has its own `tools`.
/// After a failure no further piece is handed out.
///
/// # Errors
/// The first failure, of `pieces` or of `work`.
pub(super) fn run<P, T, E: Send + From<crate::Error>>(
    threads: usize,
    pieces: impl Iterator<Item = Result<P>> + Send,
    tools: impl Fn() -> T + Sync,
    work: impl Fn(P, &mut T) -> std::result::Result<(), E> + Sync,
) -> std::result::Result<(), E> {
    let row = Mutex::new(Row {
        pieces,
        failure: None,
    });
    let toil = || {
        let mut tools = tools();
        while let Some(piece) = next(&row) {
            if let Err(error) = work(piece, &mut tools) {
                lock(&row).failure.get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // With fewer threads than wanted it only takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, toil);
        }
        toil();
    });
    match row
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .failure
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn next<P, E: From<crate::Error>>(
    row: &Mutex<Row<impl Iterator<Item = Result<P>>, E>>,
) -> Option<P> {
    let mut row = lock(row);
    if row.failure.is_some() {
        return None;
    }
    match row.pieces.next()? {
        Ok(piece) => Some(piece),
        Err(error) => {
            row.failure = Some(error.into());
            None
        }
    }
}
