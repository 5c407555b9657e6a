//! Every tear of a header write leaves the old or the new header.

use std::collections::BTreeMap;

use tidemark_fixtures::oracle::{qemu_img, qemu_io};
use tidemark_fixtures::random::Random;
use tidemark_qcow2::chain::{ChainRecord, Identity, ImageUuid, Scheme};
use tidemark_qcow2::{BackingReference, Below, Error, Feature, Image};

use crate::common::{self, granularity};
use crate::desk::*;
use crate::view::*;
use crate::walk::BACKING_FORMAT;

/// What one structural change does.
pub(crate) type Change = fn(&Image) -> Result<(), Error>;

/// Tears every header write of `change` on `bytes`; returns writes, images, and images that QEMU
/// judged.
pub(crate) fn tear(
    bytes: &[u8],
    change: impl FnOnce(Image) -> Result<(), Error>,
    sample: usize,
    what: &str,
) -> (usize, usize, usize) {
    let storage = Watched::new(bytes);
    let image = Image::open_unbacked(Box::new(storage.clone()), true).unwrap();
    match change(image) {
        Ok(()) => {}
        Err(Error::Unsupported {
            feature: Feature::NoRoomInFirstCluster { .. },
            ..
        }) => {
            return (0, 0, 0);
        }
        Err(error) => panic!("{what}: {error}"),
    }
    let (after, writes) = storage.with(|state| state.clone());
    let (old, new) = (View::of(bytes).unwrap(), View::of(&after).unwrap());
    assert_ne!(old, new, "{what}: nothing changed");
    assert_eq!(
        others(&old),
        others(&new),
        "{what}: parts of others changed"
    );
    let (mut images, mut judged) = (0, 0);
    for (step, write) in writes.iter().enumerate() {
        for torn in write.tears() {
            let what = format!("{what}, write {step} of {}, image {images}", writes.len());
            let view = View::of(&torn).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(
                view == old || view == new,
                "{what}: {view:#?}\nold {old:#?}\nnew {new:#?}"
            );
            if images % sample == 0 {
                judge(&torn, &view, &what);
                judged += 1;
            }
            images += 1;
        }
    }
    (writes.len(), images, judged)
}

/// Extensions of others but for the backing format, which goes with the backing name.
fn others(view: &View) -> BTreeMap<u32, Vec<u8>> {
    let mut parts = view.foreign.0.clone();
    parts.remove(&BACKING_FORMAT);
    parts
}

/// QEMU opens a torn image, shows the same bitmaps, and finds at worst leaks; we can go on.
pub(crate) fn judge(torn: &[u8], view: &View, what: &str) {
    let desk = Desk::put(torn);
    let info = qemu_img::info(&desk.path);
    let listed = info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .map_or(0, Vec::len);
    assert_eq!(listed, view.bitmaps.len(), "{what}: {info}");
    qemu_img::check(&desk.path).assert_at_worst_leaks();
    let image = unbacked(torn);
    common::add_bitmap(&image, "after the crash", 65536);
    assert_eq!(
        image.bitmaps().unwrap().len(),
        view.bitmaps.len() + 1,
        "{what}"
    );
}

pub(crate) fn change_bitmaps(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut bits = update.blank(granularity(4096))?;
        bits.mark(0..SIZE / 3).unwrap();
        update.put("second", bits, false)
    })
}

pub(crate) fn change_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update
            .record()
            .cloned()
            .unwrap_or_else(|| ChainRecord::new(ImageUuid([1; 16]), Scheme::Cumulative));
        record.decisions.push(Identity([7; 16]));
        update.set_record(Some(record));
        Ok(())
    })
}

/// More than is kept free for us in any cluster of 4 KiB or less.
pub(crate) fn grow_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update.record().cloned().unwrap();
        record.decisions = vec![Identity([7; 16]); 60];
        update.set_record(Some(record));
        Ok(())
    })
}

pub(crate) fn change_both(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let bits = update.blank(granularity(512))?;
        update.put("third", bits, true)?;
        let count = update.record().map_or(0, |record| record.checkpoints.len());
        let record = record_of(count + 1, update.image(), &mut Random::new(4));
        update.set_record(Some(record));
        Ok(())
    })
}

/// The same number of bytes, so that it finds room wherever the old record had it.
pub(crate) fn turn_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        let mut record = update.record().cloned().unwrap_or_else(|| {
            let mut record = ChainRecord::new(ImageUuid([1; 16]), Scheme::Cumulative);
            record.current = Some(Identity([1; 16]));
            record
        });
        record.image.0.reverse();
        update.set_record(Some(record));
        Ok(())
    })
}

pub(crate) fn drop_record(image: &Image) -> Result<(), Error> {
    image.update(|update| {
        update.set_record(None);
        update.remove("b")
    })
}

/// As many checkpoints as fit.
pub(crate) const MOST: usize = usize::MAX;

/// The same image as we lay it out, and as QEMU does.
pub(crate) fn layouts(
    cluster_bits: u32,
    name_len: usize,
    checkpoints: usize,
) -> Vec<(&'static str, Vec<u8>)> {
    let Some(bytes) = fresh(cluster_bits, name_len) else {
        return Vec::new();
    };
    let desk = Desk::put(&bytes);
    if checkpoints > 0 {
        let image = desk.open();
        let count = if checkpoints == MOST {
            most(&bytes).min(400)
        } else {
            checkpoints
        };
        if publish(&image, count).is_err() {
            return Vec::new();
        }
        image.close().unwrap();
    }
    let ours = desk.bytes();
    qemu_io::commands(&desk.path, &["write -P 0x22 200k 100"]);
    vec![("ours", ours), ("QEMU's", desk.bytes())]
}

#[test]
pub(crate) fn every_tear_of_a_header_write_leaves_the_old_or_the_new_header() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let changes: [(&str, Change); 5] = [
        ("bitmaps", change_bitmaps),
        ("record", change_record),
        ("both", change_both),
        ("turn", turn_record),
        ("drop", drop_record),
    ];
    let mut total = (0, 0, 0);
    for cluster_bits in [9, 10, 11, 12, 16] {
        for (name_len, checkpoints) in [(0, 0), (0, 1), (8, 0), (8, 4), (300, 2), (1000, 30)] {
            for (layout, bytes) in layouts(cluster_bits, name_len, checkpoints) {
                for (change_name, change) in changes {
                    let what = format!(
                        "2^{cluster_bits}, name {name_len}, {checkpoints:x} checkpoints, {layout} \
                         layout, change of {change_name}"
                    );
                    let (writes, images, judged) = tear(&bytes, |image| change(&image), 61, &what);
                    total = (total.0 + writes, total.1 + images, total.2 + judged);
                }
            }
        }
    }
    println!(
        "{} header writes, {} torn images, {} judged by QEMU",
        total.0, total.1, total.2
    );
    assert!(
        total.0 > 100 && total.1 > 1000,
        "the sweep shrank: {total:?}"
    );
}

/// Another backing name is one write of the header, too: longer or shorter, of another format, or
/// none, beside a record, bitmaps and extensions of others.
#[test]
pub(crate) fn every_tear_of_another_backing_name_leaves_the_old_or_the_new_one() {
    tidemark_fixtures::require_qemu!();
    let _turn = common::alone();
    let names: [(Option<usize>, &str, Below); 5] = [
        (Some(4), "raw", Below::Same),
        (Some(5), "raw", Below::Unknown),
        (Some(300), "raw", Below::Same),
        (Some(1000), "raw", Below::Unknown),
        (None, "", Below::Same),
    ];
    let mut total = (0, 0, 0);
    for cluster_bits in [9, 11, 12, 16] {
        for (name_len, checkpoints) in [(0, 0), (8, 4), (1000, 30)] {
            for (layout, bytes) in layouts(cluster_bits, name_len, checkpoints) {
                for (len, format, below) in names {
                    let what = format!(
                        "2^{cluster_bits}, name {name_len}, {checkpoints} checkpoints, {layout} \
                         layout, then {len:?}"
                    );
                    let reference = len.map(|len| BackingReference {
                        name: backing_name(len).into_bytes(),
                        format: format.to_owned(),
                    });
                    if len.unwrap_or(0) == name_len {
                        continue;
                    }
                    let change = |image: Image| image.set_backing(reference.as_ref(), below);
                    let (writes, images, judged) = tear(&bytes, change, 211, &what);
                    total = (total.0 + writes, total.1 + images, total.2 + judged);
                }
            }
        }
    }
    println!(
        "{} header writes, {} torn images, {} judged by QEMU",
        total.0, total.1, total.2
    );
    assert!(
        total.0 > 150 && total.1 > 900,
        "the sweep shrank: {total:?}"
    );
}
