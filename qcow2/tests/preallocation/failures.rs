//! Every call to the storage fails once while a disk grows with places.

use tidemark_fixtures::storage::{CallKind, CrashStorage, Errno, Fault, FaultyStorage};
use tidemark_qcow2::{CreateOptions, Image, Preallocation, Result};

use crate::MODES;
use crate::common::{add_bitmap, assert_covers, built, open_bytes, read_all, reading, writing};

const FROM: u64 = 300_032;
const TO: u64 = 700_416;

fn session(storage: FaultyStorage, mode: Preallocation) -> Result<()> {
    let image = Image::open(Box::new(storage), writing())?;
    image.grow(TO, mode)?;
    image.close()
}

#[test]
fn every_failed_call_surfaces_and_leaves_the_old_disk_or_the_new_one() {
    let mut runs = 0;
    for (mode, _) in MODES {
        for (cluster_bits, extended_l2, errno) in [
            (9, false, Errno::Io),
            (12, false, Errno::NoSpace),
            (16, false, Errno::Io),
            (14, true, Errno::NoSpace),
        ] {
            let options = CreateOptions {
                cluster_bits,
                extended_l2,
                ..CreateOptions::new(FROM)
            };
            let base = built(&options, |image| {
                image.write(&vec![0xaa; 100_000], 200_000).unwrap();
                add_bitmap(image, "b", 4096);
            });
            let old = read_all(&open_bytes(base.clone(), reading()).unwrap());
            for kinds in [
                &[CallKind::Read][..],
                &[CallKind::Write, CallKind::WriteZeroes],
                &[CallKind::Flush],
                &[CallKind::Len, CallKind::SetLen],
            ] {
                let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
                session(clean.clone(), mode).unwrap();
                let calls = clean.calls_of(kinds);
                let step = (calls / 40).max(1);
                for at in (0..calls).step_by(usize::try_from(step).unwrap()) {
                    let what = format!("2^{cluster_bits} {mode:?}, call {at} of {kinds:?}");
                    let below = CrashStorage::new(base.clone());
                    let storage = FaultyStorage::new(below.clone());
                    storage.arm(Fault::once(kinds, at).with_errno(errno));
                    let answer = session(storage.clone(), mode);
                    let full = matches!(errno, Errno::NoSpace);
                    let fine = answer.is_err() || full || storage.fired() == 0;
                    assert!(fine, "{what}: swallowed");
                    let image = open_bytes(below.to_bytes(), reading()).unwrap();
                    let report = image.check().unwrap();
                    let harm = (report.check_errors, report.corruptions);
                    assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
                    assert!([FROM, TO].contains(&image.size()), "{what}");
                    let content = read_all(&image);
                    assert!(content[..old.len()] == old, "{what}");
                    assert!(content[old.len()..].iter().all(|&byte| byte == 0), "{what}");
                    let bits = image.load_bitmap("b").unwrap();
                    assert_covers(&bits, &old, &content, &what);
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} faults");
    assert!(runs >= 300, "the sweep shrank: {runs}");
}
