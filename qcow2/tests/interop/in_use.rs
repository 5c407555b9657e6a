//! Bitmaps that a writer held when it died.

use tidemark_fixtures::image_bits;
use tidemark_fixtures::oracle::daemon::QemuStorageDaemon;
use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::{BitmapInfo, Error, Image, Mistake};

use super::common::{add_bitmap, granularity};
use super::{Desk, assert_records};

const SIZE: u64 = 8 << 20;

/// An image whose daemon was killed while it recorded into `live` and held `frozen`.
fn killed(cluster: &str) -> Desk {
    let desk = Desk::new();
    qemu_img::create(&desk.path, SIZE, &[("cluster_size", cluster)]);
    for name in ["live", "frozen"] {
        qemu_img::bitmap_add(&desk.path, name, Some(65536));
    }
    tidemark_fixtures::oracle::qemu_io::commands(&desk.path, &["write -P 5 0 300k"]);
    qemu_img::bitmap_disable(&desk.path, "frozen");
    let mut daemon = QemuStorageDaemon::spawn();
    let node = daemon.open_image(&desk.path);
    daemon.guest(&node, &["write -P 6 4M 64k", "flush"]);
    daemon.kill_dash_nine();
    desk
}

fn info(image: &Image, name: &str) -> BitmapInfo {
    image
        .bitmaps()
        .unwrap()
        .into_iter()
        .find(|info| info.name == name)
        .unwrap()
}

fn is_inconsistent(error: &Error) -> bool {
    matches!(error.mistake(), Some(Mistake::BitmapInconsistent(_)))
}

#[test]
fn bitmaps_of_a_killed_writer_are_listed_and_never_read() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for cluster in ["512", "4096", "65536", "2097152"] {
        let desk = killed(cluster);
        let before = desk.bytes();
        desk.look(|image| {
            for name in ["live", "frozen"] {
                assert!(info(image, name).in_use, "{name}");
                assert!(
                    is_inconsistent(&image.load_bitmap(name).unwrap_err()),
                    "{name}"
                );
            }
        });
        desk.session(|image| {
            image
                .update::<_, Error>(|update| {
                    assert!(is_inconsistent(&update.load("live").unwrap_err()));
                    assert!(is_inconsistent(
                        &update.set_recording("live", false).unwrap_err()
                    ));
                    Ok(())
                })
                .unwrap();
        });
        assert!(desk.bytes() == before, "looking changed a byte");
    }
}

#[test]
fn inconsistent_is_never_healed_by_a_clean_close() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    let mut sessions = 0;
    for cluster in ["512", "4096", "65536", "2097152"] {
        let desk = killed(cluster);
        let mut model = qemu_img::convert_to_raw(&desk.path);
        desk.session(|image| add_bitmap(image, "fresh", 65536));
        let base = model.clone();
        let then = image_bits::bitmaps(&desk.bytes()).unwrap();
        for round in 0..3_u8 {
            desk.session(|image| {
                let offset = 200_000 * usize::from(round + 1);
                image
                    .write(&vec![round + 1; 90_000], offset.try_into().unwrap())
                    .unwrap();
                model[offset..offset + 90_000].fill(round + 1);
            });
            desk.session(|image| {
                image
                    .update(|update| {
                        update.set_recording("fresh", false)?;
                        update.set_recording("fresh", true)
                    })
                    .unwrap()
            });
            qemu_img::check(&desk.path).assert_at_worst_leaks();
            let bytes = desk.bytes();
            for old in then.iter().filter(|old| old.in_use) {
                let name = std::str::from_utf8(&old.name).unwrap();
                let now = image_bits::bitmap(&bytes, name).unwrap().unwrap();
                assert_eq!(&now, old, "round {round}: {name} is not as it was");
            }
            assert_records(&desk, "fresh", &base, &model, &format!("round {round}"));
            sessions += 1;
        }
        // QEMU agrees with every word.
        let listed = qemu_img::info(&desk.path);
        for bitmap in listed["format-specific"]["data"]["bitmaps"]
            .as_array()
            .unwrap()
        {
            let broken = bitmap["flags"]
                .as_array()
                .unwrap()
                .contains(&"in-use".into());
            assert_eq!(broken, bitmap["name"] != "fresh", "{bitmap}");
        }
    }
    println!("{sessions} sessions over inconsistent bitmaps");
}

#[test]
fn an_inconsistent_bitmap_can_be_removed_and_taken_anew() {
    tidemark_fixtures::require_qemu!();
    let _turn = super::common::alone();
    for cluster in ["512", "4096", "65536", "2097152"] {
        let desk = killed(cluster);
        desk.session(|image| image.update(|update| update.remove("live")).unwrap());
        desk.assert_clean();
        assert_eq!(desk.look(|image| image.bitmaps().unwrap().len()), 1);
        desk.session(|image| {
            image
                .update(|update| {
                    update.remove("frozen")?;
                    let bits = update.blank(granularity(4096))?;
                    update.put("live", bits, true)
                })
                .unwrap();
            image.write(&[8; 3000], 5 << 20).unwrap();
        });
        desk.assert_clean();
        desk.look(|image| {
            let bits = image.load_bitmap("live").unwrap();
            assert_eq!(bits.dirty_bytes(), 4096);
            assert!(bits.test(5 << 20));
        });
    }
}
