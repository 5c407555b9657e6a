//! Which requests are let through to an export; pure.

use crate::fault::{ErrorCode, Fault};
use crate::protocol::numbers::{command, flag};
use crate::protocol::reply::Style;
use crate::protocol::request::Request;

/// What was negotiated, as far as a request can break it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) size: u64,
    pub(crate) writable: bool,
    pub(crate) style: Style,
    /// Smallest and largest request.
    pub(crate) minimum: u64,
    pub(crate) maximum: u64,
    /// Whether contexts were chosen.
    pub(crate) contexts: bool,
}

impl Rules {
    /// Refuses what makes no sense, or was not offered. A status that names its contexts says its
    /// range in the payload; that is for [`Rules::range`].
    pub(crate) fn judge(&self, request: &Request) -> Result<(), Fault> {
        let allowed = self.flags(request.command)?;
        let changes = matches!(
            request.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if changes && !self.writable {
            return Err(ErrorCode::NotPermitted.into());
        }
        let unknown = request.flags & !allowed;
        if unknown != 0 {
            return Err(invalid(format!("flags {unknown:#x} are not allowed")));
        }
        match request.command {
            command::FLUSH | command::DISC => Ok(()),
            command::BLOCK_STATUS if !self.contexts => {
                Err(invalid("no context was negotiated".to_owned()))
            }
            command::BLOCK_STATUS if request.has(flag::PAYLOAD_LEN) => Ok(()),
            _ => self.range(request.command, request.offset, request.length),
        }
    }

    /// Refuses a range that is not inside the disk, not aligned, or too long for its command.
    pub(crate) fn range(&self, command: u16, offset: u64, length: u64) -> Result<(), Fault> {
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.size) {
            let code = match command {
                command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpace,
                _ => ErrorCode::Invalid,
            };
            let message = format!("{length} bytes at {offset} end beyond the disk");
            return Err(Fault::new(code, message));
        }
        let aligned = offset.is_multiple_of(self.minimum) && length.is_multiple_of(self.minimum);
        if !aligned {
            return Err(invalid(format!(
                "{length} bytes at {offset} are not aligned"
            )));
        }
        match command {
            command::READ if length > self.maximum => {
                let message = format!("a read of {length} bytes is too long");
                let code = match self.style {
                    Style::Simple => ErrorCode::Invalid,
                    Style::Structured | Style::Extended => ErrorCode::TooLarge,
                };
                Err(Fault::new(code, message))
            }
            command::BLOCK_STATUS if length == 0 => Err(invalid("of no bytes".to_owned())),
            _ => Ok(()),
        }
    }

    /// Flags that a command may have.
    fn flags(&self, command: u16) -> Result<u16, Fault> {
        let payload = match self.style {
            Style::Extended => flag::PAYLOAD_LEN,
            Style::Simple | Style::Structured => 0,
        };
        // The specification lets FUA stand at every command.
        let more = match command {
            command::READ if self.style > Style::Simple => flag::DF,
            command::READ | command::FLUSH | command::TRIM | command::CACHE | command::DISC => 0,
            command::WRITE => payload,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::REQ_ONE | payload,
            _ => return Err(invalid(format!("command {command} is not known"))),
        };
        Ok(flag::FUA | more)
    }
}

fn invalid(message: String) -> Fault {
    Fault::new(ErrorCode::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules, command, flags, offset, length, and the verdict.
    type Case = (Rules, u16, u16, u64, u64, Option<ErrorCode>);

    const RULES: Rules = Rules {
        size: 1 << 20,
        writable: true,
        style: Style::Structured,
        minimum: 512,
        maximum: 64 << 10,
        contexts: true,
    };

    fn judged(
        rules: Rules,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Option<ErrorCode> {
        let request = Request {
            flags,
            command,
            cookie: 0,
            offset,
            length,
        };
        rules.judge(&request).err().map(|fault| fault.code)
    }

    #[test]
    fn every_request_has_its_verdict() {
        use ErrorCode::{Invalid, NoSpace, NotPermitted, TooLarge};
        use command::{BLOCK_STATUS, CACHE, DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
        let simple = Rules {
            style: Style::Simple,
            ..RULES
        };
        let extended = Rules {
            style: Style::Extended,
            ..RULES
        };
        let read_only = Rules {
            writable: false,
            ..RULES
        };
        let unasked = Rules {
            contexts: false,
            ..RULES
        };
        let size = RULES.size;
        let cases: &[Case] = &[
            (RULES, READ, 0, 0, 512, None),
            (RULES, READ, flag::DF | flag::FUA, size - 512, 512, None),
            (simple, READ, flag::DF, 0, 512, Some(Invalid)),
            (RULES, READ, 0, size, 512, Some(Invalid)),
            (RULES, READ, 0, u64::MAX - 511, 512, Some(Invalid)),
            (RULES, READ, 0, 1, 512, Some(Invalid)),
            (RULES, READ, 0, 0, 513, Some(Invalid)),
            (RULES, READ, 0, 0, 128 << 10, Some(TooLarge)),
            (simple, READ, 0, 0, 128 << 10, Some(Invalid)),
            (RULES, READ, flag::PAYLOAD_LEN, 0, 512, Some(Invalid)),
            (RULES, WRITE, flag::FUA, 0, 512, None),
            (RULES, WRITE, 0, size, 512, Some(NoSpace)),
            (read_only, WRITE, 0, 0, 512, Some(NotPermitted)),
            (RULES, WRITE, flag::PAYLOAD_LEN, 0, 512, Some(Invalid)),
            (extended, WRITE, flag::PAYLOAD_LEN, 0, 512, None),
            (
                RULES,
                WRITE_ZEROES,
                flag::NO_HOLE | flag::FAST_ZERO,
                0,
                size,
                None,
            ),
            (RULES, WRITE_ZEROES, 0, 512, size, Some(NoSpace)),
            (read_only, WRITE_ZEROES, 0, 0, 512, Some(NotPermitted)),
            (RULES, TRIM, flag::FUA, 0, size, None),
            (RULES, TRIM, flag::NO_HOLE, 0, 512, Some(Invalid)),
            (RULES, TRIM, 0, 100, 100, Some(Invalid)),
            (read_only, TRIM, 0, 0, 512, Some(NotPermitted)),
            (RULES, FLUSH, 0, 0, 0, None),
            (RULES, FLUSH, 0x4000, 0, 0, Some(Invalid)),
            (RULES, DISC, 0, 0, 0, None),
            (RULES, CACHE, 0, 0, size, None),
            (RULES, CACHE, 0, 0, size + 512, Some(Invalid)),
            (RULES, BLOCK_STATUS, flag::REQ_ONE, 0, size, None),
            (RULES, BLOCK_STATUS, 0, 0, 0, Some(Invalid)),
            (unasked, BLOCK_STATUS, 0, 0, 512, Some(Invalid)),
            (extended, BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 12, None),
            (RULES, 8, 0, 0, 512, Some(Invalid)),
            (RULES, 0xffff, 0, 0, 512, Some(Invalid)),
        ];
        for &(rules, command, flags, offset, length, verdict) in cases {
            let judged = judged(rules, command, flags, offset, length);
            assert_eq!(judged, verdict, "{command} {flags:#x} {offset} {length}");
        }
        println!("{} requests judged", cases.len());
        assert!(cases.len() >= 33);
    }
}
