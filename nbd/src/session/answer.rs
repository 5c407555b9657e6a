//! The work of one request, and its reply.

use std::ops::Range;

use super::message::Message;
use super::{Session, status};
use crate::convert::{low_u32, to_u64, to_usize};
use crate::event::Event;
use crate::export::{BlockStatus, Zeroing};
use crate::fault::{ErrorCode, Fault};
use crate::protocol::numbers::{allocation, chunk, command, flag};
use crate::protocol::reply::{self, Addressee, Style};
use crate::protocol::request::{Request, decode_wanted_contexts};
use std::sync::atomic::Ordering;

/// Reads of at least so many bytes leave out what reads as zero.
const HOLES_FROM: u64 = 32 << 10;
/// A read with more runs than this is sent as data.
const MOST_PIECES: usize = 64;
/// Zeroing, trimming and caching go on in such steps, so that they can be stopped.
const STEP: u64 = 1 << 30;

impl Session<'_> {
    /// Does the work and sends the reply; `data` holds the payload and room for what is read.
    pub(super) fn answer(&self, request: &Request, data: &mut Vec<u8>) {
        let done = self
            .rules
            .judge(request)
            .and_then(|()| self.work(request, data));
        let message = done.unwrap_or_else(|fault| self.failure(request, &fault));
        self.send(&message, data);
    }

    fn work(&self, request: &Request, data: &mut Vec<u8>) -> Result<Message, Fault> {
        let export = &*self.chosen.export;
        let (offset, length) = (request.offset, request.length);
        match request.command {
            command::READ => return self.read(request, data),
            command::BLOCK_STATUS => {
                let payload = request.payload(self.rules.style == Style::Extended);
                return self.block_status(request, &data[..to_usize(payload)]);
            }
            command::WRITE => export.write(&data[..to_usize(length)], offset)?,
            command::FLUSH => export.flush()?,
            command::TRIM => self.by_steps(offset, length, |at, len| export.trim(at, len))?,
            command::CACHE => self.by_steps(offset, length, |at, len| export.cache(at, len))?,
            command::WRITE_ZEROES => {
                let how = Zeroing {
                    keep_space: request.has(flag::NO_HOLE),
                    only_fast: request.has(flag::FAST_ZERO),
                };
                self.by_steps(offset, length, |at, len| export.zero(at, len, how))?;
            }
            _ => return Err(ErrorCode::Invalid.into()),
        }
        if self.is_fua(request) && request.command != command::FLUSH {
            export.flush()?;
        }
        Ok(self.success(request))
    }

    /// Cuts long work, and ends it when nobody is there any more to hear of it.
    fn by_steps(
        &self,
        offset: u64,
        length: u64,
        mut step: impl FnMut(u64, u64) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < length {
            if self.broken.load(Ordering::Relaxed) || self.house.is_closing() {
                return Err(ErrorCode::ShuttingDown.into());
            }
            let piece = STEP.min(length - done);
            step(offset + done, piece)?;
            done += piece;
        }
        Ok(())
    }

    fn read(&self, request: &Request, data: &mut Vec<u8>) -> Result<Message, Fault> {
        let length = to_usize(request.length);
        if data.len() < length {
            data.resize(length, 0);
        }
        let (style, to) = (self.rules.style, addressee(request));
        let mut message = Message::default();
        if style == Style::Simple {
            self.chosen
                .export
                .read(&mut data[..length], request.offset)?;
            message.own(|out| reply::simple(to, 0, out));
            message.data(0..length);
            return Ok(message);
        }
        if length == 0 {
            return Ok(self.success(request));
        }
        let pieces = self.pieces(request);
        // All is read before the first chunk is promised: an error is then the whole answer.
        for (range, zero) in &pieces {
            if !zero {
                let at = request.offset + to_u64(range.start);
                self.chosen.export.read(&mut data[range.clone()], at)?;
            }
        }
        let last = pieces.len() - 1;
        for (number, (range, zero)) in pieces.into_iter().enumerate() {
            let (at, count) = (request.offset + to_u64(range.start), range.len());
            let kind = if zero {
                chunk::OFFSET_HOLE
            } else {
                chunk::OFFSET_DATA
            };
            let follows = if zero { 12 } else { 8 + count };
            message.own(|out| {
                reply::chunk(style, to, number == last, kind, follows, out);
                out.extend(at.to_be_bytes());
                if zero {
                    out.extend(low_u32(to_u64(count)).to_be_bytes());
                }
            });
            if !zero {
                message.data(range);
            }
        }
        Ok(message)
    }

    /// Cuts a read where it certainly reads as zero.
    fn pieces(&self, request: &Request) -> Vec<(Range<usize>, bool)> {
        let whole = vec![(0..to_usize(request.length), false)];
        if request.has(flag::DF) || request.length < HOLES_FROM {
            return whole;
        }
        let range = request.offset..request.offset + request.length;
        let export = &*self.chosen.export;
        let Ok(runs) = status::collect(export, "base:allocation", range, MOST_PIECES) else {
            return whole;
        };
        let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
        let mut at = 0;
        for run in runs {
            let (zero, end) = (run.flags & allocation::ZERO != 0, at + run.length);
            match pieces.last_mut() {
                Some(last) if last.1 == zero => last.0.end = to_usize(end),
                _ => pieces.push((to_usize(at)..to_usize(end), zero)),
            }
            at = end;
        }
        if at == request.length { pieces } else { whole }
    }

    fn block_status(&self, request: &Request, payload: &[u8]) -> Result<Message, Fault> {
        let mut chosen: Vec<&(u32, String)> = self.chosen.contexts.iter().collect();
        let mut length = request.length;
        if request.has(flag::PAYLOAD_LEN) {
            let (about, wanted) = decode_wanted_contexts(payload)
                .map_err(|problem| Fault::new(ErrorCode::Invalid, problem.to_string()))?;
            length = about;
            self.rules.range(request.command, request.offset, length)?;
            let known = |id: &u32| self.chosen.contexts.iter().any(|context| context.0 == *id);
            if wanted.is_empty() || !wanted.iter().all(known) {
                let message = "a context is wanted that was not negotiated";
                return Err(Fault::new(ErrorCode::Invalid, message));
            }
            chosen.retain(|context| wanted.contains(&context.0));
        }
        let limit = if request.has(flag::REQ_ONE) {
            1
        } else {
            self.house.limits.extents
        };
        let range = request.offset..request.offset + length;
        let mut answers: Vec<(u32, Vec<BlockStatus>)> = Vec::new();
        for (id, name) in chosen {
            let runs = status::collect(&*self.chosen.export, name, range.clone(), limit)?;
            answers.push((*id, runs));
        }
        let mut message = Message::default();
        let (style, to) = (self.rules.style, addressee(request));
        let last = answers.len().saturating_sub(1);
        message.own(|out| {
            for (number, (id, runs)) in answers.iter().enumerate() {
                reply::block_status(style, to, number == last, *id, runs, out);
            }
        });
        Ok(message)
    }

    fn success(&self, request: &Request) -> Message {
        let mut message = Message::default();
        let (style, to) = (self.rules.style, addressee(request));
        message.own(|out| match style {
            Style::Simple => reply::simple(to, 0, out),
            Style::Structured | Style::Extended => {
                reply::chunk(style, to, true, chunk::NONE, 0, out);
            }
        });
        message
    }

    fn failure(&self, request: &Request, fault: &Fault) -> Message {
        self.house.tell(&Event::Failed {
            client: self.client,
            command: name_of(request.command),
            fault,
        });
        let mut message = Message::default();
        let (style, to) = (self.rules.style, addressee(request));
        let (number, text) = (fault.code.number(), fault.code.text());
        message.own(|out| match style {
            Style::Simple => reply::simple(to, number, out),
            Style::Structured | Style::Extended => reply::error(style, to, number, text, out),
        });
        message
    }
}

fn addressee(request: &Request) -> Addressee {
    Addressee {
        cookie: request.cookie,
        offset: request.offset,
    }
}

fn name_of(command: u16) -> &'static str {
    match command {
        command::READ => "read",
        command::WRITE => "write",
        command::FLUSH => "flush",
        command::TRIM => "trim",
        command::CACHE => "cache",
        command::WRITE_ZEROES => "write zeroes",
        command::BLOCK_STATUS => "block status",
        _ => "an unknown command",
    }
}
