//! The one table of commands and options.

use clap::{Args, Parser, Subcommand};

use crate::cmd::{
    backup, bitmap, check, checkpoint, completions, create, demo, info, map, restore,
};
use crate::exit::{Exit, Outcome};
use crate::out::{self, Form, Out};
use crate::usage;

/// Checkpoints and incremental backup on qcow2 images.
///
/// Exit codes of all commands: 0 done, 1 could not, 2 damage found, 3 leaks only (check),
/// 63 format not supported, 64 usage.
#[derive(Parser, Debug)]
#[command(name = "tidemark", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
struct Global {
    /// Answer for people or for programs
    #[arg(
        long,
        value_enum,
        value_name = "FORM",
        default_value = "human",
        global = true
    )]
    output: Form,
    /// Say on stderr what is being done
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Show no progress bar
    #[arg(long, global = true)]
    no_progress: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    Info(info::Info),
    Map(map::Map),
    Check(check::Check),
    Create(create::Create),
    #[command(subcommand)]
    Bitmap(bitmap::Bitmap),
    #[command(subcommand)]
    Checkpoint(checkpoint::Checkpoint),
    Backup(backup::Backup),
    Restore(restore::Restore),
    Verify(restore::Verify),
    Catalogue(restore::Catalogue),
    Demo(demo::Demo),
    Completions(completions::Completions),
}

/// Runs the command line; what went wrong is one line on stderr.
pub(crate) fn main() -> Exit {
    run().unwrap_or_else(|failure| {
        out::warn(format_args!("{failure}"));
        failure.exit
    })
}

fn run() -> Outcome {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::judge(&error),
    };
    if cli.global.verbose {
        out::be_verbose();
    }
    let mut out = Out::new(cli.global.output, !cli.global.no_progress);
    let exit = match &cli.command {
        Command::Info(command) => command.run(&mut out),
        Command::Map(command) => command.run(&mut out),
        Command::Check(command) => command.run(&mut out),
        Command::Create(command) => command.run(&mut out),
        Command::Bitmap(command) => command.run(&mut out),
        Command::Checkpoint(command) => command.run(&mut out),
        Command::Backup(command) => command.run(&mut out),
        Command::Restore(command) => command.run(&mut out),
        Command::Verify(command) => command.run(&mut out),
        Command::Catalogue(command) => command.run(&mut out),
        Command::Demo(command) => command.run(&mut out),
        Command::Completions(command) => command.run(&mut out),
    };
    // What has been answered before a failure is shown all the same.
    let finished = out.finish();
    let exit = exit?;
    finished?;
    Ok(exit)
}
