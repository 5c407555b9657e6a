//! What is wrong, and on which side: every bitmap by its proof, every descriptor against the
//! images. Writes nothing.

use std::collections::HashSet;

use crate::describe::describe;
use crate::view::View;
use crate::{Descriptor, Domain, ListOptions, NodeId, Problem, Result, rebuild};

impl Domain {
    /// Proves everything that can be proved. An empty answer: all is well.
    ///
    /// # Errors
    /// [`crate::Error::Image`]; [`crate::Error::Store`].
    pub fn verify(&self) -> Result<Vec<Problem>> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let ids: Vec<NodeId> = view.tree.walk(None).collect();
        let options = ListOptions {
            judge: true,
            ..ListOptions::default()
        };
        let infos = describe(&view, &ids, options)?;
        let mut problems = view.problems.clone();
        problems.extend(rebuild::findings(&view, &infos));
        for id in ids {
            if let Some(descriptor) = view.descriptors.get(&view.tree.node(id).identity) {
                problems.extend(compare(&view, id, descriptor));
            }
        }
        let mut seen = HashSet::new();
        problems.retain(|problem| seen.insert(problem.to_string()));
        Ok(problems)
    }
}

/// Where a descriptor and the images disagree.
fn compare(view: &View, id: NodeId, descriptor: &Descriptor) -> Vec<Problem> {
    let node = view.tree.node(id);
    let checkpoint = node.name.clone();
    let mut problems = Vec::new();
    let mut differs = |field| {
        problems.push(Problem::DescriptorDiffers {
            checkpoint: checkpoint.clone(),
            field,
        })
    };
    let parent = view
        .tree
        .parent(id)
        .map(|parent| &view.tree.node(parent).name);
    if node.in_images && descriptor.parent.as_ref() != parent {
        differs("parent");
    }
    let entry = view.disks.iter().find_map(|disk| disk.entry(node.identity));
    let times = (descriptor.created, entry.and_then(|entry| entry.created));
    if matches!(times, (Some(described), Some(recorded)) if described != recorded) {
        differs("creation time");
    }
    for described in descriptor.disks.iter().flatten() {
        let Ok(disk) = view.disk(&described.name) else {
            continue;
        };
        let (disk_name, checkpoint) = (disk.name.clone(), checkpoint.clone());
        let image = disk.record.as_ref().map(|record| record.image);
        if described.image.is_some() && image.is_some() && described.image != image {
            problems.push(Problem::OtherImage {
                disk: disk_name,
                checkpoint,
            });
        } else if described.bitmap
            && disk.entry(node.identity).is_none()
            && disk.bitmap(&node.name).is_none()
        {
            problems.push(Problem::NotOnDisk {
                disk: disk_name,
                checkpoint,
            });
        }
    }
    problems
}
