//! Sockets that wait for clients.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::transport::{Socket, Transport};

/// A socket that is bound and listens. It does not block.
pub(crate) enum Listener {
    Unix(UnixSocket),
    Tcp(TcpListener),
}

/// A Unix socket that accepts as soon as its name exists. The name is removed with it, if it still is
/// that of this socket.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl UnixSocket {
    /// Binds a name, for its owner alone if that is wanted. What a server left behind that is no more
    /// is replaced.
    ///
    /// # Errors
    /// Something else has that name, or somebody listens there.
    pub fn bind(path: &Path, private: bool) -> io::Result<Self> {
        refuse_taken(path)?;
        let hidden = hidden_name(path);
        let listener = match UnixListener::bind(&hidden) {
            Ok(listener) => {
                if let Err(error) = publish(&hidden, path, private) {
                    let _ = fs::remove_file(&hidden);
                    return Err(error);
                }
                listener
            }
            // The hidden name may be too long where the real one is not.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && !private => {
                if path.exists() {
                    fs::remove_file(path)?;
                }
                UnixListener::bind(path)?
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: identity(path),
        })
    }

    /// What accepts.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

fn publish(hidden: &Path, path: &Path, private: bool) -> io::Result<()> {
    if private {
        fs::set_permissions(hidden, fs::Permissions::from_mode(0o600))?;
    }
    fs::rename(hidden, path)
}

impl Listener {
    /// A Unix socket for everybody who may reach it.
    pub(crate) fn unix(path: &Path) -> io::Result<Self> {
        let socket = UnixSocket::bind(path, false)?;
        socket.listener.set_nonblocking(true)?;
        Ok(Self::Unix(socket))
    }

    /// A TCP socket, and where it is.
    pub(crate) fn tcp(address: impl ToSocketAddrs) -> io::Result<(Self, SocketAddr)> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let place = listener.local_addr()?;
        Ok((Self::Tcp(listener), place))
    }

    /// What becomes readable when a client waits.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// The next client that waits; `WouldBlock` when there is none.
    pub(crate) fn accept(&self) -> io::Result<Arc<dyn Transport>> {
        match self {
            Self::Unix(socket) => {
                let (stream, _) = socket.listener.accept()?;
                Ok(Arc::new(Socket::Unix(stream)))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                Ok(Arc::new(Socket::tcp(stream)?))
            }
        }
    }
}

/// A name is free, or that of a socket at which nobody listens any more.
fn refuse_taken(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

fn hidden_name(path: &Path) -> PathBuf {
    path.with_file_name(format!(".nbd-{}", std::process::id()))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}
