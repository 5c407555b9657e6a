//! What every command has in common: exit codes, one-line failures, options anywhere.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::io::Read;
use std::process::{Command, Stdio};

use common::Place;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::require_qemu;

#[test]
fn mistakes_in_the_command_line_end_with_64_and_one_line() {
    let place = Place::new();
    place.ok("create disk 1M");
    for line in [
        "nonsense",
        "info",
        "info disk extra",
        "info --nonsense disk",
        "info --output yaml disk",
        "map disk --start-offset 1Z",
        "map disk --no-backing --allow-backing .",
        "check disk --repair everything",
        "check disk --repair all -U",
        "create disk 1X",
        "bitmap add disk",
        "bitmap merge disk dest",
        "checkpoint scheme both disk",
        "checkpoint prune disk",
        "backup disk",
        "backup --to b --format vmdk disk",
        "restore --to x",
        "completions",
        "completions tcsh-of-sorts",
    ] {
        let answer = place.run(line).ends_with(64);
        assert!(answer.stdout.is_empty(), "{line}: {}", answer.stdout);
    }
    for line in ["", "bitmap", "checkpoint"] {
        let answer = place.run(line);
        assert_eq!(answer.code, 64, "{line}");
        assert!(answer.stdout.is_empty());
    }
}

#[test]
fn what_is_no_qcow2_image_ends_with_63() {
    let place = Place::new();
    std::fs::write(
        place.path("text"),
        b"not an image, but long enough to be read",
    )
    .unwrap();
    std::fs::write(place.path("empty"), b"").unwrap();
    for command in ["info", "map", "check", "bitmap list", "checkpoint list"] {
        for name in ["text", "empty"] {
            place.run(&format!("{command} {name}")).ends_with(63);
        }
    }
    place.ok("create disk 1M");
    for command in ["info", "map", "check", "bitmap list"] {
        place.run(&format!("{command} -f raw disk")).ends_with(63);
    }
}

#[test]
fn files_that_cannot_be_opened_end_with_1() {
    let place = Place::new();
    std::fs::create_dir(place.path("directory")).unwrap();
    for command in ["info", "map", "check", "bitmap list", "checkpoint list"] {
        place.run(&format!("{command} missing")).ends_with(1);
        place.run(&format!("{command} directory")).ends_with(1);
    }
    place.run("create nowhere/disk 1M").ends_with(1);
}

#[test]
fn options_may_stand_before_or_after_positions() {
    let place = Place::new();
    place.ok("create 1M-is-a-name 1M");
    place.ok("create disk 1M");
    let expected = place.run("info disk --output json").ends_with(0).stdout;
    for line in [
        "--output json info disk",
        "info --output json disk",
        "info --output=json disk",
    ] {
        assert_eq!(place.ok(line), expected, "{line}");
    }
    place.ok("bitmap add disk -g 4K x");
    place.ok("bitmap --output json add --disabled disk y");
    place.ok("checkpoint create --metadata m a disk");
    place.ok("checkpoint create b --metadata m disk");
    place.ok("checkpoint create c disk --metadata m");
}

#[test]
fn help_and_version_go_to_stdout() {
    let place = Place::new();
    for line in [
        "--help",
        "help",
        "bitmap --help",
        "checkpoint create --help",
        "--version",
    ] {
        let answer = place.run(line).ends_with(0);
        assert!(!answer.stdout.is_empty());
        assert!(answer.stderr.is_empty());
    }
}

#[test]
fn completions_and_man_pages_are_generated() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            place
                .ok(&format!("completions {shell}"))
                .contains("checkpoint")
        );
    }
    place.ok("completions --man man");
    assert!(place.path("man/tidemark-checkpoint-create.1").exists());
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let place = Place::new();
    place.ok("create disk 64M -o cluster_size=512");
    place.ok("bitmap add disk b");
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidemark"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
}

#[test]
fn reading_leaves_every_byte_as_it_was() {
    let place = Place::new();
    place.ok("create disk 16M");
    place.ok("checkpoint create a disk");
    place.ok("checkpoint create b disk");
    let before = std::fs::read(place.path("disk")).unwrap();
    for line in [
        "info disk",
        "map disk",
        "check disk",
        "bitmap list --count disk",
        "bitmap dump disk a",
        "checkpoint list disk",
        "checkpoint show a --xml disk",
        "checkpoint verify disk",
        "checkpoint rebuild disk",
        "checkpoint export --to out disk",
        "backup --to backups --since a disk",
    ] {
        place.ok(line);
        assert_eq!(std::fs::read(place.path("disk")).unwrap(), before, "{line}");
    }
}

#[test]
fn an_image_that_is_held_is_refused_and_can_be_looked_at() {
    require_qemu!();
    let place = Place::new();
    place.ok("create disk 4M");
    place.ok("bitmap add disk b");
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&place.path("disk"));
    for line in [
        "info disk",
        "map disk",
        "bitmap add disk c",
        "checkpoint create a disk",
    ] {
        let answer = place.run(line).ends_with(1);
        assert!(
            answer.stderr.contains("holds its lock"),
            "{}",
            answer.stderr
        );
    }
    place.run("create disk 1M").ends_with(1);
    let answer = place.run("info -U disk --output json").ends_with(0);
    assert_eq!(answer.json()["tidemark"]["unsteady"], true);
    assert!(answer.stderr.contains("unsteady"));
    place.ok("map --force-share disk");
    place.ok("bitmap list -U disk");
    daemon.close(&node);
    daemon.quit();
}

#[test]
fn backing_files_are_opened_only_as_far_as_the_gate_lets_them_through() {
    let place = Place::new();
    std::fs::create_dir(place.path("in")).unwrap();
    place.ok("create base 4M");
    place.ok("create in/base 4M");
    place.ok("create -b base -F qcow2 top");
    place.ok("create -b in/base -F qcow2 inside");
    place.ok("map top");
    place.run("map --no-backing top").ends_with(1);
    place.run("map --allow-backing in top").ends_with(1);
    place.ok("map --allow-backing in inside");
    place.ok("info top");
    place.ok("bitmap list --output json top");
    std::fs::remove_file(place.path("base")).unwrap();
    place.run("map top").ends_with(1);
    place.ok("info top");
    place.ok("checkpoint create a top");
}
