//! Bitmaps of one name through the layers of a backing chain, as libvirt keeps them: what changed
//! since X is the union of the bitmaps X of the layers, from the top down.
//!
//! # Invariants
//! 1. A chain of a name is valid if the top has it, the layers that have it are consecutive, and
//!    in each of them it records and is consistent. Anything else answers nothing: a layer
//!    without bitmaps cannot be told from one without changes.
//! 2. Decided before anything is written: these are plans, pure.

use tidemark_bitmap::Bitmap;
use tidemark_qcow2::{BitmapInfo, Image};

use crate::fold::{self, refused};

/// Whether the bitmap of a name may be asked through the layers, top first.
pub fn is_valid(layers: &[Vec<BitmapInfo>], name: &str) -> bool {
    let having: Vec<usize> = places(layers, name);
    let consecutive = having
        .iter()
        .enumerate()
        .all(|(count, place)| count == *place);
    let whole = having
        .iter()
        .filter_map(|place| find(layers, *place, name))
        .all(|info| info.auto && !info.in_use);
    !having.is_empty() && consecutive && whole
}

/// Which layers' bitmaps of a name are joined to tell what changed since; `None` if they cannot.
pub fn merge_list(layers: &[Vec<BitmapInfo>], name: &str) -> Option<Vec<usize>> {
    is_valid(layers, name).then(|| places(layers, name))
}

/// Which layers lose their bitmap when the checkpoint of a name is deleted, also where the chain of
/// it is not valid. All but the top one, which is 0, have to be opened for writing.
pub fn delete_list(layers: &[Vec<BitmapInfo>], name: &str) -> Vec<usize> {
    places(layers, name)
}

/// The bitmaps that a new overlay begins with, empty: all of the top that are valid. Those below go
/// on as they are, so that the overlay can be thrown away.
pub fn overlay_list(layers: &[Vec<BitmapInfo>]) -> Vec<BitmapInfo> {
    let top = layers.first().map(Vec::as_slice).unwrap_or_default();
    let valid = top.iter().filter(|info| is_valid(layers, &info.name));
    valid.cloned().collect()
}

/// What a commit does with one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedBitmap {
    /// The name.
    pub name: String,
    /// Whether the base does not have it yet.
    pub create: bool,
    /// The layers whose bitmaps are joined into that of the base, after the data.
    pub sources: Vec<usize>,
}

/// What has to be done with bitmaps when the layers from `top` to the one above `base` are committed
/// into `base`. A name whose chain from `top` down has a gap, or a bitmap that is not whole, is
/// dropped.
pub fn commit_list(layers: &[Vec<BitmapInfo>], top: usize, base: usize) -> Vec<CommittedBitmap> {
    let from_top = layers.get(top..).unwrap_or_default();
    let Some(first) = from_top.first() else {
        return Vec::new();
    };
    first
        .iter()
        .filter(|info| is_valid(from_top, &info.name))
        .map(|info| CommittedBitmap {
            name: info.name.clone(),
            create: find(layers, base, &info.name).is_none(),
            sources: places(from_top, &info.name)
                .into_iter()
                .map(|place| place.saturating_add(top))
                .filter(|place| *place < base)
                .collect(),
        })
        .collect()
}

fn find<'a>(layers: &'a [Vec<BitmapInfo>], place: usize, name: &str) -> Option<&'a BitmapInfo> {
    layers.get(place)?.iter().find(|info| info.name == name)
}

fn places(layers: &[Vec<BitmapInfo>], name: &str) -> Vec<usize> {
    let has = |place: &usize| find(layers, *place, name).is_some();
    (0..layers.len()).filter(has).collect()
}

/// The union of a name's bitmaps in the layers below the top, over a disk as large as the top's;
/// `None` when the chain of that name is not valid.
pub(crate) fn below(
    top: (&Image, &[BitmapInfo]),
    lower: &[std::sync::Arc<Image>],
    name: &str,
) -> fold::Result<Option<Bitmap>> {
    let (image, bitmaps) = top;
    let mut layers = vec![bitmaps.to_vec()];
    for layer in lower {
        match layer.bitmaps() {
            Ok(bitmaps) => layers.push(bitmaps),
            Err(tidemark_qcow2::Error::Corrupt { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let Some(list) = merge_list(&layers, name) else {
        return Ok(None);
    };
    let mut union = image.load_bitmap(name)?;
    for place in list.into_iter().skip(1) {
        let Some(layer) = lower.get(place.saturating_sub(1)) else {
            continue;
        };
        let bits = layer.load_bitmap(name)?;
        let failed = |error| refused(layer, error);
        // Where the disk is larger than the layer was, the layer says nothing; neither did the
        // guest write there then.
        let bits = match bits.shape().disk_bytes() == image.size() {
            true => bits,
            false => bits.resize(image.size(), false).map_err(failed)?,
        };
        union.union_outward(&bits).map_err(failed)?;
    }
    Ok(Some(union))
}
