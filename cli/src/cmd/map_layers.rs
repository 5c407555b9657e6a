//! Where a backing file is shorter than what is above it.
//!
//! Beyond its end the layer *above* reads as zero, and nothing is present there: that is how
//! `qemu-img map` tells it. The engine counts such a run to the layer that has ended.

use tidemark_qcow2::{Extent, Gate, Image};

use crate::exit::{Failure, Outcome};

/// Sizes of the layers below an image, the first right below it.
pub(super) struct Layers {
    sizes: Vec<u64>,
}

impl Layers {
    /// Follows the backing files of an image that has been opened with them.
    pub(super) fn of(image: &Image, gate: &dyn Gate) -> Outcome<Self> {
        let mut sizes = Vec::new();
        let mut next = image
            .backing()
            .map(|backing| (backing, image.name().to_owned()));
        while let Some((backing, from)) = next.take() {
            let storage = gate.open(&backing, &from).map_err(|reason| {
                let name = String::from_utf8_lossy(&backing.name);
                Failure::new(format!("{from}: backing file {name}: {reason}"))
            })?;
            if backing.format == "raw" {
                let size = storage.len().map_err(|error| {
                    Failure::new(format!("{}: length: {error}", storage.name()))
                })?;
                sizes.push(size);
                break;
            }
            let layer = Image::open_unbacked(storage, false)?;
            sizes.push(layer.size());
            next = layer
                .backing()
                .map(|backing| (backing, layer.name().to_owned()));
        }
        Ok(Self { sizes })
    }

    /// The extent, cut where its layer ends; what lies beyond belongs to the layer above.
    pub(super) fn place(&self, extent: Extent) -> Vec<Extent> {
        let size = |depth: u64| {
            let index = usize::try_from(depth.checked_sub(1)?).ok()?;
            self.sizes.get(index).copied()
        };
        let end = extent.start + extent.length;
        match size(extent.depth) {
            Some(size) if size < end => {
                let inside = size.saturating_sub(extent.start);
                let beyond = Extent {
                    start: extent.start + inside,
                    length: extent.length - inside,
                    depth: extent.depth - 1,
                    present: false,
                    zero: true,
                    data: false,
                    compressed: false,
                    offset: None,
                };
                let rest = Extent {
                    length: inside,
                    ..extent
                };
                if inside == 0 {
                    vec![beyond]
                } else {
                    vec![rest, beyond]
                }
            }
            _ => vec![extent],
        }
    }
}
