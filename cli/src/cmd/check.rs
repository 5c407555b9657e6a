//! `check`: keys and exit codes of `qemu-img check`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use tidemark_qcow2::Image;
use tidemark_qcow2::check::{self, RepairReport, Severity};

use crate::exit::{Exit, Outcome};
use crate::open::{Format, Share, writable};
use crate::out::{Out, say, warn};

/// Check an image for damage and leaked clusters
#[derive(Args, Debug)]
pub(crate) struct Check {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    share: Share,
    /// Mend what can be mended: leaked clusters only, or everything
    #[arg(
        short,
        long,
        value_enum,
        value_name = "WHAT",
        conflicts_with = "force_share"
    )]
    repair: Option<Repair>,
    /// Image to check; its backing file is not looked at
    image: PathBuf,
}

/// What is mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Repair {
    /// Clusters that nobody uses are freed
    Leaks,
    /// Refcounts and flags are corrected too
    All,
}

impl Check {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        self.format.require_qcow2(&self.image)?;
        let repaired = match self.repair {
            Some(what) => self.repair(what)?,
            None => self.look()?,
        };
        let report = &repaired.check;
        for loss in &repaired.losses {
            warn(format_args!("lost: {loss}"));
        }
        for finding in &report.findings {
            warn(format_args!("{}: {finding}", label(finding.severity())));
        }
        if report.omitted_findings > 0 {
            warn(format_args!(
                "{} further findings are not shown",
                report.omitted_findings
            ));
        }
        if out.is_json() {
            out.json(&self.to_json(&repaired))?;
        } else {
            print(out, &repaired)?;
        }
        Ok(match report.exit_code() {
            0 => Exit::Done,
            2 => Exit::Damage,
            3 => Exit::Leaks,
            _ => Exit::Failed,
        })
    }

    /// The image as it is, in the shape of a repair that did nothing.
    fn look(&self) -> Outcome<RepairReport> {
        let storage = self.share.storage(&self.image)?;
        Ok(RepairReport {
            check: Image::open_unbacked(Box::new(storage), false)?.check()?,
            leaks_fixed: 0,
            corruptions_fixed: 0,
            losses: Vec::new(),
        })
    }

    fn repair(&self, what: Repair) -> Outcome<RepairReport> {
        let what = match what {
            Repair::Leaks => check::Repair::Leaks,
            Repair::All => check::Repair::All,
        };
        Ok(check::repair(Box::new(writable(&self.image)?), what)?)
    }

    fn to_json(&self, repaired: &RepairReport) -> Value {
        let report = &repaired.check;
        let mut answer = Map::new();
        let mut number = |key: &str, value: u64, always: bool| {
            if always || value != 0 {
                answer.insert(key.to_owned(), value.into());
            }
        };
        number("image-end-offset", report.image_end_offset, false);
        number("total-clusters", report.total_clusters, false);
        number("check-errors", report.check_errors, true);
        number("corruptions", report.corruptions, false);
        number("leaks", report.leaks, false);
        number("corruptions-fixed", repaired.corruptions_fixed, false);
        number("leaks-fixed", repaired.leaks_fixed, false);
        number("allocated-clusters", report.allocated_clusters, false);
        number("fragmented-clusters", report.fragmented_clusters, false);
        number("compressed-clusters", report.compressed_clusters, false);
        answer.insert("filename".into(), json!(self.image.display().to_string()));
        answer.insert("format".into(), json!("qcow2"));
        let findings = report.findings.iter().map(
            |finding| json!({ "severity": label(finding.severity()), "text": finding.to_string() }),
        );
        let ours = json!({
            "unsteady": self.share.is_held(&self.image),
            "warnings": report.warnings,
            "findings": findings.collect::<Vec<_>>(),
            "omitted-findings": report.omitted_findings,
            "losses": repaired.losses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        });
        answer.insert("tidemark".into(), ours);
        Value::Object(answer)
    }
}

fn label(severity: Severity) -> &'static str {
    match severity {
        Severity::Warning => "warning",
        Severity::Leak => "leak",
        Severity::Corruption => "corruption",
        Severity::CheckError => "error",
    }
}

fn print(out: &mut Out, repaired: &RepairReport) -> Outcome<()> {
    let report = &repaired.check;
    for (count, what) in [
        (repaired.corruptions_fixed, "errors were repaired."),
        (repaired.leaks_fixed, "leaked clusters were freed."),
    ] {
        if count > 0 {
            say!(out, "{count} {what}")?;
        }
    }
    if report.is_clean() {
        say!(out, "No errors were found on the image.")?;
    }
    for (count, what) in [
        (
            report.corruptions,
            "errors were found on the image: data may be damaged or lost by use.",
        ),
        (
            report.leaks,
            "leaked clusters were found: they waste space and harm nothing.",
        ),
        (report.check_errors, "things could not be checked."),
        (report.warnings, "warnings."),
    ] {
        if count > 0 {
            say!(out, "{count} {what}")?;
        }
    }
    let allocated = report.allocated_clusters;
    say!(
        out,
        "{allocated}/{} = {} allocated, {} fragmented, {} compressed clusters",
        report.total_clusters,
        percent(allocated, report.total_clusters),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated)
    )?;
    say!(out, "Image end offset: {}", report.image_end_offset)
}

fn percent(part: u64, whole: u64) -> String {
    let hundredths = u128::from(part) * 10_000 / u128::from(whole.max(1));
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}
