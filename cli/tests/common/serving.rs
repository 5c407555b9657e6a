//! A server that runs until it is told to end.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Place;

/// A running `tidemark serve`. Dropping it kills it.
pub(crate) struct Served {
    child: Child,
    pub(crate) socket: PathBuf,
    /// What it said when it was ready.
    pub(crate) answer: Value,
}

impl Place {
    /// Starts `serve` on a Unix socket; arguments are split at spaces.
    pub(crate) fn serve(&self, line: &str) -> Served {
        let socket = self.path("nbd.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidemark"))
            .args(["serve", "--output", "json", "--socket"])
            .arg(&socket)
            .args(line.split_whitespace())
            .current_dir(self.path("."))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let mut answers = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
        let answer = answers.next();
        let Some(Ok(answer)) = answer else {
            let mut said = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut said)
                .unwrap();
            panic!("serve {line}: {said}");
        };
        Served {
            child,
            socket,
            answer,
        }
    }
}

impl Served {
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Ends it; what it said on stderr.
    pub(crate) fn stop(self) -> String {
        self.stop_by(Signal::SIGTERM)
    }

    pub(crate) fn stop_by(mut self, signal: Signal) -> String {
        self.send(signal);
        self.wait_for_end()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(mut self) -> String {
        self.wait_for_end()
    }

    fn wait_for_end(&mut self) -> String {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "it ends");
            std::thread::sleep(Duration::from_millis(2));
        };
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert!(status.success(), "{status}: {said}");
        said
    }

    /// Ends it as a crash would.
    pub(crate) fn kill_dash_nine(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn send(&self, signal: Signal) {
        let process = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(process), signal).unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a client that must work; what it said.
pub(crate) fn client(program: &str, args: &[&str]) -> String {
    // The module of nbdsh belongs to the system's Python, not to another one before it in PATH.
    let path = std::env::var("PATH").unwrap();
    let output = Command::new(program)
        .args(args)
        .env("PATH", format!("/usr/bin:{path}"))
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {said}{complaint}"
    );
    said
}
