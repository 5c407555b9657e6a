//! Room for QEMU's rewrite beside our record, and what happens without it.

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_qcow2::chain::Reading;
use tidemark_qcow2::{BackingReference, Below, Feature};

use crate::common::{self, granularity};
use crate::desk::*;
use crate::tear::*;

/// Whatever QEMU does to its header, our record is there afterwards, word for word.
pub(crate) fn qemu_works_on(desk: &Desk, cluster_bits: u32, name_len: usize, what: &str) {
    let record = desk.chain();
    assert!(matches!(record, Reading::Current(_)), "{what}: {record:?}");
    let check = |step: &str| {
        assert!(
            desk.chain() == record,
            "{what}: {step} lost the record: {:?}",
            desk.chain()
        );
    };
    qemu_io::commands(&desk.path, &["write -P 0x22 200k 9000"]);
    check("a guest write");
    let grown = backing_name((name_len + growth(cluster_bits, name_len)).max(4));
    qemu_img::rebase_unsafe(&desk.path, &grown, "raw");
    check("rebase to a longer name");
    qemu_img::ok(&["resize", "-q", "-f", "qcow2", desk.text(), "+1M"]);
    check("resize");
    qemu_img::bitmap_add(&desk.path, "foreign", None);
    check("adding a bitmap");
    qemu_img::bitmap_remove(&desk.path, "foreign");
    check("removing a bitmap");
}

/// Our next session and our next structural change work after QEMU's rewrite.
pub(crate) fn we_work_on(desk: &Desk, what: &str) {
    let image = desk.open();
    image.write(&[0x33; 5000], 400_000).unwrap();
    image
        .close()
        .unwrap_or_else(|error| panic!("{what}: close after a guest write: {error}"));
    let Reading::Current(before) = desk.chain() else {
        panic!("{what}: our guest write lost the record");
    };
    let image = desk.open();
    image
        .update(|update| {
            let bits = update.blank(granularity(65536))?;
            update.put("ours", bits, true)
        })
        .unwrap_or_else(|error| panic!("{what}: update: {error}"));
    image.close().unwrap();
    let Reading::Current(after) = desk.chain() else {
        panic!("{what}: our update lost the record");
    };
    assert_eq!(after.current, before.current, "{what}");
    assert_eq!(after.checkpoints.len(), before.checkpoints.len(), "{what}");
    qemu_img::check(&desk.path).assert_clean();
    qemu_io::commands(&desk.path, &["write -P 0x44 600k 9000"]);
    qemu_img::check(&desk.path).assert_clean();
    assert_eq!(
        desk.chain(),
        Reading::Current(after),
        "{what}: QEMU's second rewrite"
    );
    let image = desk.open();
    for info in image.bitmaps().unwrap() {
        assert!(info.auto && !info.in_use, "{what}: {}", info.name);
        assert!(
            image.load_bitmap(&info.name).unwrap().test(600 << 10),
            "{what}: {}",
            info.name
        );
    }
}

#[test]
pub(crate) fn qemu_has_room_for_its_header_beside_our_record() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let (mut cases, mut without) = (0, Vec::new());
    for cluster_bits in 9..=21 {
        for name_len in [0, 8, 1000] {
            // One name is enough where there is plenty of room.
            if name_len != 8 && matches!(cluster_bits, 14 | 15 | 17..=20) {
                continue;
            }
            let Some(bytes) = fresh(cluster_bits, name_len) else {
                continue;
            };
            let most = most(&bytes);
            println!("clusters 2^{cluster_bits}, name of {name_len}: {most} checkpoints fit");
            if most == 0 {
                without.push((cluster_bits, name_len));
                continue;
            }
            let mut counts = vec![most];
            if matches!(cluster_bits, 11 | 12 | 16) {
                counts.extend([1, 3].into_iter().filter(|&count| count < most));
            }
            for count in counts {
                let what = format!("clusters 2^{cluster_bits}, name of {name_len}, {count}");
                let desk = Desk::put(&bytes);
                let image = desk.open();
                publish(&image, count).unwrap();
                image.close().unwrap();
                qemu_works_on(&desk, cluster_bits, name_len, &what);
                we_work_on(&desk, &what);
                cases += 1;
            }
        }
    }
    println!("{cases} headers, no room for a record in {without:?}");
}

/// Where a name grew beyond what is kept for it, the record stays, recording goes on, and a change
/// is refused before the first byte.
#[test]
pub(crate) fn a_name_longer_than_promised_stops_changes_and_nothing_else() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let mut cases = 0;
    for (cluster_bits, name_len) in [(11, 700), (12, 1023), (10, 400), (9, 180)] {
        let bytes = fresh(cluster_bits, 8).unwrap();
        let desk = Desk::put(&bytes);
        let image = desk.open();
        publish(&image, most(&bytes)).unwrap();
        image.close().unwrap();
        let record = desk.chain();
        let name = backing_name(name_len);
        let path = desk.text();
        let rebase = [
            "rebase", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", path,
        ];
        if !qemu_img::run(&rebase).success() {
            println!("2^{cluster_bits}: QEMU itself has no room for {name_len} bytes");
            assert_eq!(desk.chain(), record, "a refused rebase");
            continue;
        }
        assert_eq!(desk.chain(), record);
        let image = desk.open();
        image.write(&[0x66; 700], 300_000).unwrap();
        image.close().unwrap();
        assert_eq!(desk.chain(), record, "2^{cluster_bits}: a guest write");
        let before = desk.bytes();
        let image = desk.open();
        assert!(
            image.load_bitmap("b").unwrap().test(300_000),
            "recording ended"
        );
        let error = grow_record(&image).unwrap_err();
        assert!(
            matches!(error.feature(), Some(Feature::NoRoomInFirstCluster { .. })),
            "2^{cluster_bits}: {error}"
        );
        image.close().unwrap();
        assert!(
            desk.bytes() == before,
            "something was written before the refusal"
        );
        qemu_img::check(&desk.path).assert_clean();
        // A shorter name brings the room back.
        qemu_img::rebase_unsafe(&desk.path, "base", "raw");
        let image = desk.open();
        change_record(&image).unwrap();
        image.close().unwrap();
        assert!(matches!(desk.chain(), Reading::Current(_)));
        qemu_img::check(&desk.path).assert_clean();
        cases += 1;
    }
    println!("{cases} names too long");
}

/// Without room for a record the image still records, for both.
#[test]
pub(crate) fn an_image_without_room_for_a_record_still_records() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let bytes = fresh(9, 150).unwrap();
    assert_eq!(most(&bytes), 0);
    let desk = Desk::put(&bytes);
    let image = desk.open();
    image.write(&[1; 100], 900_000).unwrap();
    image.close().unwrap();
    qemu_img::check(&desk.path).assert_clean();
    let image = desk.open();
    assert!(image.load_bitmap("b").unwrap().test(900_000));
}

/// Another backing name that does not fit beside record, bitmaps and extensions of others.
#[test]
pub(crate) fn a_backing_name_without_room_is_refused_before_the_first_byte() {
    let _turn = common::alone();
    let (mut refused, mut fitted) = (0, 0);
    for cluster_bits in [9, 10, 11, 12, 16] {
        let Some(bytes) = fresh(cluster_bits, 8) else {
            continue;
        };
        let desk = Desk::put(&bytes);
        let image = desk.open();
        publish(&image, most(&bytes)).unwrap();
        image.close().unwrap();
        let before = desk.bytes();
        let record = desk.chain();
        for name_len in [30, 200, 500, 1023] {
            for below in [Below::Same, Below::Unknown] {
                std::fs::write(&desk.path, &before).unwrap();
                let name = backing_name(name_len).into_bytes();
                let reference = BackingReference {
                    name,
                    format: "raw".to_owned(),
                };
                match desk.open().set_backing(Some(&reference), below) {
                    Ok(()) => {
                        assert_eq!(desk.open().backing(), Some(reference));
                        assert!(matches!(desk.chain(), Reading::Current(_)));
                        assert_eq!(desk.open().check().unwrap().exit_code(), 0);
                        fitted += 1;
                    }
                    Err(error) => {
                        let feature = error.feature();
                        let room = matches!(feature, Some(Feature::NoRoomInFirstCluster { .. }));
                        assert!(room, "2^{cluster_bits}, {name_len}: {error}");
                        assert!(desk.bytes() == before, "something was written");
                        assert_eq!(desk.chain(), record);
                        refused += 1;
                    }
                }
            }
        }
    }
    println!("{refused} names refused, {fitted} fitted");
    assert!(refused >= 8 && fitted >= 8, "{refused}, {fitted}");
}
