//! What a descriptor says, as a value.

use tidemark_qcow2::chain::{Identity, ImageUuid};

/// XML namespace of what libvirt's format has no place for.
pub const NAMESPACE: &str = "urn:tidemark:checkpoint:1";

/// The descriptor of a checkpoint: libvirt's `<domaincheckpoint>`, and its identity.
///
/// Everything but the name is optional, for a description to create from says little, and one
/// that libvirt wrote knows nothing of identities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Name; empty in a description to create from that leaves the choice to us.
    pub name: String,
    /// Identity. Without it the name is all there is to find the checkpoint in the images.
    pub identity: Option<Identity>,
    /// Free text.
    pub description: Option<String>,
    /// Seconds since the epoch.
    pub created: Option<u64>,
    /// Name of the parent; `None` for a root.
    pub parent: Option<String>,
    /// Disks; `None` when the description leaves it at the default, all writable ones.
    pub disks: Option<Vec<DescribedDisk>>,
    /// The domain's own definition at that moment, an XML element.
    pub domain: Option<String>,
    /// Elements of others, each with the namespaces that it uses. They are stored again as they
    /// were, and shown only where secrets are, for nobody here knows what is in them.
    pub others: Vec<String>,
}

/// What a descriptor says of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DescribedDisk {
    /// Name of the disk in its domain.
    pub name: String,
    /// Whether it takes part. Its bitmap then carries the checkpoint's name.
    pub bitmap: bool,
    /// Bytes that changed since the checkpoint, an estimate; only on the way out, and only of a disk
    /// that takes part.
    pub changed_bytes: Option<u64>,
    /// Identity of the image at that moment: tells a disk of the same name in another domain.
    pub image: Option<ImageUuid>,
}
