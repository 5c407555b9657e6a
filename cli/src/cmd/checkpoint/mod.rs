//! `checkpoint`: named moments of a domain, since when changes are known.

mod against;
mod create;
mod delete;
mod export;
mod list;
mod rebuild;
mod recover;
mod show;
mod upkeep;
mod verify;

use clap::Subcommand;

use crate::exit::Outcome;
use crate::out::Out;

/// Take, list, delete and rebuild checkpoints of a domain's disks
#[derive(Subcommand, Debug)]
pub(crate) enum Checkpoint {
    Create(create::Create),
    List(list::List),
    Show(show::Show),
    Current(show::Current),
    Parent(show::Parent),
    Verify(verify::Verify),
    Delete(delete::Delete),
    Rebuild(rebuild::Rebuild),
    Recover(recover::Recover),
    Scheme(upkeep::SetScheme),
    Prune(upkeep::Prune),
    Export(export::Export),
}

impl Checkpoint {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        match self {
            Self::Create(create) => create.run(out),
            Self::List(list) => list.run(out),
            Self::Show(show) => show.run(out),
            Self::Current(current) => current.run(out),
            Self::Parent(parent) => parent.run(out),
            Self::Verify(verify) => verify.run(out),
            Self::Delete(delete) => delete.run(out),
            Self::Rebuild(rebuild) => rebuild.run(out),
            Self::Recover(recover) => recover.run(out),
            Self::Scheme(scheme) => scheme.run(out),
            Self::Prune(prune) => prune.run(out),
            Self::Export(export) => export.run(out),
        }
    }
}
