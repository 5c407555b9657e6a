//! Locks and atomics: those of the standard library or, built with `--cfg shuttle`, those of a
//! model checker that tries many orders of the same threads (`qcow2/tests/interleavings`).

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
};

/// A number below `lanes` that stays the same for a thread and differs between threads as far as
/// `lanes` allows.
#[cfg(not(shuttle))]
pub(crate) fn lane(lanes: usize) -> usize {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static OWN: Cell<Option<usize>> = const { Cell::new(None) });
    let own = OWN.get().unwrap_or_else(|| {
        let own = NEXT.fetch_add(1, Ordering::Relaxed);
        OWN.set(Some(own));
        own
    });
    own % lanes
}

/// As above, for the threads of the model checker.
#[cfg(shuttle)]
pub(crate) fn lane(lanes: usize) -> usize {
    usize::from(shuttle::current::me()) % lanes
}
