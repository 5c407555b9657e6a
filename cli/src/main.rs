//! The command `tidemark`: checkpoints and incremental backup on qcow2 images.
//!
//! - [`cli`] is the one table of commands and options; help, completions and man pages come from it.
//! - [`cmd`] has one file a command: its options, what it does, what it answers.
//! - [`exit`] is the one table of exit codes, and the failure that carries one.
//! - [`out`] is the only place that writes results.
//!
//! Results go to stdout, everything else to stderr. A failure is one line.

mod answer;
mod cli;
mod cmd;
mod creation;
mod domain;
mod exit;
mod facts;
mod guard;
mod luks;
mod open;
mod out;
mod progress;
mod serve;
mod size;
mod snapshots;
mod usage;

use std::process::ExitCode;

fn main() -> ExitCode {
    guard::run(cli::main)
}
