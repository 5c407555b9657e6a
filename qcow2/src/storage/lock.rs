//! File locks as QEMU takes them, so that neither opens what the other is writing.
//!
//! QEMU locks single bytes of the image file with open-file-description locks
//! (`block/file-posix.c`): byte `100 + p` is held shared by whoever *uses* permission `p`, byte
//! `200 + p` by whoever does *not share* it. A newcomer asks whether anybody refuses to share what
//! it needs, or uses what it will not share. No byte is ever locked exclusively, so the order of
//! the requests does not matter.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Byte offset of the first "in use" lock.
const USED_BASE: i64 = 100;
/// Byte offset of the first "not shared" lock.
const UNSHARED_BASE: i64 = 200;

/// Permission numbers of QEMU's block layer (`BLK_PERM_*`, as bit positions).
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a file may be shared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Readers share with readers; a writer shares with nobody that needs a steady image.
    Exclusive,
    /// Look at an image that somebody else may be writing (`-U`): what is read is unsteady.
    ForceShare,
}

/// Takes the locks of a reader or a writer on `file`; they last until the file is closed.
///
/// # Errors
/// `WouldBlock` with a sentence that says who can hold the image, or the system's error.
pub(super) fn acquire(file: &File, write: bool, sharing: Sharing) -> io::Result<()> {
    let used: &[i64] = if write {
        &[CONSISTENT_READ, WRITE, RESIZE]
    } else {
        &[CONSISTENT_READ]
    };
    let unshared: &[i64] = match sharing {
        Sharing::Exclusive => &[WRITE, RESIZE],
        Sharing::ForceShare => &[],
    };
    for permission in used {
        lock_byte(file, USED_BASE + permission)?;
    }
    for permission in unshared {
        lock_byte(file, UNSHARED_BASE + permission)?;
    }
    for permission in used {
        if held_by_other(file, UNSHARED_BASE + permission)? {
            return Err(in_use(write));
        }
    }
    for permission in unshared {
        if held_by_other(file, USED_BASE + permission)? {
            return Err(in_use(write));
        }
    }
    Ok(())
}

fn in_use(write: bool) -> io::Error {
    let what = if write { "writing" } else { "reading" };
    io::Error::new(
        io::ErrorKind::WouldBlock,
        format!(
            "the image is in use and cannot be opened for {what}: a running virtual machine, a \
             QEMU tool or another tidemark holds its lock"
        ),
    )
}

fn request(kind: i32, start: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(i16::MAX),
        l_start: start,
        l_len: 1,
        l_pid: 0,
    }
}

fn lock_byte(file: &File, byte: i64) -> io::Result<()> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&request(libc::F_RDLCK, byte))) {
        Ok(_) => Ok(()),
        // The file system has no such locks: then nobody else has them either.
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOLCK) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a lock on `byte` would stop an exclusive lock of ours: somebody else holds it.
fn held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut probe = request(libc::F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
        Ok(_) => Ok(i32::from(probe.l_type) != libc::F_UNLCK),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOLCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
