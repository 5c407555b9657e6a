//! A reply that is about to be sent: bytes of its own, and pieces of data between them.

use std::io::IoSlice;
use std::ops::Range;

/// Parts of a reply in their order.
#[derive(Debug, Default)]
pub(crate) struct Message {
    own: Vec<u8>,
    /// Where in `own`, or in the data, the parts are.
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Own(Range<usize>),
    Data(Range<usize>),
}

impl Message {
    /// Appends bytes.
    pub(crate) fn own(&mut self, work: impl FnOnce(&mut Vec<u8>)) {
        let start = self.own.len();
        work(&mut self.own);
        self.parts.push(Part::Own(start..self.own.len()));
    }

    /// Appends a piece of the data that [`Message::slices`] will be given.
    pub(crate) fn data(&mut self, range: Range<usize>) {
        self.parts.push(Part::Data(range));
    }

    /// What is to be sent.
    pub(crate) fn slices<'a>(&'a self, data: &'a [u8]) -> Vec<IoSlice<'a>> {
        let part = |part: &Part| match part.clone() {
            Part::Own(range) => IoSlice::new(&self.own[range]),
            Part::Data(range) => IoSlice::new(&data[range]),
        };
        self.parts.iter().map(part).collect()
    }
}
