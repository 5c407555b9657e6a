//! `checkpoint scheme`, `prune`: the chain as a whole.

use clap::Args;
use serde_json::json;
use tidemark_qcow2::chain::Scheme;

use super::create::SchemeName;
use super::delete;
use crate::answer::chain;
use crate::domain::{Access, Disks};
use crate::exit::{Exit, Outcome};
use crate::out::{Out, say};

/// Change how the bitmaps of the chain share the work
#[derive(Args, Debug)]
pub(crate) struct SetScheme {
    /// Scheme to convert to
    #[arg(value_enum)]
    scheme: SchemeName,
    #[command(flatten)]
    disks: Disks,
}

/// Delete all but the newest checkpoints; the current one always stays
#[derive(Args, Debug)]
pub(crate) struct Prune {
    #[command(flatten)]
    disks: Disks,
    /// How many stay
    #[arg(long, value_name = "N")]
    keep: usize,
}

impl SetScheme {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let scheme = Scheme::from(self.scheme);
        let open = self.disks.open(&Access::Change)?;
        open.domain.set_scheme(scheme)?;
        open.close()?;
        if out.is_json() {
            out.json(&json!({ "scheme": chain::scheme(scheme) }))?;
        } else {
            say!(out, "scheme: {}", chain::scheme(scheme))?;
        }
        Ok(Exit::Done)
    }
}

impl Prune {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let open = self.disks.open(&Access::Change)?;
        let deleted = open.domain.prune(self.keep)?;
        open.close()?;
        delete::answer(out, &deleted)
    }
}
