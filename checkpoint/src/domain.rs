//! A domain: named disks that share their moments, and where their descriptors are kept.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tidemark_qcow2::Image;

use crate::store::Held;
use crate::{Error, Result, Store};

/// One disk of a domain.
#[derive(Clone)]
pub struct Disk {
    /// Name in the domain, as `vda`.
    pub name: String,
    /// Its top image, open.
    pub image: Arc<Image>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("name", &self.name)
            .field("image", &self.image.name())
            .finish()
    }
}

/// What a domain may have besides disks.
#[derive(Clone, Debug, Default)]
pub struct DomainOptions {
    /// Where descriptors are; without it checkpoints live in the images alone.
    pub store: Option<Store>,
    /// The domain's own definition, an XML element that goes into new descriptors.
    pub definition: Option<String>,
    /// Whether this handle may not see secrets nor change anything.
    pub read_only: bool,
}

/// A set of named disks with one tree of checkpoints. Cheap to clone; all clones are one domain.
///
/// Operations of one domain exclude each other; reading ones run side by side. Two `Domain`s over
/// the same images do not know of each other: make one and clone it.
#[derive(Clone, Debug)]
pub struct Domain {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    disks: Vec<Disk>,
    options: DomainOptions,
    /// Images below those of the disks, by the name of the disk, from the top down.
    layers: HashMap<String, Vec<Arc<Image>>>,
    turn: RwLock<()>,
}

impl Domain {
    /// A domain of `disks`.
    ///
    /// # Errors
    /// [`Error::NoDisks`]; [`Error::DoubledDisk`].
    pub fn new(disks: Vec<Disk>, options: DomainOptions) -> Result<Self> {
        Self::with_layers(disks, HashMap::new(), options)
    }

    /// A domain of `disks`, with the images below some of them, by the name of the disk and from
    /// the top down, each opened for a look at its bitmaps alone
    /// ([`Image::open_unbacked`]). Without them, bitmaps of an image that has a backing file and no
    /// record say nothing of what was written below.
    ///
    /// # Errors
    /// As [`Self::new`]; [`Error::UnknownDisk`].
    pub fn with_layers(
        mut disks: Vec<Disk>,
        layers: HashMap<String, Vec<Arc<Image>>>,
        options: DomainOptions,
    ) -> Result<Self> {
        if disks.is_empty() {
            return Err(Error::NoDisks);
        }
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        let mut seen = HashSet::new();
        if let Some(doubled) = disks.iter().find(|disk| !seen.insert(disk.name.as_str())) {
            return Err(Error::DoubledDisk(doubled.name.clone()));
        }
        let names: HashSet<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
        if let Some(unknown) = layers.keys().find(|name| !names.contains(name.as_str())) {
            return Err(Error::UnknownDisk(unknown.clone()));
        }
        Ok(Self {
            inner: Arc::new(Inner {
                disks,
                options,
                layers,
                turn: RwLock::new(()),
            }),
        })
    }

    /// The disks, by name.
    pub fn disks(&self) -> &[Disk] {
        &self.inner.disks
    }

    /// The images below a disk's, from the top down, as far as they were given.
    pub(crate) fn layers(&self, disk: &str) -> &[Arc<Image>] {
        self.inner
            .layers
            .get(disk)
            .map(Vec::as_slice)
            .unwrap_or_default()
    }

    /// The disk of a name.
    ///
    /// # Errors
    /// [`Error::UnknownDisk`].
    pub fn disk(&self, name: &str) -> Result<&Disk> {
        let found = self.inner.disks.iter().find(|disk| disk.name == name);
        found.ok_or_else(|| Error::UnknownDisk(name.to_owned()))
    }

    /// Where descriptors are kept, if anywhere.
    pub fn store(&self) -> Option<&Store> {
        self.inner.options.store.as_ref()
    }

    /// The domain's own definition, if known.
    pub fn definition(&self) -> Option<&str> {
        self.inner.options.definition.as_deref()
    }

    /// Whether this handle may not see secrets nor change anything.
    pub fn is_read_only(&self) -> bool {
        self.inner.options.read_only
    }

    /// Waits until no operation changes the chain.
    pub(crate) fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.inner
            .turn
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until nobody reads or changes the chain, here or, as far as descriptors go, in another
    /// process.
    ///
    /// # Errors
    /// [`Error::ReadOnlyHandle`]; [`Error::Store`].
    pub(crate) fn changing(&self) -> Result<Turn<'_>> {
        if self.is_read_only() {
            return Err(Error::ReadOnlyHandle);
        }
        let guard = self
            .inner
            .turn
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let store = self.store().map(Store::hold).transpose()?;
        Ok(Turn {
            _store: store,
            _guard: guard,
        })
    }
}

/// The right to change a domain's chain and descriptors.
pub(crate) struct Turn<'a> {
    _store: Option<Held>,
    _guard: RwLockWriteGuard<'a, ()>,
}
