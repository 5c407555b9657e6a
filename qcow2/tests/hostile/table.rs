//! Every named hostile image with its verdicts.

use tidemark_fixtures::builder::{Bitmap, BuiltImage, Chunk, Cluster, ImageBuilder};
use tidemark_fixtures::hostile::{Category, Content, HostileImage, Verdict, hostile_images};
use tidemark_fixtures::ops::fill;
use tidemark_qcow2::{Error, Image, MemoryStorage, OpenOptions};

use crate::probe::{Seen, peak_memory, read_everything, write_open};

fn allowed(verdict: Verdict, opened: &Result<(), Error>) -> bool {
    match opened {
        Ok(()) => verdict.may_open(),
        Err(Error::Corrupt { .. }) => verdict.may_be_corrupt(),
        Err(Error::Unsupported { .. }) => verdict.may_be_unsupported(),
        Err(_) => false,
    }
}

fn reading(image: &HostileImage) -> Result<Seen, String> {
    let seen = read_everything(&image.bytes)?;
    let expect = image.expect;
    if !allowed(expect.read_open, &seen.opened) {
        return Err(format!(
            "opening for reading: {:?}, not {:?}",
            seen.opened, expect.read_open
        ));
    }
    let right = match expect.content {
        Content::Reads => seen.opened.is_err() || !seen.unreadable,
        Content::Fails => seen.opened.is_err() || seen.unreadable,
        Content::Either => true,
    };
    match right {
        true => Ok(seen),
        false => Err(format!("reading must give {:?}", expect.content)),
    }
}

/// Bytes that no structure of the images has in a row.
const GUEST: [u8; 512] = [0xE7; 512];

/// Writes over allocated and unallocated clusters, one write at a time, whatever each answers.
fn write_around(image: &Image) {
    for cluster in [0, 1, 2, 5, 7, 600, 601, 1023] {
        for (offset, len) in [(0, 512), (1024, 512), (0, 4096)] {
            let bytes = GUEST.repeat(8);
            let _ = image.write(&bytes[..len], cluster * 4096 + offset);
        }
        let _ = image.flush();
    }
    let _ = image.write_zeroes(4096, 4096);
    let _ = image.discard(5 * 4096, 8192);
    let _ = image.flush();
}

#[test]
fn every_named_image_gets_its_verdict_and_stays_as_it_is() {
    let mut complaints = Vec::new();
    let images = hostile_images();
    for image in &images {
        let read = reading(image);
        let write = write_open(&image.bytes, write_around);
        let told = |opened: &Result<(), Error>| match opened {
            Ok(()) => "opens".to_owned(),
            Err(error) => error.to_string(),
        };
        match (read, write) {
            (Ok(read), Ok((write, _))) => {
                println!(
                    "{}: reading {}; writing {}",
                    image.name,
                    told(&read.opened),
                    told(&write)
                );
                if !allowed(image.expect.write_open, &write) {
                    let verdict = image.expect.write_open;
                    complaints.push(format!(
                        "{}: writing {write:?}, not {verdict:?}",
                        image.name
                    ));
                }
            }
            (read, write) => {
                complaints.extend(read.err().map(|text| format!("{}: {text}", image.name)));
                complaints.extend(write.err().map(|text| format!("{}: {text}", image.name)));
            }
        }
    }
    assert!(
        complaints.is_empty(),
        "{}:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    let peak = peak_memory();
    assert!(
        peak < 1 << 30,
        "{peak} bytes of memory for {} images",
        images.len()
    );
}

/// The image that the fixtures break, as this test file understands it.
fn healthy() -> BuiltImage {
    let data = |seed| Cluster::Data(fill(seed, 4096));
    let builder = ImageBuilder::new(4 << 20)
        .cluster_bits(12)
        .cluster(0, data(1))
        .cluster(1, data(2))
        .cluster(5, data(3))
        .cluster(600, data(4));
    let b = Bitmap::new("b", 16)
        .flags(0)
        .table(vec![Chunk::Bits(vec![0x81, 0x01])]);
    let a = Bitmap::new("a", 9).table(vec![Chunk::Bits(vec![0x33; 1024])]);
    builder.bitmap(a).bitmap(b).build()
}

#[test]
fn a_guest_write_never_lands_on_metadata() {
    let healthy = healthy();
    let metadata: Vec<(String, usize)> = healthy
        .names()
        .filter(|(name, _)| !name.starts_with("data["))
        .map(|(name, place)| {
            (
                name.to_owned(),
                usize::try_from(place.offset).unwrap() / 4096,
            )
        })
        .collect();
    let mut complaints = Vec::new();
    let mut count = 0;
    for image in hostile_images() {
        let same_layout = matches!(image.category, Category::Tables | Category::Refcounts)
            && image.bytes.len() == healthy.bytes.len();
        // Without COPIED the L2 table is copied before it changes, and its old cluster is free.
        if !same_layout || image.name == "L1 entry not COPIED" {
            continue;
        }
        count += 1;
        let (_, after) = write_open(&image.bytes, write_around).unwrap();
        for (name, cluster) in &metadata {
            let bytes = &after[cluster * 4096..(cluster + 1) * 4096];
            if bytes.chunks(512).any(|sector| sector == GUEST) {
                complaints.push(format!("{}: guest data lies on {name}", image.name));
            }
        }
    }
    assert!(count > 40, "only {count} images have the healthy layout");
    complaints.dedup();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Content of each guest cluster, where it can be read.
fn content(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let storage = MemoryStorage::from_bytes(bytes.to_vec());
    let Ok(image) = Image::open(Box::new(storage), OpenOptions::default()) else {
        return Vec::new();
    };
    (0..image.size().min(4 << 20) / 4096)
        .map(|cluster| {
            let mut buffer = vec![0; 4096];
            image
                .read(&mut buffer, cluster * 4096)
                .ok()
                .map(|()| buffer)
        })
        .collect()
}

/// Writes to some clusters and drops all bitmaps; returns which clusters now hold [`GUEST`], and
/// which an error left unsure.
fn write_and_forget(image: &Image) -> (Vec<usize>, Vec<usize>) {
    let (mut written, mut unsure) = (Vec::new(), Vec::new());
    for round in 0..2 {
        for cluster in [2, 1, 7, 601, 602, 1023] {
            let result = image.write(&GUEST.repeat(8), u64::try_from(cluster).unwrap() * 4096);
            match result {
                Ok(()) => written.push(cluster),
                Err(_) => unsure.push(cluster),
            }
        }
        let _ = image.flush();
        let names = image.bitmaps().unwrap_or_default();
        for bitmap in names.iter().filter(|_| round == 0) {
            let _ = image.update::<_, Error>(|update| update.remove(&bitmap.name));
        }
    }
    (written, unsure)
}

/// Guest clusters whose content after `write_and_forget` is not what it must be.
fn wrongly_changed(image: &HostileImage) -> Result<Vec<usize>, String> {
    let mut result = (Vec::new(), Vec::new());
    let (opened, after) = write_open(&image.bytes, |image| result = write_and_forget(image))?;
    if opened.is_err() {
        return Ok(Vec::new());
    }
    let (written, unsure) = result;
    let pairs = content(&image.bytes).into_iter().zip(content(&after));
    let wrong = pairs.enumerate().filter(|(cluster, (old, new))| {
        let old_or_new = if written.contains(cluster) {
            new.as_deref() == Some(&GUEST.repeat(8)[..])
        } else {
            old.is_none() || old == new
        };
        !old_or_new && !unsure.contains(cluster)
    });
    Ok(wrong.map(|(cluster, _)| cluster).collect())
}

#[test]
fn a_write_and_the_end_of_all_bitmaps_change_only_what_they_address() {
    let mut complaints = Vec::new();
    for image in hostile_images() {
        match wrongly_changed(&image) {
            Ok(clusters) if clusters.is_empty() => {}
            answer => complaints.push(format!("{}: {answer:?}", image.name)),
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
