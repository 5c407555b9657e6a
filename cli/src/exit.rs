//! How a command ends: one table of exit codes, one line for a failure.

use std::fmt;
use std::io;
use std::path::Path;

use tidemark_qcow2::{Error, Feature};

/// Exit codes of all commands; stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// What was asked has been done.
    Done = 0,
    /// It could not be done.
    Failed = 1,
    /// Damage was found.
    Damage = 2,
    /// Only leaked clusters were found.
    Leaks = 3,
    /// Data could not be read (compare).
    Unread = 4,
    /// The image's format, or a feature of it, is not supported.
    Unsupported = 63,
    /// The command line is wrong.
    Usage = 64,
}

impl Exit {
    /// `compare`: the disks differ.
    pub(crate) const DIFFERENT: Self = Self::Failed;
    /// `compare`: a disk could not be opened.
    pub(crate) const UNOPENED: Self = Self::Damage;
    /// `compare`: what is allocated could not be found out.
    pub(crate) const UNMAPPED: Self = Self::Leaks;

    /// The number that the system gets.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Damage => 2,
            Self::Leaks => 3,
            Self::Unread => 4,
            Self::Unsupported => 63,
            Self::Usage => 64,
        }
    }
}

/// Why a command could not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    /// How the command ends.
    pub(crate) exit: Exit,
    message: String,
}

/// What a command comes to.
pub(crate) type Outcome<T = Exit> = Result<T, Failure>;

impl Failure {
    /// It could not be done.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::with(Exit::Failed, message)
    }

    /// The command line asks for what cannot be.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::with(Exit::Usage, message)
    }

    /// A format, or a feature of one, that is not handled.
    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::with(Exit::Unsupported, message)
    }

    pub(crate) fn with(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// A failure of the system on a file.
    pub(crate) fn io(path: &Path, doing: &str, error: &io::Error) -> Self {
        let advice = match error.kind() {
            io::ErrorKind::WouldBlock if doing == "open" => "; -U reads an image that is in use",
            io::ErrorKind::StorageFull => "; free some space and try again",
            _ => "",
        };
        Self::new(format!("{}: {doing}: {error}{advice}", path.display()))
    }

    /// The same failure with another exit code.
    pub(crate) fn ending(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The same failure with a sentence about what to do.
    pub(crate) fn advise(mut self, advice: &str) -> Self {
        self.message.push_str("; ");
        self.message.push_str(advice);
        self
    }
}

impl fmt::Display for Failure {
    /// One line, whatever names and messages bring along.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for line in self
            .message
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let gap = if first { "" } else { " " };
            first = false;
            write!(formatter, "{gap}{}", line.replace(char::is_control, "?"))?;
        }
        Ok(())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let failure = Self::with(exit_of(&error), error.to_string());
        match &error {
            Error::Corrupt { .. } => failure.advise("`tidemark check` lists all damage"),
            Error::Io { .. } if error.is_no_space() => {
                failure.advise("free some space and try again")
            }
            _ => failure,
        }
    }
}

/// How a failure of the engine ends: refusals that are about the format, not about the moment,
/// have a code of their own.
pub(crate) fn exit_of(error: &Error) -> Exit {
    match error.feature() {
        Some(
            Feature::NotQcow2 { .. }
            | Feature::Version(_)
            | Feature::Incompatible { .. }
            | Feature::Encryption(_)
            | Feature::SnapshotOfDataFile
            | Feature::BitmapsInVersion2,
        ) => Exit::Unsupported,
        _ => Exit::Failed,
    }
}

impl From<tidemark_checkpoint::Error> for Failure {
    fn from(error: tidemark_checkpoint::Error) -> Self {
        use tidemark_checkpoint::{Error, ErrorCode};
        let message = error.to_string();
        let exit = match &error {
            Error::Image { source, .. } => exit_of(source),
            Error::BadName { .. } | Error::DoubledDisk(_) => Exit::Usage,
            _ if error.code() == ErrorCode::InvalidArg => Exit::Usage,
            _ => Exit::Failed,
        };
        let failure = Self::with(exit, message);
        match &error {
            Error::NoSuchCheckpoint(_) => failure.advise("`checkpoint list` names all"),
            Error::PendingBackup { .. } => {
                failure.advise("`backup --resume` finishes it, `backup --cancel` ends it")
            }
            Error::Undecided { .. } => {
                failure.advise("give that disk too, or undo with `checkpoint create --abandon`")
            }
            Error::NoStore => failure.advise("--metadata DIR"),
            Error::NameTaken(_) | Error::BitmapExists { .. } => {
                failure.advise("choose another name")
            }
            _ => failure,
        }
    }
}
