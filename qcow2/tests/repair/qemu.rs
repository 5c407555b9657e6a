//! Both tools repair copies of one damaged image; QEMU judges ours.

use std::path::Path;

use tidemark_fixtures::oracle::qemu_img::{self, CheckResult};
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::check::Repair;

use crate::corpus::{DAMAGES, WIDE_DAMAGES, damaged, healthy};
use crate::{checked, content, repaired};

fn badness(result: &CheckResult) -> u8 {
    match result.exit {
        0 => 0,
        3 => 1,
        2 => 2,
        _ => 3,
    }
}

fn complaints(name: &str, bytes: &[u8], what: Repair, folder: &Path) -> Option<String> {
    let word = match what {
        Repair::Leaks => "leaks",
        Repair::All => "all",
    };
    let theirs = folder.join("theirs.qcow2");
    std::fs::write(&theirs, bytes).unwrap();
    // QEMU looks for that block for minutes.
    let far = name.ends_with("refcount block past the end");
    let (qemu, theirs_after) = if far {
        let none = || qemu_img::check(Path::new("/nonexistent"));
        (none(), none())
    } else {
        (qemu_img::repair(&theirs, word), qemu_img::check(&theirs))
    };
    let (report, after) = repaired(bytes, what);
    let ours = folder.join("ours.qcow2");
    std::fs::write(&ours, &after).unwrap();
    let ours_after = qemu_img::check(&ours);
    let (fixed, exit) = match &report {
        Ok(report) => (
            [report.leaks_fixed, report.corruptions_fixed],
            i32::from(report.check.exit_code()),
        ),
        Err(_) => ([0, 0], 1),
    };
    let qemu_fixed = [qemu.count("leaks-fixed"), qemu.count("corruptions-fixed")];
    let mut problems = Vec::new();
    // A repair that QEMU gives up has rewritten all bitmaps all the same.
    let rewrote = what == Repair::Leaks && (qemu.exit == 1 || name.contains("bitmap page past"));
    if badness(&ours_after) > badness(&theirs_after) && !rewrote {
        problems.push(format!(
            "QEMU finds ours worse: {} against {}: {}",
            ours_after.exit, theirs_after.exit, ours_after.stderr
        ));
    }
    if content(bytes) != content(&after) {
        problems.push("the guest's content changed".to_owned());
    }
    // QEMU does not see that metadata and data share a cluster once the count agrees.
    let overlap = name.contains("data on the L1 table");
    if report.is_ok() && !overlap && crate::badness(&checked(&after)) > badness(&ours_after) {
        problems.push(format!("we find ours worse: {:?}", checked(&after)));
    }
    println!(
        "{name} -r {word}: ours {fixed:?} exit {exit}, QEMU {qemu_fixed:?} exit {} then {}{}",
        qemu.exit,
        theirs_after.exit,
        match (&report, fixed == qemu_fixed && exit == qemu.exit) {
            (_, true) => String::new(),
            (report, false) => format!(" DIFFERS {:?}", report.as_ref().err()),
        }
    );
    (!problems.is_empty()).then(|| format!("{name} -r {word}: {}\n{report:?}", problems.join("; ")))
}

#[test]
fn a_repaired_image_is_as_clean_as_when_qemu_repairs_it() {
    require_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let (mut count, mut wrong) = (0, Vec::new());
    for (cluster_bits, order) in [(9, 4), (12, 0), (16, 4), (16, 6)] {
        let name = format!("clusters of 2^{cluster_bits}, refcount order {order}");
        let builder = healthy(cluster_bits, order);
        let mut images = damaged(&builder, &name, DAMAGES);
        if order > 0 {
            images.extend(damaged(&builder, &name, WIDE_DAMAGES));
        }
        for (name, bytes) in images {
            for what in [Repair::Leaks, Repair::All] {
                count += 1;
                wrong.extend(complaints(&name, &bytes, what, folder.path()));
            }
        }
    }
    println!("{count} repairs beside QEMU's");
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= 250, "only {count} repairs");
}
