//! The rule for names of checkpoints, which are also names of bitmaps and of files.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Longest name, bytes: with a suffix of its own it still fits a file name.
pub const MAX_NAME_BYTES: usize = 250;

/// Refuses what does not match `[A-Za-z0-9_-][A-Za-z0-9_.-]*` or is longer than
/// [`MAX_NAME_BYTES`].
///
/// # Errors
/// [`Error::BadName`] with the rule that is broken.
pub fn check(name: &str) -> Result<()> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it is longer than 250 bytes"
    } else if name.starts_with('.') {
        "it starts with a dot"
    } else if !name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    {
        "only letters, digits, '_', '.' and '-' are allowed"
    } else {
        return Ok(());
    };
    Err(Error::BadName {
        name: name.to_owned(),
        problem,
    })
}

/// The name of a checkpoint that was given none: `created`, in seconds, with a suffix if taken.
pub(crate) fn from_time(created: u64, taken: &HashSet<String>) -> String {
    let plain = created.to_string();
    if !taken.contains(&plain) {
        return plain;
    }
    (1_u64..)
        .map(|number| format!("{plain}-{number}"))
        .find(|name| !taken.contains(name))
        .unwrap_or(plain)
}

/// Seconds since the epoch; 0 on a clock that stands before it.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a b",
            "caf\u{e9}",
            "a\n",
            &"x".repeat(251),
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "-", "_x.y-z", "1525889631", &"x".repeat(250)] {
            assert!(check(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_taken_second_gets_a_suffix() {
        let mut taken = HashSet::new();
        for expected in ["7", "7-1", "7-2"] {
            let name = from_time(7, &taken);
            assert_eq!(name, expected);
            taken.insert(name);
        }
    }
}
