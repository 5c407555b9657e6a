//! How many bytes of the disk one bit stands for.

/// Bytes of the disk that one bit covers: a power of two from 512 B to 2 GiB.
///
/// The format stores the exponent (`granularity_bits`, 9 to 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granularity(u8);

impl Granularity {
    /// 512 bytes: one sector a bit.
    pub const MIN: Self = Self(9);
    /// 64 KiB: what qcow2 writers choose for clusters of 64 KiB.
    pub const DEFAULT: Self = Self(16);
    /// 2 GiB.
    pub const MAX: Self = Self(31);

    /// From the exponent; `None` outside 9..=31.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits >= Self::MIN.0 && bits <= Self::MAX.0 {
            Some(Self(bits))
        } else {
            None
        }
    }

    /// From the size in bytes; `None` unless it is a power of two from 512 B to 2 GiB.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        let mut bits = Self::MIN.0;
        while bits <= Self::MAX.0 {
            if bytes == 1 << bits {
                return Some(Self(bits));
            }
            bits += 1;
        }
        None
    }

    /// The exponent: log2 of the size in bytes.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Granularity;

    #[test]
    fn only_powers_of_two_from_512_bytes_to_2_gib_are_granularities() {
        assert_eq!(Granularity::from_bytes(512), Some(Granularity::MIN));
        assert_eq!(Granularity::from_bytes(65_536), Some(Granularity::DEFAULT));
        assert_eq!(Granularity::from_bytes(2 << 30), Some(Granularity::MAX));
        for bytes in [0, 1, 256, 513, 65_535, 4 << 30, u64::MAX] {
            assert_eq!(Granularity::from_bytes(bytes), None);
        }
        assert_eq!(Granularity::from_bits(8), None);
        assert_eq!(Granularity::from_bits(32), None);
        assert_eq!(
            Granularity::from_bits(31).map(Granularity::bytes),
            Some(1 << 31)
        );
    }
}
