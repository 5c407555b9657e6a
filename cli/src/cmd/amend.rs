//! `amend`: other options for an image that exists.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tidemark_qcow2::Shrink;
use tidemark_qcow2::check::{self, Amend as Change};

use crate::creation::{self, Creation};
use crate::exit::{Exit, Failure, Outcome};
use crate::open::{self, Format, Gates};
use crate::out::{Out, say};

/// Options that can change; the others belong to the layout of an image.
const AMENDABLE: &[&str] = &[
    "compat",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];

/// Change options of an image that exists
#[derive(Args, Debug)]
pub(crate) struct Amend {
    #[command(flatten)]
    format: Format,
    /// Options to change, as in `create`; `help` lists them
    #[arg(short = 'o', value_name = "OPTS", required = true)]
    options: Vec<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gates: Gates,
    /// Image to change
    #[arg(value_name = "IMAGE")]
    image: Option<PathBuf>,
}

impl Amend {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        if creation::wants_help(&self.options) {
            say!(out, "{}", creation::help_of(AMENDABLE).trim_end())?;
            return Ok(Exit::Done);
        }
        let Some(path) = &self.image else {
            return Err(Failure::usage(
                "which image? write its name behind the options",
            ));
        };
        self.format.require_qcow2(path)?;
        let (change, size) = self.wanted()?;
        if let Some(size) = size {
            self.refuse_smaller(path, size)?;
        }
        let mut changed = check::amend(Box::new(open::writable(path)?), &change)?;
        if let Some(size) = size {
            let image = self.gates.write(path)?;
            changed |= image.size() != size;
            image.resize(size, Shrink::Refused)?;
            image.close()?;
        }
        if out.is_json() {
            let image = path.display().to_string();
            out.json(&json!({ "image": image, "changed": changed }))?;
        } else if !self.quiet {
            let what = if changed {
                "changed"
            } else {
                "nothing to change"
            };
            say!(out, "{}: {what}", path.display())?;
        }
        Ok(Exit::Done)
    }

    /// What is to be changed, and the new size of the disk.
    fn wanted(&self) -> Outcome<(Change, Option<u64>)> {
        let keys = creation::pairs(&self.options)?;
        for (key, value) in &keys {
            if AMENDABLE.contains(&key.as_str()) {
                continue;
            }
            // An option that does not exist is a mistake of another kind.
            if !creation::has_option(key) && !key.starts_with("encrypt.") {
                Creation::parse(&[format!("{key}={value}")])?;
            }
            let instead = match key.as_str() {
                "backing_file" | "backing_fmt" => "use `rebase`".to_owned(),
                _ => format!("`convert -O qcow2 -o {key}={value}` makes a copy that has it"),
            };
            return Err(Failure::unsupported(format!(
                "-o {key}={value}: cannot be changed in an image that exists; {instead}"
            )));
        }
        let given = |name| keys.iter().any(|(key, _)| key == name);
        let wanted = Creation::parse(&self.options)?;
        let options = &wanted.options;
        let change = Change {
            version: given("compat").then_some(options.version),
            lazy_refcounts: given("lazy_refcounts").then_some(options.lazy_refcounts),
            refcount_bits: given("refcount_bits").then_some(options.refcount_bits),
            data_file_raw: given("data_file_raw").then_some(wanted.data_file_raw),
        };
        Ok((change, wanted.size))
    }

    /// A disk does not lose its end by the way.
    fn refuse_smaller(&self, path: &std::path::Path, size: u64) -> Outcome<()> {
        let old = open::read_alone(path, open::Share::default())?.size();
        if size < old {
            return Err(Failure::new(format!(
                "{}: -o size={size}: less than the {old} bytes that the disk has; use `resize --shrink`",
                path.display()
            )));
        }
        Ok(())
    }
}
