//! The bitmaps of an overlay that is committed, carried into the base.
//!
//! A bitmap that records in the overlay says what changed on the disk since some moment. After the
//! commit the base shows that disk, so the base records the same bitmap: the union of its bits in
//! all layers above the base, and of those that the base has already. It goes over after the data,
//! for the base's own bitmaps mark what is written.
//!
//! That is only right where the layers that have the bitmap are consecutive from the overlay down,
//! and all of them record. What cannot go over is named.

use std::fmt;

use super::commit::{Committed, above};
use crate::bitmaps::BitmapInfo;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::backing::Layer;

/// A bitmap that the base cannot take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: LeftReason,
}

/// Why a bitmap does not go over into the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftReason {
    /// It is inconsistent in a layer.
    Inconsistent,
    /// It does not record in a layer: it speaks of a time that has ended.
    NotRecording,
    /// A layer between has no bitmap of that name, or the overlay has none.
    Gap,
    /// The base is raw, or of version 2.
    BaseHoldsNone,
    /// The base has no room for another bitmap, or its disk is too large for the granularity.
    NoRoom,
}

impl fmt::Display for LeftReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Inconsistent => "it is inconsistent",
            Self::NotRecording => "it does not record",
            Self::Gap => "not every layer above has it",
            Self::BaseHoldsNone => "the base cannot hold bitmaps",
            Self::NoRoom => "the base has no room for it",
        })
    }
}

/// What goes over and what does not, decided before the first write.
pub(super) struct Plan {
    carried: Vec<Carried>,
    left: Vec<LeftBehind>,
    /// Layers above the base.
    depth: usize,
}

/// A bitmap that goes over.
struct Carried {
    /// As the overlay has it.
    info: BitmapInfo,
    /// Layers above the base that have it, from the overlay down.
    layers: usize,
}

impl Plan {
    pub(super) fn new(top: &Image, depth: usize) -> Result<Self> {
        let layers = (0..depth)
            .filter_map(|depth| above(top, depth))
            .map(Image::bitmaps)
            .collect::<Result<Vec<_>>>()?;
        let base = match top.layer(depth) {
            Some(Layer::Image(image)) if image.geometry().version > 2 => Some(image.bitmaps()?),
            _ => None,
        };
        let mut plan = Self {
            carried: Vec::new(),
            left: Vec::new(),
            depth,
        };
        let mut seen: Vec<&str> = Vec::new();
        for info in layers.iter().flatten() {
            if seen.contains(&info.name.as_str()) {
                continue;
            }
            seen.push(&info.name);
            match judge(&info.name, &layers, base.as_deref()) {
                Ok(layers) => plan.carried.push(Carried {
                    info: info.clone(),
                    layers,
                }),
                Err(reason) => plan.leave(&info.name, reason),
            }
        }
        Ok(plan)
    }

    fn leave(&mut self, name: &str, reason: LeftReason) {
        self.left.push(LeftBehind {
            name: name.to_owned(),
            reason,
        });
    }

    /// Puts the bitmaps into the base, one at a time, so that memory holds one of them.
    pub(super) fn carry_out(mut self, top: &Image, committed: &mut Committed) -> Result<()> {
        let Some(Layer::Image(base)) = top.layer(self.depth) else {
            committed.left_behind = self.left;
            return Ok(());
        };
        for carried in std::mem::take(&mut self.carried) {
            let name = carried.info.name.clone();
            match carry(top, base, &carried) {
                Ok(()) => committed.carried.push(name),
                Err(error) if is_refusal(&error) => self.leave(&name, LeftReason::NoRoom),
                Err(error) => return Err(error),
            }
        }
        committed.left_behind = self.left;
        Ok(())
    }
}

/// How many layers above the base have a bitmap, from the overlay down.
fn judge(
    name: &str,
    layers: &[Vec<BitmapInfo>],
    base: Option<&[BitmapInfo]>,
) -> std::result::Result<usize, LeftReason> {
    let find = |bitmaps: &[BitmapInfo]| bitmaps.iter().find(|info| info.name == name).cloned();
    let found: Vec<Option<BitmapInfo>> = layers.iter().map(|bitmaps| find(bitmaps)).collect();
    let in_base = base.and_then(find);
    for info in found.iter().flatten().chain(&in_base) {
        if info.in_use {
            return Err(LeftReason::Inconsistent);
        }
        if !info.auto {
            return Err(LeftReason::NotRecording);
        }
    }
    let count = found.iter().take_while(|info| info.is_some()).count();
    let behind = found[count..].iter().any(Option::is_some);
    if count == 0 || behind || count < found.len() && in_base.is_some() {
        return Err(LeftReason::Gap);
    }
    match base {
        Some(_) => Ok(count),
        None => Err(LeftReason::BaseHoldsNone),
    }
}

fn carry(top: &Image, base: &Image, carried: &Carried) -> Result<()> {
    let Carried { info, layers } = carried;
    base.update(|update| {
        let size = base.size();
        let present = update.bitmaps().into_iter().find(|b| b.name == info.name);
        let mut bits = match present {
            Some(_) => update.load(&info.name)?,
            None => update.blank(info.granularity)?,
        };
        let invalid = |error| base.file().invalid(crate::Mistake::Bitmap(error));
        let mut smallest = top.size();
        for image in (0..*layers).filter_map(|depth| above(top, depth)) {
            let above = image.load_bitmap(&info.name)?;
            let above = above.resize(size, false).map_err(invalid)?;
            bits.union_outward(&above).map_err(invalid)?;
            smallest = smallest.min(image.size());
        }
        // The disk was as small as that: what it gained since is a change.
        if smallest < top.size() {
            bits.mark(smallest..top.size()).map_err(invalid)?;
        }
        update.put(&info.name, bits, true)
    })
}

/// Nothing was written for it.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Unsupported { .. }
            | Error::Invalid {
                mistake: crate::Mistake::Bitmap(_),
                ..
            }
    )
}
