//! Whether the refcounts of an image can be trusted enough to write by them.
//!
//! A refcount block that lies on a mapping table would turn every allocation into damage, and
//! refcounts that do not even count the header would hand out clusters that somebody uses. Both
//! are refused before the first write; a full comparison is the work of [`crate::check`].

use std::collections::HashSet;

use super::Allocator;
use crate::error::{Damage, Result};
use crate::image::file::ImageFile;
use crate::units::{HostCluster, HostOffset};

/// A structure of the image that owns its clusters alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Structure {
    pub(crate) name: &'static str,
    pub(crate) offset: HostOffset,
    pub(crate) clusters: u64,
    /// Whether its refcounts are looked at as well.
    pub(crate) counted: bool,
}

impl Allocator {
    /// Protects metadata, after checking that no two structures share a cluster.
    pub(crate) fn vet(&mut self, file: &ImageFile, structures: &[Structure]) -> Result<()> {
        let table = Structure {
            name: "refcount table",
            offset: self.table_offset,
            clusters: self.geometry.clusters_for(self.table_bytes()),
            counted: true,
        };
        let header = Structure {
            name: "header",
            offset: HostOffset::ZERO,
            clusters: 1,
            counted: true,
        };
        let shared = "shares a cluster with other metadata";
        let blocks = self.table.iter().filter(|entry| **entry != 0).count();
        let own = 1 + table.clusters + crate::convert::to_u64(blocks);
        if crate::convert::to_u64(self.fixed.len()) != own {
            return Err(refusal(file, &table, shared));
        }
        for structure in structures {
            let first = self.geometry.host_cluster(structure.offset).0;
            for cluster in first..first + structure.clusters {
                if !self.fixed.insert(cluster) {
                    return Err(refusal(file, structure, shared));
                }
            }
        }
        for structure in [header, table].iter().chain(structures) {
            self.check_counted(file, structure)?;
        }
        Ok(())
    }

    /// Protects one more structure, whose clusters have one reference each. Counts come first, so
    /// that a size that is only claimed takes no memory.
    pub(crate) fn protect(&mut self, file: &ImageFile, structure: &Structure) -> Result<()> {
        self.check_counted(file, structure)?;
        let first = self.geometry.host_cluster(structure.offset).0;
        for cluster in first..first + structure.clusters {
            if !self.fixed.insert(cluster) {
                return Err(refusal(
                    file,
                    structure,
                    "shares a cluster with other metadata",
                ));
            }
        }
        Ok(())
    }

    /// Protects the pages of the recording bitmaps in place of those known before. A page is
    /// written in place, so it must belong to its bitmap alone.
    pub(crate) fn protect_pages(&mut self, file: &ImageFile, pages: &[HostOffset]) -> Result<()> {
        let mut known = HashSet::with_capacity(pages.len());
        for &offset in pages {
            let page = Structure {
                name: "bitmap page",
                offset,
                clusters: 1,
                counted: true,
            };
            let cluster = self.geometry.host_cluster(offset);
            let shared = self.is_fixed(cluster)
                || self.trust.holds(cluster)
                || self.is_claimed(cluster)
                || !known.insert(cluster.0);
            if shared {
                return Err(refusal(file, &page, "shares its cluster"));
            }
            self.check_counted(file, &page)?;
        }
        self.pages = known;
        Ok(())
    }

    /// Whether guest data may not lie on `cluster`.
    pub(crate) fn is_protected(&self, cluster: HostCluster) -> bool {
        self.is_fixed(cluster) || self.pages.contains(&cluster.0)
    }

    fn check_counted(&mut self, file: &ImageFile, structure: &Structure) -> Result<()> {
        let first = self.geometry.host_cluster(structure.offset).0;
        let counted = if structure.counted {
            structure.clusters
        } else {
            0
        };
        for cluster in first..first + counted {
            if self.count(file, HostCluster(cluster))? != 1 {
                let problem = "does not have a refcount of one: repair the image first";
                return Err(refusal(file, structure, problem));
            }
        }
        Ok(())
    }

    pub(super) fn table_bytes(&self) -> u64 {
        crate::geometry::Geometry::entries_bytes(self.table.len())
    }
}

fn refusal(file: &ImageFile, structure: &Structure, problem: &'static str) -> crate::Error {
    file.damage(Damage::Place {
        structure: structure.name,
        offset: structure.offset,
        problem,
    })
}
