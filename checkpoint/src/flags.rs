//! The flag types of the interface. Unknown bits are refused, so that flags can be added.

use std::ops::{BitOr, BitOrAssign};

use crate::{Error, Result};

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident, $what:literal {
        $($(#[$flag_doc:meta])* $flag:ident = $bit:expr;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(u32);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self($bit);)*
            const KNOWN: u32 = 0 $(| $bit)*;

            /// From a number, as another language would pass it.
            ///
            /// # Errors
            /// [`Error::UnknownFlags`] for bits without a meaning.
            pub fn from_bits(bits: u32) -> Result<Self> {
                match bits & !Self::KNOWN {
                    0 => Ok(Self(bits)),
                    bits => Err(Error::UnknownFlags { what: $what, bits }),
                }
            }

            /// The flags as a number.
            pub const fn bits(self) -> u32 {
                self.0
            }

            /// Whether all of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }
    };
}

flags! {
    /// Which checkpoints a listing names, and in which order.
    ///
    /// A group with no bit set, or with both, does not filter: leaves and no-leaves, metadata and
    /// no-metadata. Filters look at the whole tree, never at the filtered rest.
    ListFlags, "list" {
        /// Listing a domain: only those without parent.
        ROOTS = 1 << 0;
        /// Listing the children of a checkpoint: all generations. The same bit as
        /// [`Self::ROOTS`]: it toggles the call's default depth.
        DESCENDANTS = 1 << 0;
        /// Only those without children.
        LEAVES = 1 << 1;
        /// Only those with children.
        NO_LEAVES = 1 << 2;
        /// Only those with a descriptor outside the images.
        METADATA = 1 << 3;
        /// Only those that are in the images alone.
        NO_METADATA = 1 << 4;
        /// Parents before their children; otherwise by name.
        TOPOLOGICAL = 1 << 5;
    }
}

flags! {
    /// How a checkpoint is created from a description.
    CreateFlags, "create" {
        /// Reinstate the descriptor of a checkpoint that was; no bitmap is touched.
        REDEFINE = 1 << 0;
        /// With [`Self::REDEFINE`]: the redefined one becomes current.
        CURRENT = 1 << 1;
        /// Leave no descriptor outside the images.
        NO_METADATA = 1 << 2;
        /// With [`Self::REDEFINE`]: believe the description without a look at the bitmaps.
        NO_VALIDATE = 1 << 3;
    }
}

flags! {
    /// What a deletion takes away; see [`crate::delete`] for the table.
    DeleteFlags, "delete" {
        /// This one and all its descendants.
        CHILDREN = 1 << 0;
        /// Only descriptors; bitmaps and tree stay.
        METADATA_ONLY = 1 << 1;
        /// With [`Self::CHILDREN`]: only the descendants.
        CHILDREN_ONLY = 1 << 2;
    }
}

flags! {
    /// What a description tells.
    XmlFlags, "XML" {
        /// Also what is security-sensitive; refused on a read-only handle.
        SECURE = 1 << 0;
        /// Refused by name: a checkpoint has no second definition.
        INACTIVE = 1 << 1;
        /// Refused by name: no definition is updated on the way out.
        UPDATE_CPU = 1 << 2;
        /// Without the domain's definition.
        NO_DOMAIN = 1 << 3;
        /// With the bytes that changed on each disk since the checkpoint.
        SIZE = 1 << 4;
        /// Without our own namespace: what libvirt's schema accepts.
        LIBVIRT = 1 << 5;
    }
}

impl CreateFlags {
    /// Refuses flags that contradict each other.
    ///
    /// # Errors
    /// [`Error::FlagConflict`].
    pub fn check(self) -> Result<()> {
        let conflict = |flag, problem| Err(Error::FlagConflict { flag, problem });
        let redefine = self.contains(Self::REDEFINE);
        if self.contains(Self::CURRENT) && !redefine {
            return conflict("CURRENT", "needs REDEFINE");
        }
        if self.contains(Self::NO_VALIDATE) && !redefine {
            return conflict("NO_VALIDATE", "needs REDEFINE");
        }
        if self.contains(Self::NO_METADATA) && redefine {
            return conflict("NO_METADATA", "excludes REDEFINE");
        }
        Ok(())
    }
}

impl DeleteFlags {
    /// Refuses flags that contradict each other.
    ///
    /// # Errors
    /// [`Error::FlagConflict`].
    pub fn check(self) -> Result<()> {
        if self.contains(Self::CHILDREN_ONLY) && !self.contains(Self::CHILDREN) {
            let problem = "needs CHILDREN";
            return Err(Error::FlagConflict {
                flag: "CHILDREN_ONLY",
                problem,
            });
        }
        Ok(())
    }

    /// Flags as libvirt and virsh read them: there, CHILDREN_ONLY stands alone and excludes
    /// CHILDREN. They are turned into ours.
    ///
    /// # Errors
    /// [`Error::UnknownFlags`]; [`Error::FlagConflict`] where libvirt refuses.
    pub fn from_libvirt(bits: u32) -> Result<Self> {
        let flags = Self::from_bits(bits)?;
        if !flags.contains(Self::CHILDREN_ONLY) {
            return Ok(flags);
        }
        if flags.contains(Self::CHILDREN) {
            let problem = "excludes CHILDREN in libvirt's spelling";
            return Err(Error::FlagConflict {
                flag: "CHILDREN_ONLY",
                problem,
            });
        }
        Ok(flags | Self::CHILDREN)
    }
}

impl XmlFlags {
    /// Refuses flags that a checkpoint cannot honour.
    ///
    /// # Errors
    /// [`Error::FlagConflict`], by the flag's name.
    pub fn check(self) -> Result<()> {
        let problem = "means nothing for a checkpoint";
        if self.contains(Self::INACTIVE) {
            return Err(Error::FlagConflict {
                flag: "INACTIVE",
                problem,
            });
        }
        if self.contains(Self::UPDATE_CPU) {
            return Err(Error::FlagConflict {
                flag: "UPDATE_CPU",
                problem,
            });
        }
        Ok(())
    }
}
