//! Why a request could not be done.

/// The error numbers that the protocol allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The export cannot be written.
    NotPermitted,
    /// The disk failed.
    Io,
    /// Not enough memory.
    OutOfMemory,
    /// The request makes no sense.
    Invalid,
    /// No space left, or beyond the end of the disk.
    NoSpace,
    /// Too much at once.
    TooLarge,
    /// Not in the way that was asked for.
    NotSupported,
    /// The server is about to end.
    ShuttingDown,
}

impl ErrorCode {
    /// Its number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::OutOfMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::TooLarge => 75,
            Self::NotSupported => 95,
            Self::ShuttingDown => 108,
        }
    }

    /// What clients are told. They may be strangers: details of files stay here.
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotPermitted => "the export is read-only",
            Self::Io => "the disk failed",
            Self::OutOfMemory => "not enough memory",
            Self::Invalid => "invalid request",
            Self::NoSpace => "no space left, or beyond the end of the disk",
            Self::TooLarge => "the request is too large",
            Self::NotSupported => "not possible in this way",
            Self::ShuttingDown => "the server is shutting down",
        }
    }
}

/// A request that failed. The text is for the server's own log, clients only see the code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What clients are told.
    pub code: ErrorCode,
    /// What happened.
    pub message: String,
}

impl Fault {
    /// A failure with its reason.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl From<ErrorCode> for Fault {
    fn from(code: ErrorCode) -> Self {
        Self::new(code, code.text())
    }
}
