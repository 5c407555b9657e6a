//! Numbers out of fuzz input. Whatever the bytes are they mean something, so that a mutation makes
//! another case and not a rejected one. The input's end reads as zeros.

/// Input that is taken from its front.
#[derive(Debug)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `data`.
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        byte
    }

    /// A number of `bytes` bytes, least significant first.
    pub(crate) fn number(&mut self, bytes: u32) -> u64 {
        (0..bytes.min(8)).fold(0, |number, index| {
            number | u64::from(self.byte()) << (8 * index)
        })
    }

    /// One of `0..count`, which must not be empty.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        let number = usize::from(self.byte()) << 8 | usize::from(self.byte());
        number % count
    }

    /// A range within `size` bytes, aligned in half of all cases.
    pub(crate) fn range(&mut self, size: u64) -> (u64, u64) {
        let kind = self.byte();
        let offset = self.number(3) % size;
        let len = match kind & 3 {
            0 => 1 + self.number(1),
            1 => 1 + self.number(2),
            2 => 512 * (1 + self.number(1)),
            _ => 1 + self.number(2) * 4,
        };
        let align = [1, 1, 512, 4096][usize::from(kind >> 2 & 3)];
        let offset = offset / align * align;
        (offset, len.next_multiple_of(align).min(size - offset))
    }
}
