//! What storing a bitmap writes: the pages that changed, and no more.

use tidemark_fixtures::storage::CrashOptions;
use tidemark_qcow2::{Error, Image};

use super::common::{open_bytes, reading, writing};
use super::{SIZE, Touched, Watched, crowd, places};

const CLUSTER: u64 = 65536;

#[test]
fn only_changed_pages_are_stored() {
    let storage = crowd();
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let old = image.load_bitmap("b").unwrap();
    let (page, pages) = (old.shape().page_range(0).end, old.shape().pages());
    image.close().unwrap();
    let mut cases = 0;
    for changed in [0, 1, 2, 5] {
        let watched = Watched::new(storage.clone());
        let image = Image::open(Box::new(watched.clone()), writing()).unwrap();
        let before = places(&storage.to_bytes())["b"].clone();
        let mut wanted = image.load_bitmap("b").unwrap();
        // Page 1 of every three has bits.
        for number in 0..changed {
            let start = (number * 3 + 1) * page;
            wanted.mark(start + (8 << 20)..start + (9 << 20)).unwrap();
            wanted.clear_inward(start..start + 8192).unwrap();
        }
        watched.take();
        image
            .update(|update| update.put("b", wanted.clone(), false))
            .unwrap();
        let written = Touched::bytes(&watched.take().writes);
        image.close().unwrap();
        // Table, directory, refcounts and the first cluster come on top.
        let most = (changed + 1) * CLUSTER + 6 * CLUSTER;
        assert!(
            written <= most,
            "{changed} pages changed: {written} bytes written"
        );
        let after = &places(&storage.to_bytes())["b"];
        let kept = after.iter().filter(|place| before.contains(place)).count();
        assert!(
            kept + usize::try_from(changed).unwrap() >= before.len() - 1,
            "{kept} kept"
        );
        let found = open_bytes(storage.to_bytes(), reading()).unwrap();
        assert!(found.load_bitmap("b").unwrap() == wanted);
        cases += 1;
    }
    println!("{cases} changes of a bitmap of {pages} pages");
}

/// A bitmap of which some pages were taken over is the old one or the new one after every crash,
/// and nothing of it was freed.
#[test]
fn a_partly_stored_bitmap_is_old_or_new_after_every_crash() {
    let base = crowd();
    let storage = tidemark_fixtures::storage::CrashStorage::new(base.to_bytes());
    let image = Image::open(Box::new(storage.clone()), writing()).unwrap();
    let mut states = vec![image.load_bitmap("b").unwrap()];
    for round in 0..3_u64 {
        image
            .update::<_, Error>(|update| {
                let mut bits = update.load("b")?;
                bits.mark(round << 28..(round << 28) + 100_000).unwrap();
                bits.clear_inward(SIZE / 2..SIZE / 2 + (round << 26))
                    .unwrap();
                states.push(bits.clone());
                update.put("b", bits, false)
            })
            .unwrap();
        storage.note(round + 1);
    }
    image.close().unwrap();
    let log = storage.log();
    let options = CrashOptions::default();
    let mut images = 0;
    for crash in log.images(options) {
        let done = log.last_note_before(crash.flushed_through).unwrap_or(0);
        let issued = log.last_note_before(crash.position).unwrap_or(0) + 1;
        let found = open_bytes(crash.bytes, writing()).unwrap();
        let bits = found.load_bitmap("b").unwrap();
        let allowed =
            (done..=issued).filter_map(|state| states.get(usize::try_from(state).unwrap()));
        assert!(
            allowed.into_iter().any(|state| *state == bits),
            "{}",
            crash.description
        );
        // What was taken over is not given out again.
        let free: Vec<u8> = vec![7; 400_000];
        found.write(&free, 1 << 30).unwrap();
        found.flush().unwrap();
        assert!(
            found.load_bitmap("b").unwrap() == bits,
            "{}",
            crash.description
        );
        assert!(found.load_bitmap("a").is_ok());
        images += 1;
    }
    println!("{} points, {images} images", log.points());
    assert!(log.points() >= 30 && images >= 60);
}
