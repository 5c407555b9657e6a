//! `completions`: for shells, from the one table of commands; man pages from the same.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use crate::cli::Cli;
use crate::exit::{Exit, Failure, Outcome};
use crate::out::Out;

/// Print completions for a shell, or write man pages
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// Shell to complete for
    #[arg(required_unless_present = "man")]
    shell: Option<clap_complete::Shell>,
    /// Write a man page for each command into DIR instead
    #[arg(long, value_name = "DIR", conflicts_with = "shell")]
    man: Option<PathBuf>,
}

impl Completions {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let mut command = Cli::command();
        if let Some(directory) = &self.man {
            let failed = |error| Failure::io(directory, "write man pages", &error);
            std::fs::create_dir_all(directory).map_err(failed)?;
            clap_mangen::generate_to(command, directory).map_err(failed)?;
        } else if let Some(shell) = self.shell {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, "tidemark", &mut text);
            out.text(&String::from_utf8_lossy(&text))?;
        }
        Ok(Exit::Done)
    }
}
