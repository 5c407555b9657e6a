//! `demo`: the whole story on a real image, compared byte for byte with a disk in memory.
//!
//! - [`scenes`] tells it, one function a scene.
//! - [`stage`] is what the scenes share.
//! - [`guest`] plays the virtual machine, and remembers what every byte must be.
//! - [`story`] prints, and keeps the list of comparisons.
//! - [`outside`] asks qemu-img where it is installed.

mod guest;
mod outside;
mod scenes;
mod stage;
mod story;

use std::path::{Path, PathBuf};

use clap::Args;

use self::story::Story;
use crate::exit::{Exit, Failure, Outcome};
use crate::out::Out;

/// Tell the whole story on a real image; needs nothing but this binary
#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Directory to work in and keep; created, or must be empty
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl Demo {
    pub(crate) fn run(&self, out: &mut Out) -> Outcome {
        let mut story = Story::new(out);
        match &self.directory {
            Some(directory) => {
                claim(directory)?;
                scenes::play(&mut story, directory)?;
                story.end(Some(directory))
            }
            None => {
                let folder = tempfile::tempdir()
                    .map_err(|error| Failure::new(format!("temporary directory: {error}")))?;
                scenes::play(&mut story, folder.path())?;
                story.end(None)
            }
        }
    }
}

/// Creates the directory, or makes sure that it is empty.
fn claim(directory: &Path) -> Outcome<()> {
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::io(directory, "create directory", &error))?;
    let mut entries =
        std::fs::read_dir(directory).map_err(|error| Failure::io(directory, "list", &error))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(Failure::new(format!(
            "{}: not empty; name a new directory for the demo",
            directory.display()
        ))),
    }
}

/// What a finished story comes to.
fn verdict(failed: usize) -> Exit {
    if failed == 0 {
        Exit::Done
    } else {
        Exit::Failed
    }
}
