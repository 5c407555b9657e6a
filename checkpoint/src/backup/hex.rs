//! Identities and hashes in JSON: lower-case hexadecimal digits.

use std::fmt::Display;

use serde::{Deserialize, Deserializer, Serializer, de};
use tidemark_qcow2::chain::{Identity, ImageUuid};

/// What is written as hexadecimal digits and read back.
pub(super) trait Hex: Sized + Display {
    fn from_digits(digits: &str) -> Option<Self>;
}

impl Hex for Identity {
    fn from_digits(digits: &str) -> Option<Self> {
        Self::from_hex(digits)
    }
}

impl Hex for ImageUuid {
    fn from_digits(digits: &str) -> Option<Self> {
        Self::from_hex(digits)
    }
}

impl Hex for blake3::Hash {
    fn from_digits(digits: &str) -> Option<Self> {
        Self::from_hex(digits).ok()
    }
}

pub(super) fn serialize<T: Hex, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

pub(super) fn deserialize<'de, T: Hex, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    let digits = String::deserialize(from)?;
    T::from_digits(&digits).ok_or_else(|| de::Error::custom("not hexadecimal digits"))
}

/// The same for a value that may be null.
pub(super) mod optional {
    use super::{Deserialize, Deserializer, Hex, Serializer, de};

    pub(in super::super) fn serialize<T: Hex, S: Serializer>(
        value: &Option<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }

    pub(in super::super) fn deserialize<'de, T: Hex, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        let digits = Option::<String>::deserialize(from)?;
        let parse = |digits: String| {
            T::from_digits(&digits).ok_or_else(|| de::Error::custom("not hexadecimal digits"))
        };
        digits.map(parse).transpose()
    }
}
