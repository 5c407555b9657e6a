//! The options of a new image, as `-o` gives them: one row each, for every command that makes or
//! measures images.
//!
//! Names and values are those of qemu-img. A feature of the format that a new image can have adds
//! one row to [`OPTIONS`] and, usually, one field to [`CreateOptions`].

use tidemark_qcow2::{
    BackingReference, CompressionType, CreateOptions, DataFileReference, Preallocation,
};

use crate::exit::{Failure, Outcome};
use crate::size;

/// What went wrong with one value.
enum Refusal {
    /// The value cannot be.
    Wrong(String),
    /// The value is fine, and such images cannot be made here.
    Unsupported(&'static str),
}

/// One option.
struct Row {
    name: &'static str,
    value: &'static str,
    help: &'static str,
    set: fn(&mut Creation, &str) -> Result<(), Refusal>,
}

/// Help of an option that no value makes possible.
const REFUSED: &str = "refused: encrypted images cannot be made";

/// All options, in the order in which help lists them.
const OPTIONS: &[Row] = &[
    Row {
        name: "backing_file",
        value: "<str>",
        help: "image that shows through where nothing is written",
        set: |wanted, value| {
            wanted.backing = Some(value.to_owned());
            Ok(())
        },
    },
    Row {
        name: "backing_fmt",
        value: "<str>",
        help: "format of the backing file: qcow2 or raw",
        set: |wanted, value| {
            wanted.backing_format = Some(value.to_owned());
            Ok(())
        },
    },
    Row {
        name: "cluster_size",
        value: "<size>",
        help: "bytes of a cluster, a power of two from 512 to 2M",
        set: |wanted, value| {
            let bytes = size::parse(value).map_err(Refusal::Wrong)?;
            if !bytes.is_power_of_two() {
                return wrong("must be a power of two between 512 and 2M");
            }
            wanted.options.cluster_bits = bytes.trailing_zeros();
            Ok(())
        },
    },
    Row {
        name: "compat",
        value: "<str>",
        help: "version: 0.10 (v2) or 1.1 (v3)",
        set: |wanted, value| {
            wanted.options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return wrong("must be 0.10 or 1.1"),
            };
            Ok(())
        },
    },
    Row {
        name: "compression_type",
        value: "<str>",
        help: "method of compressed clusters: zlib or zstd",
        set: |wanted, value| {
            wanted.options.compression_type = CompressionType::from_name(value)
                .map_or_else(|| wrong("must be zlib or zstd"), Ok)?;
            Ok(())
        },
    },
    Row {
        name: "data_file",
        value: "<str>",
        help: "file that holds the guest's data",
        set: |wanted, value| {
            if value.is_empty()
                || value
                    .split('/')
                    .next()
                    .is_some_and(|head| head.contains(':'))
            {
                return wrong("must be a plain path name");
            }
            wanted.data_file = Some(value.to_owned());
            Ok(())
        },
    },
    Row {
        name: "data_file_raw",
        value: "<on/off>",
        help: "the data file stays a raw image of the disk",
        set: |wanted, value| {
            wanted.data_file_raw = switch(value)?;
            Ok(())
        },
    },
    Row {
        name: "encrypt.cipher-alg",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.cipher-mode",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.format",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.hash-alg",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.iter-time",
        value: "<num>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.ivgen-alg",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.ivgen-hash-alg",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encrypt.key-secret",
        value: "<str>",
        help: REFUSED,
        set: |_, _| encrypted(),
    },
    Row {
        name: "encryption",
        value: "<on/off>",
        help: "off; encrypted images cannot be made",
        set: |_, value| {
            if switch(value)? {
                return encrypted();
            }
            Ok(())
        },
    },
    Row {
        name: "extended_l2",
        value: "<on/off>",
        help: "32 subclusters in a cluster",
        set: |wanted, value| {
            wanted.options.extended_l2 = switch(value)?;
            Ok(())
        },
    },
    Row {
        name: "lazy_refcounts",
        value: "<on/off>",
        help: "let others postpone refcount updates",
        set: |wanted, value| {
            wanted.options.lazy_refcounts = switch(value)?;
            Ok(())
        },
    },
    Row {
        name: "preallocation",
        value: "<str>",
        help: "off, metadata, falloc or full",
        set: |wanted, value| {
            wanted.options.preallocation = preallocation(value)
                .map_or_else(|| wrong("must be off, metadata, falloc or full"), Ok)?;
            Ok(())
        },
    },
    Row {
        name: "refcount_bits",
        value: "<num>",
        help: "width of a refcount, a power of two from 1 to 64",
        set: |wanted, value| {
            let bits = value.parse();
            wanted.options.refcount_bits =
                bits.or_else(|_| wrong("must be a number from 1 to 64"))?;
            Ok(())
        },
    },
    Row {
        name: "size",
        value: "<size>",
        help: "bytes of the disk",
        set: |wanted, value| {
            wanted.size = Some(size::parse(value).map_err(Refusal::Wrong)?);
            Ok(())
        },
    },
];

fn wrong<T>(problem: &str) -> Result<T, Refusal> {
    Err(Refusal::Wrong(problem.to_owned()))
}

/// A mode of preallocation by its name in qemu-img.
pub(crate) fn preallocation(name: &str) -> Option<Preallocation> {
    Some(match name {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return None,
    })
}

/// Options of encrypted images.
fn encrypted() -> Result<(), Refusal> {
    Err(Refusal::Unsupported(
        "encrypted images cannot be made; encrypt the device or the file system below instead",
    ))
}

/// A switch in the spellings of qemu-img.
fn switch(value: &str) -> Result<bool, Refusal> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => wrong("must be on or off"),
    }
}

/// What `-o` comes to.
#[derive(Debug)]
pub(crate) struct Creation {
    /// Everything but the size and the backing file, which may come from elsewhere too.
    pub(crate) options: CreateOptions,
    /// `size=`.
    pub(crate) size: Option<u64>,
    /// `backing_file=`.
    pub(crate) backing: Option<String>,
    /// `backing_fmt=`.
    pub(crate) backing_format: Option<String>,
    /// `data_file=`.
    pub(crate) data_file: Option<String>,
    /// `data_file_raw=`.
    pub(crate) data_file_raw: bool,
}

impl Creation {
    /// Reads the arguments of all `-o`; later ones win.
    pub(crate) fn parse(arguments: &[String]) -> Outcome<Self> {
        let mut wanted = Self {
            options: CreateOptions::new(0),
            size: None,
            backing: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
        };
        for (key, value) in pairs(arguments)? {
            wanted.set(&key, &value)?;
        }
        Ok(wanted)
    }

    /// Takes the backing file of `-b` and `-F` where `-o` names none.
    pub(crate) fn or_backing(&mut self, name: Option<&String>, format: Option<&String>) {
        self.backing = self.backing.take().or_else(|| name.cloned());
        self.backing_format = self.backing_format.take().or_else(|| format.cloned());
    }

    fn set(&mut self, key: &str, value: &str) -> Outcome<()> {
        let Some(row) = OPTIONS.iter().find(|row| row.name == key) else {
            let names: Vec<&str> = OPTIONS.iter().map(|row| row.name).collect();
            return Err(Failure::usage(format!(
                "-o {key}={value}: no such option; there are {}",
                names.join(", ")
            )));
        };
        (row.set)(self, value).map_err(|refusal| match refusal {
            Refusal::Wrong(problem) => Failure::usage(format!("-o {key}={value}: {problem}")),
            Refusal::Unsupported(reason) => {
                Failure::unsupported(format!("-o {key}={value}: {reason}"))
            }
        })
    }

    /// The external data file.
    pub(crate) fn data_file_reference(&self) -> Outcome<Option<DataFileReference>> {
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Failure::usage("-o data_file_raw=on: it needs data_file"));
        }
        Ok(self.data_file.as_ref().map(|name| DataFileReference {
            name: name.clone().into_bytes(),
            raw: self.data_file_raw,
        }))
    }

    /// The backing file, with the format that the command line must give.
    pub(crate) fn backing_reference(&self) -> Outcome<Option<BackingReference>> {
        let Some(name) = &self.backing else {
            return match self.backing_format {
                Some(_) => Err(Failure::usage(
                    "-F names the format of a backing file; add -b",
                )),
                None => Ok(None),
            };
        };
        let format = self.backing_format.clone().ok_or_else(|| {
            Failure::usage(format!(
                "backing file {name}: formats are not guessed; add -F qcow2"
            ))
        })?;
        if format != "qcow2" && format != "raw" {
            let message = format!("backing file {name}: format '{format}' is not supported");
            return Err(Failure::unsupported(message));
        }
        Ok(Some(BackingReference {
            name: name.clone().into_bytes(),
            format,
        }))
    }
}

/// Whether the options are to be listed and nothing else.
pub(crate) fn wants_help(arguments: &[String]) -> bool {
    arguments
        .iter()
        .any(|argument| matches!(argument.as_str(), "help" | "?"))
}

/// Whether `-o` knows this option.
pub(crate) fn has_option(name: &str) -> bool {
    OPTIONS.iter().any(|row| row.name == name)
}

/// The options as `-o help` lists them.
pub(crate) fn help() -> String {
    let names: Vec<&str> = OPTIONS.iter().map(|row| row.name).collect();
    help_of(&names)
}

/// The same for some of them.
pub(crate) fn help_of(names: &[&str]) -> String {
    let mut text = String::from("Supported qcow2 options:\n");
    for row in OPTIONS.iter().filter(|row| names.contains(&row.name)) {
        let option = format!("{}={}", row.name, row.value);
        text.push_str(&format!("  {option:<24} - {}\n", row.help));
    }
    text
}

/// `KEY=VALUE` pairs out of the arguments of all `-o`. A comma ends a pair; two stand for one.
pub(crate) fn pairs(arguments: &[String]) -> Outcome<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for argument in arguments {
        for option in split(argument) {
            let Some((key, value)) = option.split_once('=') else {
                return Err(Failure::usage(format!(
                    "-o {option}: write KEY=VALUE, as in cluster_size=64K; -o help lists the options"
                )));
            };
            pairs.push((key.to_owned(), value.to_owned()));
        }
    }
    Ok(pairs)
}

fn split(argument: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let mut characters = argument.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            options.push(String::new());
        } else if let Some(option) = options.last_mut() {
            option.push(character);
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::{Creation, OPTIONS, pairs, split};

    #[test]
    fn two_commas_stand_for_one() {
        assert_eq!(split("a=1,b=2"), ["a=1", "b=2"]);
        assert_eq!(
            split("backing_file=a,,b,size=1"),
            ["backing_file=a,b", "size=1"]
        );
        assert!(pairs(&["size".to_owned()]).is_err());
    }

    #[test]
    fn an_unknown_option_is_refused_with_the_list() {
        let error = Creation::parse(&["nothing=1".to_owned()]).expect_err("no such option");
        for row in OPTIONS {
            assert!(error.to_string().contains(row.name), "{error}");
        }
    }

    #[test]
    fn the_rows_stand_in_order() {
        assert!(OPTIONS.is_sorted_by_key(|row| row.name));
    }
}
