//! What a context says of a range, checked and joined.

use std::ops::Range;

use crate::export::{BlockStatus, Export};
use crate::fault::{ErrorCode, Fault};

/// Maximal runs from the start of `range`, at most `limit`, clipped to its end. A fault behind the
/// first run only cuts the answer short: the client will ask again from there.
pub(crate) fn collect(
    export: &dyn Export,
    context: &str,
    range: Range<u64>,
    limit: usize,
) -> Result<Vec<BlockStatus>, Fault> {
    let mut rest = range.end - range.start;
    let mut runs: Vec<BlockStatus> = Vec::new();
    let mut source = export.block_status(context, range)?;
    while rest > 0 {
        let next = match source.next() {
            Some(Ok(run)) if run.length > 0 => run,
            Some(Err(fault)) if runs.is_empty() => return Err(fault),
            Some(Err(_)) => break,
            Some(Ok(_)) | None if runs.is_empty() => {
                let message = format!("context {context} has no answer");
                return Err(Fault::new(ErrorCode::Io, message));
            }
            Some(Ok(_)) | None => break,
        };
        let length = next.length.min(rest);
        let full = runs.len() == limit;
        match runs.last_mut() {
            Some(last) if last.flags == next.flags => last.length += length,
            _ if full => break,
            _ => runs.push(BlockStatus { length, ..next }),
        }
        rest -= length;
    }
    Ok(runs)
}
