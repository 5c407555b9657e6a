//! `serve`: disks over NBD.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tidemark_bitmap::Shape;
use tidemark_checkpoint::{Disk, DiskChange, DiskDelta, SinceOptions};
use tidemark_nbd::{ErrorCode, Event, Export, Limits, Server, Tls};
use tidemark_qcow2::{Bitmap, Granularity};

use crate::domain::{Access, Disks, Open};
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{Format, Gates, Share};
use crate::out::{Out, say, trace, warn};
use crate::serve::control::Control;
use crate::serve::signals::Signals;
use crate::serve::{DirtyContext, ImageExport};

/// Port of NBD.
const PORT: u16 = 10809;

/// Serve disks over NBD until SIGINT or SIGTERM
#[derive(Args, Debug)]
pub(crate) struct Serve {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    #[command(flatten)]
    gates: Gates,
    /// Listen at a Unix socket
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen at a TCP address, HOST:PORT or HOST; port 0 is any free one
    #[arg(short = 'b', long, value_name = "ADDR", visible_alias = "bind")]
    listen: Option<String>,
    /// Refuse every change
    #[arg(short, long)]
    read_only: bool,
    /// Name of the export of an only disk, in place of the disk's own
    #[arg(short = 'x', long, value_name = "NAME")]
    export_name: Option<String>,
    /// Text for people about the exports
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    description: String,
    /// Show a bitmap as context qemu:dirty-bitmap:NAME (may be repeated)
    #[arg(short = 'B', long, value_name = "NAME")]
    bitmap: Vec<String>,
    /// Show what changed since a checkpoint as context qemu:dirty-bitmap:backup-DISK (may be repeated)
    #[arg(long, value_name = "CHECKPOINT")]
    since: Vec<String>,
    /// Clients at a time; further ones wait
    #[arg(short = 'e', long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    shared: u32,
    /// Use TLS with server-cert.pem and server-key.pem of DIR
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Who must use TLS: all clients, or those that want it
    #[arg(
        long,
        value_enum,
        value_name = "WHO",
        default_value = "require",
        requires = "tls_certificates"
    )]
    tls: TlsPolicy,
    /// Let only clients in whose certificate ca-cert.pem of DIR has signed
    #[arg(long, requires = "tls_certificates")]
    tls_verify_peer: bool,
    /// Listen for commands at a Unix socket of the owner: checkpoints, questions, the end
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    #[command(flatten)]
    disks: Disks,
}

/// Who must use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TlsPolicy {
    /// Clients that want it.
    On,
    /// All.
    Require,
}

/// A disk as it is served, for the answer.
struct Served {
    disk: String,
    export: String,
    size: u64,
    contexts: Vec<String>,
    since: Vec<Value>,
}

/// Where clients find the server.
struct Places {
    socket: Option<PathBuf>,
    address: Option<SocketAddr>,
}

impl Serve {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        if self.socket.is_none() && self.listen.is_none() {
            return Err(Failure::usage(
                "nowhere to listen: give --socket PATH or --listen ADDR",
            ));
        }
        if self.share.force_share && !self.read_only {
            return Err(Failure::usage(
                "-U looks at an image that is in use: it needs --read-only",
            ));
        }
        let access = if self.read_only {
            Access::Read(self.gates.clone(), self.share)
        } else {
            Access::Copy(self.gates.clone())
        };
        let tls = self.tls()?;
        let open = self.disks.open(&access)?;
        let served = self.serve(&open, tls, out);
        // Whatever happened, what clients wrote is closed cleanly.
        let closed = open.close();
        served?;
        closed?;
        Ok(Exit::Done)
    }

    fn serve(&self, open: &Open, tls: Option<Tls>, out: &mut Out) -> Outcome<()> {
        let signals = Signals::hold()?;
        let limits = Limits {
            clients: usize::try_from(self.shared).unwrap_or(usize::MAX),
            ..Limits::default()
        };
        let failed = |error: std::io::Error| Failure::new(format!("serve: {error}"));
        let mut server = Server::new(limits).map_err(failed)?;
        server.observe(tell);
        if let Some(tls) = tls {
            server.use_tls(tls);
        }
        let (mut all, mut exports) = (Vec::new(), Vec::new());
        let disks = open.domain.disks();
        let since = |name: &String| open.domain.changed_since(name, SinceOptions::default());
        let since = self.since.iter().map(since);
        let since = since.collect::<Result<Vec<Vec<DiskChange>>, _>>()?;
        for disk in disks {
            let name = match &self.export_name {
                Some(name) if disks.len() == 1 => name,
                Some(_) => return Err(Failure::usage("--export-name is for an only disk")),
                None => &disk.name,
            };
            let (export, served) = self.export(&since, disk, name)?;
            let export = Arc::new(export);
            let added = server.export(name, export.clone());
            exports.push((name.clone(), export));
            added.map_err(|_| Failure::usage(format!("'{name}' is no name for an export")))?;
            all.push(served);
        }
        let places = self.listen(&mut server)?;
        let socket = self.control.as_deref().map(Control::bind).transpose()?;
        let control = Control::new(&open.domain, exports, server.handle());
        signals.end(server.handle())?;
        self.announce(out, &places, &all)?;
        let ended = thread::scope(|scope| {
            if let Some(socket) = &socket {
                scope.spawn(|| control.serve(scope, socket));
            }
            let ended = server.run();
            control.ended.store(true, Ordering::Release);
            ended
        });
        ended.map_err(|error| match error.kind() {
            std::io::ErrorKind::TimedOut => {
                Failure::new("serve: requests did not end, the images are not closed cleanly")
            }
            _ => failed(error),
        })
    }

    fn tls(&self) -> Outcome<Option<Tls>> {
        let Some(directory) = &self.tls_certificates else {
            return Ok(None);
        };
        let tls = Tls::from_directory(directory, self.tls_verify_peer)
            .map_err(|error| Failure::new(error.to_string()))?;
        Ok(Some(match self.tls {
            TlsPolicy::On => tls.optional(),
            TlsPolicy::Require => tls,
        }))
    }

    /// A disk with the contexts that were asked for.
    fn export(
        &self,
        changes: &[Vec<DiskChange>],
        disk: &Disk,
        name: &str,
    ) -> Outcome<(ImageExport, Served)> {
        let image = &disk.image;
        image.require_guest_data()?;
        let mut dirty = Vec::new();
        for bitmap in &self.bitmap {
            let records = image
                .bitmaps()?
                .iter()
                .any(|info| info.name == *bitmap && info.auto);
            dirty.push(DirtyContext::new(
                bitmap,
                image.load_bitmap(bitmap)?,
                records,
            ));
        }
        let mut since = Vec::new();
        for (checkpoint, changes) in self.since.iter().zip(changes) {
            let context = match self.since.len() {
                1 => format!("backup-{}", disk.name),
                _ => format!("backup-{}:{checkpoint}", disk.name),
            };
            let (bits, reason) = changed_on(disk, changes)?;
            if let Some(reason) = &reason {
                warn(format_args!(
                    "disk '{}' is all dirty since '{checkpoint}': {reason}",
                    disk.name
                ));
            }
            since.push(json!({
                "checkpoint": checkpoint,
                "context": format!("qemu:dirty-bitmap:{context}"),
                "mode": if reason.is_some() { "full" } else { "incremental" },
                "reason": reason,
                "dirty-bytes": bits.dirty_bytes(),
            }));
            dirty.push(DirtyContext::new(&context, bits, true));
        }
        let export = ImageExport::new(Arc::clone(image), dirty, &self.description);
        let served = Served {
            disk: disk.name.clone(),
            export: name.to_owned(),
            size: image.size(),
            contexts: export.contexts(),
            since,
        };
        Ok((export, served))
    }

    fn listen(&self, server: &mut Server) -> Outcome<Places> {
        let mut address = None;
        if let Some(listen) = &self.listen {
            let failed =
                |error: std::io::Error| Failure::new(format!("--listen {listen}: {error}"));
            let found = listen
                .to_socket_addrs()
                .or_else(|_| (listen.trim_matches(['[', ']']), PORT).to_socket_addrs())
                .map_err(failed)?;
            let found: Vec<SocketAddr> = found.collect();
            address = Some(server.listen_tcp(&found[..]).map_err(failed)?);
        }
        if let Some(path) = &self.socket {
            server
                .listen_unix(path)
                .map_err(|error| Failure::io(path, "listen", &error))?;
        }
        Ok(Places {
            socket: self.socket.clone(),
            address,
        })
    }

    /// Says where clients find what, at once: somebody may wait for it.
    fn announce(&self, out: &mut Out, places: &Places, all: &[Served]) -> Outcome<()> {
        let scheme = match self.tls_certificates {
            Some(_) => "nbds",
            None => "nbd",
        };
        let uris = |export: &str| {
            let unix = places.socket.as_ref().map(|path| {
                let path = escaped(&path.to_string_lossy());
                format!("{scheme}+unix:///{}?socket={path}", escaped(export))
            });
            let tcp = places
                .address
                .map(|address| format!("{scheme}://{address}/{}", escaped(export)));
            unix.into_iter().chain(tcp).collect::<Vec<String>>()
        };
        if out.is_json() {
            let exports: Vec<Value> = all
                .iter()
                .map(|served| {
                    json!({
                        "disk": served.disk, "name": served.export, "size": served.size,
                        "read-only": self.read_only, "contexts": served.contexts,
                        "since": served.since, "uris": uris(&served.export),
                    })
                })
                .collect();
            out.json(&json!({
                "socket": places.socket.as_ref().map(|path| path.to_string_lossy()),
                "address": places.address.map(|address| address.to_string()),
                "exports": exports,
            }))?;
        } else {
            for served in all {
                for uri in uris(&served.export) {
                    say!(out, "{}: {uri}", served.disk)?;
                }
            }
        }
        out.finish()
    }
}

/// What changed on a disk, and why it is everything.
fn changed_on(disk: &Disk, changes: &[DiskChange]) -> Outcome<(Bitmap, Option<String>)> {
    let change = changes.iter().find(|change| change.disk == disk.name);
    match change.map(|change| &change.delta) {
        Some(DiskDelta::Incremental(bits)) => Ok((bits.clone(), None)),
        Some(DiskDelta::Full { reason }) => Ok((all_dirty(disk)?, Some(reason.to_string()))),
        None => Ok((all_dirty(disk)?, Some("nothing is known of it".to_owned()))),
    }
}

/// Everything, as finely as a bitmap may have it.
fn all_dirty(disk: &Disk) -> Outcome<Bitmap> {
    let page_bytes = u32::try_from(disk.image.geometry().cluster_bytes()).unwrap_or(65_536);
    let shape = (16..=31)
        .filter_map(Granularity::from_bits)
        .find_map(|granularity| Shape::new(disk.image.size(), granularity, page_bytes).ok());
    let shape = shape.ok_or_else(|| Failure::new(format!("disk '{}' is too large", disk.name)))?;
    Ok(Bitmap::all_dirty(shape))
}

/// Says on stderr what went wrong at the disk, and all the rest with -v. What a client did wrong is
/// no news: it could fill a log with it.
fn tell(event: &Event<'_>) {
    match event {
        Event::Failed { fault, .. }
            if matches!(fault.code, ErrorCode::Io | ErrorCode::OutOfMemory) =>
        {
            warn(format_args!("{event}"));
        }
        _ => trace(format_args!("{event}")),
    }
}

/// A text inside an address: what is no letter, digit or one of `-._~/` is written as `%` and two
/// hexadecimal digits.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes()
        .map(|byte| match plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}
