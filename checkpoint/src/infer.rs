//! What can be said of an image without a chain record, from its bitmaps alone. All of it is
//! inferred, and says so.
//!
//! - Bitmaps that all record, as libvirt keeps them: the older contains the newer. Should the
//!   order be wrong, what one alone says of "since" is right all the same.
//! - An image with a backing file says nothing of what was written below. The layers do, if they
//!   are given; else only the caller can vouch.
//! - Bitmaps that are disabled: whether they are all there cannot be known. Only the union of all
//!   of them is right for every order, and only if none is missing.

use std::cmp::Reverse;

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::chain::{Health, Scheme};
use tidemark_qcow2::{BitmapInfo, Image};

use crate::delta::{DiskDelta, FullReason};
use crate::describe::Evidence;
use crate::fold::{self, refused};
use crate::view::DiskView;
use crate::{Problem, layers, name};

/// The chain that an image without a record seems to have.
#[derive(Debug)]
pub(crate) struct Inferred {
    pub(crate) scheme: Scheme,
    /// Names, oldest first.
    pub(crate) order: Vec<BitmapInfo>,
    /// Whether each is the child of the one before it; else nothing tells the order.
    pub(crate) ordered: bool,
    pub(crate) evidence: Evidence,
    pub(crate) problems: Vec<Problem>,
}

/// The state of a bitmap that no record names.
pub(crate) fn health(info: &BitmapInfo) -> Health {
    if info.in_use {
        Health::Inconsistent
    } else {
        Health::Inferred
    }
}

/// Looks at all bitmaps whose name could be a checkpoint's.
pub(crate) fn infer(
    disk: &str,
    image: &Image,
    bitmaps: &[BitmapInfo],
) -> fold::Result<Option<Inferred>> {
    let candidates = candidates(bitmaps);
    let recording: Vec<_> = candidates
        .iter()
        .filter(|info| info.auto)
        .cloned()
        .collect();
    let frozen = candidates.len().saturating_sub(recording.len());
    if candidates.is_empty() {
        return Ok(None);
    }
    if frozen == 0 {
        return by_inclusion(disk, image, recording).map(Some);
    }
    if recording.len() <= 1 {
        return Ok(Some(by_names(disk, candidates)));
    }
    let mut inferred = by_inclusion(disk, image, recording)?;
    inferred.problems.push(Problem::MixedSchemes {
        disk: disk.to_owned(),
    });
    Ok(Some(inferred))
}

/// What changed since a bitmap of an image without a record, taken at its word.
pub(crate) fn changed_since(
    disk: &DiskView,
    name: &str,
    trust_inferred: bool,
) -> fold::Result<DiskDelta> {
    let (image, bitmaps) = (&*disk.image, disk.bitmaps.as_slice());
    let full = |reason| Ok(DiskDelta::Full { reason });
    let candidates: Vec<&BitmapInfo> = bitmaps.iter().filter(could_be_ours).collect();
    let Some(asked) = candidates.iter().find(|info| info.name == name) else {
        return full(FullReason::NotOnDisk);
    };
    let recording = candidates.iter().filter(|info| info.auto).count();
    let alone = asked.auto && (recording > 1 || candidates.len() == 1);
    if !alone && recording != 1 {
        return full(FullReason::NothingRecords);
    }
    let through_layers = image.backing().is_some() || !disk.layers.is_empty();
    if through_layers && !(disk.layers.is_empty() && trust_inferred) {
        // One alone, or nothing: a disabled one has no place in such a chain.
        let union = layers::below((image, bitmaps), &disk.layers, name)?;
        return match union.filter(|_| alone && !disk.layers.is_empty()) {
            Some(bits) => Ok(DiskDelta::Incremental(bits)),
            None => full(FullReason::LayersUnknown),
        };
    }
    let mut union: Option<Bitmap> = None;
    for info in candidates.iter().filter(|info| !alone || info.name == name) {
        if info.in_use {
            let (bitmap, health) = (info.name.clone(), Health::Inconsistent);
            return full(FullReason::BadBitmap { bitmap, health });
        }
        let bits = image.load_bitmap(&info.name)?;
        match &mut union {
            Some(union) => union
                .union_outward(&bits)
                .map_err(|error| refused(image, error))?,
            None => union = Some(bits),
        }
    }
    match union {
        Some(bits) => Ok(DiskDelta::Incremental(bits)),
        None => full(FullReason::NotOnDisk),
    }
}

fn candidates(bitmaps: &[BitmapInfo]) -> Vec<BitmapInfo> {
    bitmaps.iter().filter(could_be_ours).cloned().collect()
}

fn could_be_ours(info: &&BitmapInfo) -> bool {
    name::check(&info.name).is_ok()
}

/// Older recording bitmaps contain newer ones. Inclusion is transitive, so only neighbours by
/// count need a look.
fn by_inclusion(disk: &str, image: &Image, infos: Vec<BitmapInfo>) -> fold::Result<Inferred> {
    let (broken, sound): (Vec<_>, Vec<_>) = infos.into_iter().partition(|info| info.in_use);
    let mut loaded = Vec::new();
    for info in sound {
        let bits = image.load_bitmap(&info.name)?;
        loaded.push((info, bits));
    }
    loaded.sort_by_cached_key(|(info, bits)| {
        let number = number_in(&info.name);
        (Reverse(bits.dirty_bytes()), number, info.name.clone())
    });
    let ordered = loaded.windows(2).all(|pair| match pair {
        [(_, older), (_, newer)] => older.contains(newer),
        _ => true,
    });
    let mut order: Vec<BitmapInfo> = loaded.into_iter().map(|(info, _)| info).collect();
    let mut problems = Vec::new();
    if !ordered {
        let bitmaps = order.iter().map(|info| info.name.clone()).collect();
        problems.push(Problem::NoOrder {
            disk: disk.to_owned(),
            bitmaps,
        });
    }
    let evidence = if ordered {
        Evidence::Inclusion
    } else {
        Evidence::NameOnly
    };
    order.extend(broken);
    Ok(Inferred {
        scheme: Scheme::Cumulative,
        order,
        ordered,
        evidence,
        problems,
    })
}

/// Contents tell nothing of the order of disabled bitmaps. Numbers in all names might.
fn by_names(disk: &str, mut infos: Vec<BitmapInfo>) -> Inferred {
    infos.sort_by(|a, b| {
        let age = a.auto.cmp(&b.auto);
        age.then_with(|| number_in(&a.name).cmp(&number_in(&b.name)))
            .then_with(|| a.name.cmp(&b.name))
    });
    let frozen: Vec<_> = infos.iter().filter(|info| !info.auto).collect();
    let ordered = frozen.iter().all(|info| number_in(&info.name).is_some())
        && frozen.windows(2).all(|pair| match pair {
            [a, b] => number_in(&a.name) < number_in(&b.name),
            _ => true,
        });
    let mut problems = Vec::new();
    if !ordered && frozen.len() > 1 {
        let bitmaps = frozen.iter().map(|info| info.name.clone()).collect();
        problems.push(Problem::NoOrder {
            disk: disk.to_owned(),
            bitmaps,
        });
    }
    let ordered = ordered || frozen.len() <= 1;
    let evidence = if ordered {
        Evidence::NameOrder
    } else {
        Evidence::NameOnly
    };
    Inferred {
        scheme: Scheme::Intervals,
        order: infos,
        ordered,
        evidence,
        problems,
    }
}

/// The last number in a name.
fn number_in(name: &str) -> Option<u64> {
    let end = name.rfind(|character: char| character.is_ascii_digit())?;
    let digits = name.get(..=end)?;
    let start = digits.rfind(|character: char| !character.is_ascii_digit());
    digits
        .get(start.map_or(0, |start| start.saturating_add(1))..)?
        .parse()
        .ok()
}
