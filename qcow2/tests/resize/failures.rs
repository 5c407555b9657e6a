//! Every call to the storage fails once while the size changes: the error surfaces, and the disk has
//! the old size or the new one.

use tidemark_fixtures::storage::{CallKind, CrashStorage, Errno, Fault, FaultyStorage};
use tidemark_qcow2::{CreateOptions, Image, Result, Shrink};

use crate::common::{add_bitmap, assert_covers, built, open_bytes, read_all, reading, writing};

fn session(storage: FaultyStorage, sizes: &[u64]) -> Result<()> {
    let image = Image::open(Box::new(storage), writing())?;
    for &size in sizes {
        image.write(&[3; 2000], 1000)?;
        image.resize(size, Shrink::Allowed)?;
    }
    image.close()
}

fn sweep(cluster_bits: u32, sizes: &[u64], shape: impl Fn(Fault) -> Fault) -> usize {
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(sizes[0])
    };
    let base = built(&options, |image| {
        image.write(&vec![0xaa; 150_000], 10_000).unwrap();
        image.write(&vec![0xbb; 60_000], sizes[0] - 60_000).unwrap();
        add_bitmap(image, "recording", 4096);
    });
    let start = read_all(&open_bytes(base.clone(), reading()).unwrap());
    let mut runs = 0;
    for kinds in [
        &[CallKind::Read][..],
        &[CallKind::Write],
        &[CallKind::Flush],
        &[CallKind::Len, CallKind::SetLen],
    ] {
        let clean = FaultyStorage::new(CrashStorage::new(base.clone()));
        session(clean.clone(), &sizes[1..]).unwrap();
        for at in 0..clean.calls_of(kinds) {
            let below = CrashStorage::new(base.clone());
            let storage = FaultyStorage::new(below.clone());
            let fault = shape(Fault::once(kinds, at));
            let full = matches!(fault.errno, Errno::NoSpace);
            storage.arm(fault);
            let what = format!("clusters 2^{cluster_bits}, call {at} of {kinds:?}");
            let answer = session(storage.clone(), &sizes[1..]);
            assert!(
                answer.is_err() || full || storage.fired() == 0,
                "{what}: swallowed"
            );
            let image = open_bytes(below.to_bytes(), reading())
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = image.check().unwrap();
            let harm = (report.check_errors, report.corruptions);
            assert_eq!(harm, (0, 0), "{what}: {:?}", report.findings);
            assert!(sizes.contains(&image.size()), "{what}");
            let content = read_all(&image);
            let bits = image
                .load_bitmap("recording")
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_covers(&bits, &start, &content, &what);
            let kept = start.len().min(content.len());
            assert!(
                content[3000..kept]
                    .iter()
                    .zip(&start[3000..kept])
                    .all(|(a, b)| a == b || *a == 0)
            );
            runs += 1;
        }
    }
    runs
}

#[test]
fn every_failed_call_surfaces_and_leaves_the_old_disk_or_the_new_one() {
    let mut runs = 0;
    for (cluster_bits, sizes) in [
        (16, [1 << 20, 3 << 20, 700_416]),
        (9, [400_384, 1 << 20, 200_192]),
    ] {
        runs += sweep(cluster_bits, &sizes, |fault| fault);
        runs += sweep(cluster_bits, &sizes, |fault| {
            fault.with_errno(Errno::NoSpace)
        });
    }
    println!("{runs} faults");
    assert!(runs >= 200, "the sweep shrank: {runs}");
}
