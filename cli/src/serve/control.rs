//! Control of a running server: one JSON object a line, on a Unix socket of its owner.
//!
//! `{"execute": NAME, "arguments": {...}, "id": ANY}` is answered by `{"return": ..., "id": ANY}` or
//! `{"error": {"message": TEXT}, "id": ANY}`, in the order of the requests. One operation runs at a
//! time, whoever asked for it; guests go on meanwhile, but for the instant of a checkpoint.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tidemark_checkpoint::{CreateFlags, CreateSpec, DeleteFlags, Domain, ListOptions};
use tidemark_nbd::{Export, Handle, UnixSocket};

use super::ImageExport;
use crate::answer::checkpoint::to_json;
use crate::exit::{Failure, Outcome};

/// Longest line.
const LINE_BYTES: u64 = 64 << 10;
/// Clients at a time; further ones are sent away.
const MAX_CLIENTS: usize = 16;
/// How often a thread that waits looks whether the server has ended.
const TICK: Duration = Duration::from_millis(100);

/// What can be controlled.
pub(crate) struct Control<'a> {
    pub(crate) domain: &'a Domain,
    pub(crate) exports: Vec<(String, std::sync::Arc<ImageExport>)>,
    pub(crate) handle: Handle,
    pub(crate) ended: AtomicBool,
    turn: Mutex<()>,
    clients: Mutex<usize>,
}

impl<'a> Control<'a> {
    pub(crate) fn new(
        domain: &'a Domain,
        exports: Vec<(String, std::sync::Arc<ImageExport>)>,
        handle: Handle,
    ) -> Self {
        Self {
            domain,
            exports,
            handle,
            ended: AtomicBool::new(false),
            turn: Mutex::new(()),
            clients: Mutex::new(0),
        }
    }

    /// Binds the socket.
    pub(crate) fn bind(path: &Path) -> Outcome<UnixSocket> {
        let failed = |error: io::Error| Failure::io(path, "listen", &error);
        let socket = UnixSocket::bind(path, true).map_err(failed)?;
        socket.listener().set_nonblocking(true).map_err(failed)?;
        Ok(socket)
    }

    /// Serves clients until the server has ended.
    pub(crate) fn serve<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        socket: &UnixSocket,
    ) {
        while !self.ended.load(Ordering::Acquire) {
            let Ok((stream, _)) = socket.listener().accept() else {
                thread::sleep(TICK);
                continue;
            };
            if *self.clients.lock().unwrap_or_else(PoisonError::into_inner) >= MAX_CLIENTS {
                continue;
            }
            *self.clients.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            let work = move || {
                // Who goes away has nothing more to hear.
                let _ = self.converse(&stream);
                *self.clients.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            };
            let named = thread::Builder::new().name("control".to_owned());
            if named.spawn_scoped(scope, work).is_err() {
                *self.clients.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            }
        }
    }

    fn converse(&self, stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while !self.ended.load(Ordering::Acquire) {
            let room = LINE_BYTES.saturating_sub(u64::try_from(line.len()).unwrap_or(u64::MAX));
            let received = reader.by_ref().take(room).read_until(b'\n', &mut line);
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
                Ok(_) if line.ends_with(b"\n") => {}
                Ok(_) if room == 0 => {
                    let refused = json!({ "error": { "message": "the line is too long" } });
                    return send(stream, &refused);
                }
                Ok(0) => return Ok(()),
                Ok(_) => continue,
            }
            send(stream, &self.answer(&line))?;
            line.clear();
        }
        Ok(())
    }

    fn answer(&self, line: &[u8]) -> Value {
        let request: Value = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("not a line of JSON: {error}");
                return json!({ "error": { "message": message }, "id": null });
            }
        };
        let id = request.get("id").cloned().unwrap_or(Value::Null);
        let done = self.execute(&request);
        match done {
            Ok(value) => json!({ "return": value, "id": id }),
            Err(failure) => json!({ "error": { "message": failure.to_string() }, "id": id }),
        }
    }

    fn execute(&self, request: &Value) -> Outcome<Value> {
        let nothing = Map::new();
        let arguments = match request.get("arguments") {
            None => &nothing,
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Failure::usage("arguments must be an object")),
        };
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let name = request.get("execute").and_then(Value::as_str);
        match name.unwrap_or_default() {
            "status" => {
                known(arguments, &[])?;
                Ok(self.status())
            }
            "checkpoint-create" => self.create(arguments),
            "checkpoint-delete" => self.delete(arguments),
            "checkpoint-list" => {
                known(arguments, &[])?;
                let listing = self.domain.list(ListOptions::default())?;
                Ok(listing.checkpoints.iter().map(to_json).collect())
            }
            "shut-down" => {
                known(arguments, &[])?;
                self.handle.shut_down();
                Ok(json!({}))
            }
            other => Err(Failure::usage(format!("there is no command '{other}'"))),
        }
    }

    fn status(&self) -> Value {
        let exports = self.exports.iter().map(|(name, export)| {
            json!({
                "name": name, "size": export.size(), "read-only": !export.offers().writable,
                "contexts": export.contexts(),
            })
        });
        let exports: Vec<Value> = exports.collect();
        json!({ "clients": self.handle.clients(), "exports": exports })
    }

    fn create(&self, arguments: &Map<String, Value>) -> Outcome<Value> {
        known(arguments, &["name", "description"])?;
        let spec = CreateSpec {
            name: text(arguments, "name")?,
            description: text(arguments, "description")?,
            ..CreateSpec::default()
        };
        let checkpoint = self.domain.create(&spec, CreateFlags::NONE);
        // Also after a failure: some of the disks may have it.
        for (_, export) in &self.exports {
            export.follow()?;
        }
        let checkpoint = checkpoint?;
        let identity = checkpoint.identity().to_string();
        Ok(json!({ "name": checkpoint.name(), "identity": identity }))
    }

    fn delete(&self, arguments: &Map<String, Value>) -> Outcome<Value> {
        known(arguments, &["name"])?;
        let name = text(arguments, "name")?.ok_or_else(|| Failure::usage("name is missing"))?;
        let deleted = self.domain.delete(&name, DeleteFlags::NONE)?;
        Ok(json!({ "deleted": deleted.checkpoints }))
    }
}

fn send(mut stream: &UnixStream, answer: &Value) -> io::Result<()> {
    stream.write_all(format!("{answer}\n").as_bytes())
}

/// Refuses arguments that would be ignored.
fn known(arguments: &Map<String, Value>, names: &[&str]) -> Outcome<()> {
    match arguments.keys().find(|key| !names.contains(&key.as_str())) {
        Some(key) => Err(Failure::usage(format!("there is no argument '{key}'"))),
        None => Ok(()),
    }
}

fn text(arguments: &Map<String, Value>, key: &str) -> Outcome<Option<String>> {
    match arguments.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(Failure::usage(format!("{key} must be a text"))),
    }
}
