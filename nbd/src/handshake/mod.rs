//! The handshake: from the greeting to the choice of an export.
//!
//! All of it has one deadline, every option a longest length, and their number is limited.

mod contexts;

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Instant;

use crate::convert::{index, to_u32};
use crate::event::Ending;
use crate::export::Export;
use crate::incoming::{Incoming, Patience};
use crate::protocol::Malformed;
use crate::protocol::numbers::{IHAVEOPT, NBDMAGIC, handshake, info, option, reply, transmission};
use crate::protocol::options::{
    ContextRequest, InfoRequest, OptionHeader, answer, export_chosen, info_block_size, info_export,
    info_text, meta_context, server,
};
use crate::protocol::reply::Style;
use crate::server::House;
use crate::transport::{Transport, send_all};

/// Most contexts of an export.
const MAX_CONTEXTS: usize = 1000;

/// How a connection becomes an encrypted one.
pub(crate) trait Upgrade: Send + Sync {
    /// Whether nothing is told before.
    fn is_required(&self) -> bool;

    /// Agrees with the client that waits for it.
    fn upgrade(
        &self,
        transport: Arc<dyn Transport>,
        until: Instant,
    ) -> Result<Arc<dyn Transport>, Ending>;
}

/// What a client has chosen.
pub(crate) struct Chosen {
    pub(crate) name: String,
    pub(crate) export: Arc<dyn Export>,
    pub(crate) style: Style,
    /// Numbers and names of the contexts that it may ask.
    pub(crate) contexts: Vec<(u32, String)>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) incoming: Incoming,
}

/// Contexts that were chosen, and for which export.
struct Selection {
    export: String,
    contexts: Vec<(u32, String)>,
}

/// What follows an option.
enum Next {
    Option,
    Export(String),
    End,
}

/// A client that has not chosen yet.
pub(crate) struct Handshake<'a> {
    house: &'a House,
    transport: Arc<dyn Transport>,
    incoming: Incoming,
    until: Instant,
    no_zeroes: bool,
    encrypted: bool,
    style: Style,
    selection: Option<Selection>,
}

impl<'a> Handshake<'a> {
    pub(crate) fn new(house: &'a House, transport: Arc<dyn Transport>) -> Self {
        Self {
            house,
            incoming: Incoming::new(Arc::clone(&transport)),
            transport,
            until: Instant::now() + house.limits.handshake,
            no_zeroes: false,
            encrypted: false,
            style: Style::Simple,
            selection: None,
        }
    }

    /// Negotiates; nothing when the client left.
    pub(crate) fn run(mut self) -> Result<Option<Chosen>, Ending> {
        if !self.greet()? {
            return Ok(None);
        }
        for _ in 0..self.house.limits.options {
            let mut bytes = [0; OptionHeader::BYTES];
            if !self.receive(&mut bytes)? {
                return Ok(None);
            }
            let header = OptionHeader::decode(&bytes)?;
            let data = self.data_of(header)?;
            match self.take(header.option, &data)? {
                Next::Option => {}
                Next::End => return Ok(None),
                Next::Export(name) => return Ok(self.choose(name)),
            }
        }
        Err(Ending::TooManyOptions)
    }

    /// Says hello; false when the client left.
    fn greet(&mut self) -> Result<bool, Ending> {
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        let mut greeting = NBDMAGIC.to_be_bytes().to_vec();
        greeting.extend(IHAVEOPT.to_be_bytes());
        greeting.extend(flags.to_be_bytes());
        self.send(&greeting)?;
        let mut bytes = [0; 4];
        if !self.receive(&mut bytes)? {
            return Ok(false);
        }
        let said = u32::from_be_bytes(bytes);
        if said & !u32::from(flags) != 0 {
            return Err(Ending::UnknownGreeting(said));
        }
        self.no_zeroes = said & u32::from(handshake::NO_ZEROES) != 0;
        Ok(true)
    }

    fn data_of(&mut self, header: OptionHeader) -> Result<Vec<u8>, Ending> {
        if header.length > self.house.limits.option_bytes {
            self.say(header.option, reply::ERR_TOO_BIG)?;
            return Err(Ending::TooLong(header.length.into()));
        }
        let mut data = vec![0; index(header.length)];
        if !self.receive(&mut data)? {
            return Err(Ending::CutShort);
        }
        Ok(data)
    }

    fn take(&mut self, option: u32, data: &[u8]) -> Result<Next, Ending> {
        if self.needs_tls_first(option) {
            if option == option::EXPORT_NAME {
                return Err(Ending::NoSuchExport);
            }
            self.say(option, reply::ERR_TLS_REQD)?;
            return Ok(Next::Option);
        }
        match option {
            option::EXPORT_NAME => return self.export_name(data),
            option::ABORT => {
                self.say(option, reply::ACK)?;
                return Ok(Next::End);
            }
            option::INFO | option::GO => return self.info(option, data),
            option::LIST => self.list(data)?,
            option::STARTTLS => self.start_tls(data)?,
            option::STRUCTURED_REPLY => self.raise(option, data, Style::Structured)?,
            option::EXTENDED_HEADERS => self.raise(option, data, Style::Extended)?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data)?,
            _ => self.say(option, reply::ERR_UNSUP)?,
        }
        Ok(Next::Option)
    }

    /// The option of old clients: it has no error but the end.
    fn export_name(&mut self, data: &[u8]) -> Result<Next, Ending> {
        let (name, export) = self.house.find(data).ok_or(Ending::NoSuchExport)?;
        let bytes = export_chosen(export.size(), self.flags(&*export), self.no_zeroes);
        self.send(&bytes)?;
        Ok(Next::Export(name))
    }

    fn needs_tls_first(&self, option: u32) -> bool {
        let upgrade = self.house.upgrade.as_ref();
        let required = upgrade.is_some_and(|upgrade| upgrade.is_required());
        required && !self.encrypted && !matches!(option, option::STARTTLS | option::ABORT)
    }

    /// Goes on under TLS, as if nothing had been agreed on before.
    fn start_tls(&mut self, data: &[u8]) -> Result<(), Ending> {
        if !data.is_empty() || self.encrypted {
            return self.say(option::STARTTLS, reply::ERR_INVALID);
        }
        let Some(upgrade) = &self.house.upgrade else {
            return self.say(option::STARTTLS, reply::ERR_POLICY);
        };
        if self.incoming.is_ahead() {
            return Err(Ending::PlainTextBeforeTls);
        }
        self.say(option::STARTTLS, reply::ACK)?;
        self.transport = upgrade.upgrade(Arc::clone(&self.transport), self.until)?;
        self.incoming = Incoming::new(Arc::clone(&self.transport));
        self.encrypted = true;
        self.style = Style::Simple;
        self.selection = None;
        Ok(())
    }

    fn list(&mut self, data: &[u8]) -> Result<(), Ending> {
        if !data.is_empty() {
            return self.say(option::LIST, reply::ERR_INVALID);
        }
        for (name, _) in &self.house.exports {
            self.send(&server(option::LIST, name))?;
        }
        self.say(option::LIST, reply::ACK)
    }

    /// Structured replies or extended headers.
    fn raise(&mut self, option: u32, data: &[u8], style: Style) -> Result<(), Ending> {
        if !data.is_empty() || self.style == style {
            return self.say(option, reply::ERR_INVALID);
        }
        if self.style > style {
            return self.say(option, reply::ERR_EXT_HEADER_REQD);
        }
        self.style = style;
        self.say(option, reply::ACK)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Next, Ending> {
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(problem) => return self.refuse(option, problem),
        };
        let Some((name, export)) = self.house.find(request.name) else {
            self.say(option, reply::ERR_UNKNOWN)?;
            return Ok(Next::Option);
        };
        let sizes = self.house.block_sizes(&*export);
        let asks_sizes = request.wanted.contains(&info::BLOCK_SIZE);
        if sizes[0] > 1 && !asks_sizes {
            self.say(option, reply::ERR_BLOCK_SIZE_REQD)?;
            return Ok(Next::Option);
        }
        let mut facts = info_export(option, export.size(), self.flags(&*export));
        if request.wanted.contains(&info::NAME) {
            facts.extend(info_text(option, info::NAME, &name));
        }
        let description = export.description();
        if request.wanted.contains(&info::DESCRIPTION) && !description.is_empty() {
            facts.extend(info_text(option, info::DESCRIPTION, &description));
        }
        if asks_sizes {
            facts.extend(info_block_size(option, sizes));
        }
        facts.extend(answer(option, reply::ACK, &[]));
        self.send(&facts)?;
        if option == option::GO {
            return Ok(Next::Export(name));
        }
        Ok(Next::Option)
    }

    /// Lists contexts, or chooses them.
    fn contexts(&mut self, option: u32, data: &[u8]) -> Result<(), Ending> {
        let listing = option == option::LIST_META_CONTEXT;
        if !listing {
            self.selection = None;
        }
        let request = match ContextRequest::decode(data) {
            Ok(request) if self.style > Style::Simple => request,
            Ok(_) => return self.say(option, reply::ERR_INVALID),
            Err(problem) => return self.refuse(option, problem).map(drop),
        };
        let Some((name, export)) = self.house.find(request.name) else {
            return self.say(option, reply::ERR_UNKNOWN);
        };
        let mut available = export.contexts();
        available.truncate(MAX_CONTEXTS);
        let mut found: Vec<usize> = if listing && request.queries.is_empty() {
            (0..available.len()).collect()
        } else {
            let queries = request.queries.iter();
            queries
                .flat_map(|query| contexts::matching(&available, query, listing))
                .collect()
        };
        found.sort_unstable();
        found.dedup();
        let mut answers = Vec::new();
        let mut chosen = Vec::new();
        for number in found {
            let id = if listing { 0 } else { to_u32(number) };
            answers.extend(meta_context(option, id, &available[number]));
            chosen.push((id, available[number].clone()));
        }
        if !listing {
            self.selection = Some(Selection {
                export: name,
                contexts: chosen,
            });
        }
        answers.extend(answer(option, reply::ACK, &[]));
        self.send(&answers)
    }

    fn refuse(&self, option: u32, problem: Malformed) -> Result<Next, Ending> {
        let kind = match problem {
            Malformed::LongString => reply::ERR_TOO_BIG,
            Malformed::Length | Malformed::Magic(_) => reply::ERR_INVALID,
        };
        self.say(option, kind)?;
        Ok(Next::Option)
    }

    /// What the client will use. Contexts that were chosen for another export do not count.
    fn choose(self, name: String) -> Option<Chosen> {
        let (name, export) = self.house.find(name.as_bytes())?;
        let selection = self.selection.filter(|chosen| chosen.export == name);
        Some(Chosen {
            name,
            export,
            style: self.style,
            contexts: selection.map(|chosen| chosen.contexts).unwrap_or_default(),
            transport: self.transport,
            incoming: self.incoming,
        })
    }

    fn flags(&self, export: &dyn Export) -> u16 {
        transmission_flags(export, self.style)
    }

    fn say(&self, option: u32, kind: u32) -> Result<(), Ending> {
        self.send(&answer(option, kind, &[]))
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Ending> {
        Ok(send_all(&*self.transport, &mut [IoSlice::new(bytes)])?)
    }

    fn receive(&mut self, out: &mut [u8]) -> Result<bool, Ending> {
        self.incoming.fill(out, Patience::Until(self.until))
    }
}

/// What a client may do with an export, in the style that it negotiated.
pub(crate) fn transmission_flags(export: &dyn Export, style: Style) -> u16 {
    let offers = export.offers();
    let mut flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_CACHE;
    flags |= if offers.writable {
        transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
    } else {
        transmission::READ_ONLY
    };
    if offers.multi_conn {
        flags |= transmission::CAN_MULTI_CONN;
    }
    if offers.rotational {
        flags |= transmission::ROTATIONAL;
    }
    if style > Style::Simple {
        flags |= transmission::SEND_DF;
    }
    if style == Style::Extended {
        flags |= transmission::BLOCK_STAT_PAYLOAD;
    }
    flags
}
