//! A handle to one checkpoint.

use tidemark_qcow2::chain::Identity;

use crate::describe::describe;
use crate::view::View;
use crate::{
    CheckpointInfo, DeleteFlags, Deleted, DiskChange, Domain, Error, ListFlags, ListOptions,
    NodeId, Result, SinceOptions, XmlFlags, list,
};

/// One checkpoint of a domain. It keeps its domain alive, so it cannot dangle; the checkpoint
/// itself may be deleted meanwhile, and then every question is answered with
/// [`Error::NoSuchCheckpoint`], also if another has taken the name.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    domain: Domain,
    identity: Identity,
    name: String,
}

impl Checkpoint {
    pub(crate) fn new(domain: &Domain, identity: Identity, name: String) -> Self {
        Self {
            domain: domain.clone(),
            identity,
            name,
        }
    }

    fn of_node(domain: &Domain, view: &View, id: NodeId) -> Self {
        let node = view.tree.node(id);
        Self::new(domain, node.identity, node.name.clone())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its identity, which no other checkpoint will ever have.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its domain.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Its parent; `None` for a root.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when it was deleted.
    pub fn parent(&self) -> Result<Option<Self>> {
        self.look(|view, id| {
            let parent = view.tree.parent(id);
            Ok(parent.map(|parent| Self::of_node(&self.domain, view, parent)))
        })
    }

    /// Whether it is the current one.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when it was deleted.
    pub fn is_current(&self) -> Result<bool> {
        self.look(|view, id| Ok(view.tree.current() == Some(id)))
    }

    /// Whether it has a descriptor outside the images.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when it was deleted.
    pub fn has_metadata(&self) -> Result<bool> {
        self.look(|view, id| Ok(view.tree.node(id).metadata))
    }

    /// Its children; all generations with [`ListFlags::DESCENDANTS`].
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when it was deleted.
    pub fn children(&self, flags: ListFlags) -> Result<Vec<Self>> {
        self.look(|view, id| {
            let ids = list::list(&view.tree, Some(id), flags);
            Ok(ids
                .into_iter()
                .map(|id| Self::of_node(&self.domain, view, id))
                .collect())
        })
    }

    /// Everything there is to say about it.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`] when it was deleted; [`Error::Image`].
    pub fn info(&self, options: ListOptions) -> Result<CheckpointInfo> {
        self.look(|view, id| {
            let mut infos = describe(view, &[id], options)?;
            infos
                .pop()
                .ok_or_else(|| Error::NoSuchCheckpoint(self.name.clone()))
        })
    }

    /// Its description. One without metadata is described from what the images know.
    ///
    /// # Errors
    /// [`Error::FlagConflict`] for INACTIVE and UPDATE_CPU; [`Error::SecureDenied`] for SECURE on a
    /// read-only handle; [`Error::NoSuchCheckpoint`]; [`Error::Image`].
    pub fn xml(&self, flags: XmlFlags) -> Result<String> {
        flags.check()?;
        if flags.contains(XmlFlags::SECURE) && self.domain.is_read_only() {
            return Err(Error::SecureDenied);
        }
        self.look(|view, id| {
            let sizes = flags.contains(XmlFlags::SIZE);
            Ok(crate::describe::descriptor(view, id, sizes)?.render(flags))
        })
    }

    /// Deletes it, or what the flags say; see [`crate::delete`].
    ///
    /// # Errors
    /// As [`Domain::delete`].
    pub fn delete(&self, flags: DeleteFlags) -> Result<Deleted> {
        crate::delete::delete(&self.domain, flags, |view| {
            view.find(self.identity, &self.name)
        })
    }

    /// What changed on each disk since it; see [`crate::delta`].
    ///
    /// # Errors
    /// [`Error::NotAncestor`] when it is no ancestor of the current one;
    /// [`Error::CurrentDisputed`]; [`Error::NoSuchCheckpoint`]; [`Error::Image`].
    pub fn changed_since(&self, options: SinceOptions) -> Result<Vec<DiskChange>> {
        self.look(|view, id| crate::delta::changed_since(view, id, options))
    }

    fn look<R>(&self, question: impl FnOnce(&View, NodeId) -> Result<R>) -> Result<R> {
        let _turn = self.domain.reading();
        let view = View::read(&self.domain)?;
        let id = view.find(self.identity, &self.name)?;
        question(&view, id)
    }
}

impl Domain {
    /// The checkpoints, filtered and ordered by `flags`; one consistent set.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Store`].
    pub fn checkpoints(&self, flags: ListFlags) -> Result<Vec<Checkpoint>> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let ids = list::list(&view.tree, None, flags);
        Ok(ids
            .into_iter()
            .map(|id| Checkpoint::of_node(self, &view, id))
            .collect())
    }

    /// The tree of checkpoints at this moment, for lazy walks.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Store`].
    pub fn tree(&self) -> Result<crate::Tree> {
        let _turn = self.reading();
        Ok(View::read(self)?.tree)
    }

    /// The checkpoint of a name.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`]; [`Error::Ambiguous`].
    pub fn lookup(&self, name: &str) -> Result<Checkpoint> {
        let _turn = self.reading();
        let view = View::read(self)?;
        let id = view.named(name)?;
        Ok(Checkpoint::of_node(self, &view, id))
    }

    /// The current checkpoint: the parent of the next. `None` when there is none.
    ///
    /// # Errors
    /// [`Error::CurrentDisputed`] when the disks contradict each other.
    pub fn current(&self) -> Result<Option<Checkpoint>> {
        let _turn = self.reading();
        let view = View::read(self)?;
        if view.current == crate::view::CurrentState::Disputed {
            return Err(Error::CurrentDisputed);
        }
        Ok(view
            .tree
            .current()
            .map(|id| Checkpoint::of_node(self, &view, id)))
    }

    /// Whether there is a current checkpoint.
    ///
    /// # Errors
    /// As [`Self::current`].
    pub fn has_current(&self) -> Result<bool> {
        Ok(self.current()?.is_some())
    }
}
