//! x
use tidemark_fixtures::golden;
use tidemark_fixtures::hostile::hostile_images;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::{MemoryStorage, check::check};
#[test]
fn explore() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut all: Vec<(String, Vec<u8>)> = golden::names()
        .map(|n| (format!("golden {n}"), golden::load(n)))
        .collect();
    all.extend(
        hostile_images()
            .into_iter()
            .filter(|i| !i.name.starts_with("header trunc"))
            .map(|i| (format!("{:?}: {}", i.category, i.name), i.bytes)),
    );
    let (mut same, mut n) = (0, 0);
    for (name, bytes) in all {
        n += 1;
        std::fs::write(&path, &bytes).unwrap();
        let q = qemu_img::check(&path);
        let t = std::time::Instant::now();
        let ours = check(Box::new(MemoryStorage::from_bytes(bytes)));
        let dt = t.elapsed();
        if dt.as_millis() > 200 {
            println!("SLOW {name} {dt:?}");
        }
        let qs = (
            q.exit,
            q.count("corruptions"),
            q.count("leaks"),
            q.count("allocated-clusters"),
            q.count("total-clusters"),
            q.count("compressed-clusters"),
            q.count("fragmented-clusters"),
            q.count("image-end-offset"),
        );
        match ours {
            Ok(r) => {
                let os = (
                    i32::from(r.exit_code()),
                    r.corruptions,
                    r.leaks,
                    r.allocated_clusters,
                    r.total_clusters,
                    r.compressed_clusters,
                    r.fragmented_clusters,
                    r.image_end_offset,
                );
                if os == qs {
                    same += 1;
                    continue;
                }
                if q.json.is_null() && os.0 == 1 {
                    same += 1;
                    continue;
                }
                println!(
                    "DIFF {name}\n   q {qs:?} {}\n   o {os:?} {:?}",
                    q.stderr.lines().take(4).collect::<Vec<_>>().join(" | "),
                    r.findings
                        .iter()
                        .take(4)
                        .map(|f| f.to_string())
                        .collect::<Vec<_>>()
                );
            }
            Err(e) => {
                if q.exit == 1 && q.json.is_null() {
                    same += 1;
                } else {
                    println!(
                        "DIFF {name}\n   q {qs:?} {}\n   o ERR {e}",
                        q.stderr.lines().take(3).collect::<Vec<_>>().join(" | ")
                    );
                }
            }
        }
    }
    println!("{same} of {n} same");
}
