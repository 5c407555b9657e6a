//! The check of 1 TiB whose every cluster has a place, in process and beside `qemu-img`:
//! `cargo bench -p tidemark-benches --bench check`. The image is sparse, 160 MiB of tables.

use std::path::{Path, PathBuf};
use std::process::Command;

use divan::Bencher;
use tempfile::TempDir;
use tidemark_qcow2::check::check;
use tidemark_qcow2::{FileStorage, Sharing};

fn main() {
    divan::main();
}

/// The image, or none without `qemu-img`, which makes it.
fn image() -> Option<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir().ok()?;
    let path = folder.path().join("disk.qcow2");
    let options = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
    ];
    let made = qemu_img(&options, &path, &["1T"]);
    made.then_some((folder, path))
}

fn qemu_img(before: &[&str], path: &Path, behind: &[&str]) -> bool {
    let mut command = Command::new("qemu-img");
    command.args(before).arg(path).args(behind);
    command.output().is_ok_and(|output| output.status.success())
}

#[divan::bench(sample_count = 10)]
fn check_1tib(bencher: Bencher<'_, '_>) {
    let Some((_folder, path)) = image() else {
        return;
    };
    bencher.bench_local(|| {
        let storage = FileStorage::open(&path, false, Sharing::Exclusive);
        let report = storage.map(|storage| check(Box::new(storage)));
        assert!(matches!(report, Ok(Ok(report)) if report.is_clean()));
    });
}

/// For comparison: QEMU's, a process of its own.
#[divan::bench(sample_count = 10)]
fn qemu_img_check_1tib(bencher: Bencher<'_, '_>) {
    let Some((_folder, path)) = image() else {
        return;
    };
    bencher.bench_local(|| assert!(qemu_img(&["check"], &path, &[])));
}
