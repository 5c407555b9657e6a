//! The one table of commands and options.

use clap::{Args, Parser, Subcommand};

use crate::cmd::{
    amend, backup, bitmap, check, checkpoint, commit, compare, completions, convert, create, demo,
    info, map, measure, rebase, resize, restore, serve, snapshot,
};
use crate::exit::{Exit, Outcome};
use crate::out::{self, Form, Out};
use crate::usage;

/// Checkpoints and incremental backup on qcow2 images.
///
/// Exit codes of all commands: 0 done, 1 could not, 2 damage found, 3 leaks only (check); compare
/// as qemu-img: 0 same, 1 different, 2 to 4 not compared; 63 format not supported, 64 usage.
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
    Convert(convert::Convert),
    Compare(compare::Compare),
    Measure(measure::Measure),
    Snapshot(snapshot::Snapshot),
    Rebase(rebase::Rebase),
    Commit(commit::Commit),
    #[command(subcommand)]
    Bitmap(bitmap::Bitmap),
    #[command(subcommand)]
    Checkpoint(checkpoint::Checkpoint),
    Backup(backup::Backup),
    Resize(resize::Resize),
    Amend(amend::Amend),
    Restore(restore::Restore),
    Verify(restore::Verify),
    Catalogue(restore::Catalogue),
    Serve(serve::Serve),
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
        Command::Convert(command) => command.run(&mut out),
        Command::Compare(command) => command.run(&mut out),
        Command::Measure(command) => command.run(&mut out),
        Command::Snapshot(command) => command.run(&mut out),
        Command::Rebase(command) => command.run(&mut out),
        Command::Commit(command) => command.run(&mut out),
        Command::Bitmap(command) => command.run(&mut out),
        Command::Checkpoint(command) => command.run(&mut out),
        Command::Backup(command) => command.run(&mut out),
        Command::Resize(command) => command.run(&mut out),
        Command::Amend(command) => command.run(&mut out),
        Command::Restore(command) => command.run(&mut out),
        Command::Verify(command) => command.run(&mut out),
        Command::Catalogue(command) => command.run(&mut out),
        Command::Serve(command) => command.run(&mut out),
        Command::Demo(command) => command.run(&mut out),
        Command::Completions(command) => command.run(&mut out),
    };
    // What has been answered before a failure is shown all the same.
    let finished = out.finish();
    let exit = exit?;
    finished?;
    Ok(exit)
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};

    use super::Cli;

    const PAGE: &str = include_str!("../../docs/cli.md");

    #[test]
    fn the_table_of_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help() {
        each(&Cli::command(), &mut |path, command| {
            assert!(command.get_about().is_some(), "{path} has no help");
            for argument in command.get_arguments() {
                let id = argument.get_id();
                assert!(argument.get_help().is_some(), "{path}: {id} has no help");
            }
        });
    }

    #[test]
    fn every_command_and_long_option_is_in_the_reference() {
        let root = Cli::command();
        for argument in root.get_arguments() {
            if let Some(long) = argument.get_long() {
                assert!(PAGE.contains(&format!("`--{long}")), "--{long}");
            }
        }
        each(&root, &mut |path, command| {
            if command.has_subcommands() {
                return;
            }
            let section = section(path);
            for argument in command.get_arguments() {
                let long = argument.get_long().filter(|_| !argument.is_global_set());
                if let Some(long) = long {
                    assert!(section.contains(&format!("`--{long}")), "{path} --{long}");
                }
            }
        });
    }

    /// What the page says of one command.
    fn section(path: &str) -> &'static str {
        let heading = format!("### `{path}`\n");
        let start = PAGE
            .find(&heading)
            .unwrap_or_else(|| panic!("no section for {path}"));
        let rest = &PAGE[start + heading.len()..];
        &rest[..rest.find("\n##").unwrap_or(rest.len())]
    }

    fn each(command: &Command, work: &mut dyn FnMut(&str, &Command)) {
        fn walk(prefix: &str, command: &Command, work: &mut dyn FnMut(&str, &Command)) {
            for child in command.get_subcommands() {
                let path = format!("{prefix} {}", child.get_name()).trim().to_owned();
                work(&path, child);
                walk(&path, child, work);
            }
        }
        walk("", command, work);
    }
}
