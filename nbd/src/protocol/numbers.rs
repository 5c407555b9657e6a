//! The numbers of the NBD protocol, with the specification's names.

/// What a server says first.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Begins every option, and says that this server is no oldstyle one.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Begins every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Begins a chunk of a reply with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;
/// Longest string of the protocol, bytes.
pub const MAX_STRING: usize = 4096;

/// Flags of the greeting, the server's and the client's.
pub mod handshake {
    /// Options are answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The answer to EXPORT_NAME ends without 124 zeroes.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// What a client may ask while it negotiates.
pub mod option {
    /// Choose an export, without an error to tell.
    pub const EXPORT_NAME: u32 = 1;
    /// Give up.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Continue under TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// How an option is answered.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// Name of an export.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The server does not want it.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option is malformed, or stands at the wrong place.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// TLS is needed first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The client must ask for the block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Not after extended headers were negotiated.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Kinds of fact in an answer to INFO and GO.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name of the export.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// It cannot be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Seeking costs time.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection holds for all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may name the contexts that it wants.
    pub const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;
}

/// Kinds of request.
pub mod command {
    /// Bytes of the disk.
    pub const READ: u16 = 0;
    /// New bytes.
    pub const WRITE: u16 = 1;
    /// The client leaves.
    pub const DISC: u16 = 2;
    /// What was answered becomes durable.
    pub const FLUSH: u16 = 3;
    /// The content is not needed.
    pub const TRIM: u16 = 4;
    /// It will be read soon.
    pub const CACHE: u16 = 5;
    /// It reads as zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// What the contexts say.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod flag {
    /// Answer only when it is durable.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer must not be split.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail where zeroes are as slow as data.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: the length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of a reply.
pub mod chunk {
    /// Flag of the last one.
    pub const DONE: u16 = 1 << 0;
    /// Nothing but its flags.
    pub const NONE: u16 = 0;
    /// An offset, and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset, and how many bytes are zero there.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context and its extents, 32 bits each.
    pub const BLOCK_STATUS: u16 = 5;
    /// A context and its extents, 64 bits each.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error for the whole request.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Bits of `base:allocation`.
pub mod allocation {
    /// Nothing is stored for it.
    pub const HOLE: u64 = 1 << 0;
    /// It reads as zero.
    pub const ZERO: u64 = 1 << 1;
}
