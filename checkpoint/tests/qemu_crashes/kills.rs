//! Real processes, killed with signal 9 whenever it happens to be.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use tidemark_checkpoint::Outcome;
use tidemark_fixtures::random::Random;

use super::{Chain, Desk, alone, daemon};

const KILLS: u64 = 24;

/// `qemu-io` opens, writes and closes; a few milliseconds in all.
#[test]
fn frozen_bitmaps_survive_qemu_killed_at_any_moment() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let chain = Chain::new(16);
    let (mut rewritten, mut intact) = (0, 0);
    for number in 0..KILLS {
        let mut random = Random::stream(21, number);
        let desk = Desk::new(&chain.bytes);
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 9 100k 20k", "-c", "flush"])
            .args([
                "-c",
                "sleep 30",
                "-c",
                "write -P 8 700k 100k",
                "-c",
                "flush",
            ])
            .arg(&desk.image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(random.within(6_000..70_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let what = format!("kill {number}");
        let outcomes = chain.judge(desk.bytes(), Some(&desk.image), &what);
        for outcome in outcomes {
            match outcome {
                Outcome::Rewritten => rewritten += 1,
                Outcome::Intact => intact += 1,
                Outcome::Anchored | Outcome::Restarted | Outcome::Lost => {
                    panic!("{what}: a frozen bitmap is lost")
                }
            }
        }
    }
    println!("{KILLS} kills: {rewritten} bitmaps rewritten, {intact} intact");
    assert_eq!(rewritten + intact, KILLS * 3);
}

/// A storage daemon that runs while checkpoints are not ours to take, killed between guest writes.
#[test]
fn frozen_bitmaps_survive_a_killed_storage_daemon() {
    tidemark_fixtures::require_qemu!();
    let _turn = alone();
    let mut cases = 0;
    for cluster_bits in [12, 14, 16, 21] {
        let chain = Chain::new(cluster_bits);
        for writes in [0, 1, 4] {
            let desk = Desk::new(&chain.bytes);
            let mut daemon = daemon();
            let node = daemon.open_image(&desk.image);
            for step in 0..writes {
                daemon.guest(
                    &node,
                    &[&format!("write -P 3 {}k 30k", step * 200), "flush"],
                );
            }
            daemon.kill_dash_nine();
            let what = format!("clusters 2^{cluster_bits}, {writes} writes");
            let outcomes = chain.judge(desk.bytes(), Some(&desk.image), &what);
            assert_eq!(outcomes, [Outcome::Rewritten; 3], "{what}");
            cases += 1;
        }
    }
    println!("{cases} killed daemons");
    assert_eq!(cases, 12);
}
