//! Mistakes in the command line: one line, exit code 64.

use clap::error::ErrorKind;

use crate::exit::{Exit, Failure};

/// Prints help and versions as asked for; everything else is a mistake.
pub(crate) fn judge(error: &clap::Error) -> Result<Exit, Failure> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            Ok(Exit::Done)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            Ok(Exit::Usage)
        }
        _ => Err(Failure::usage(one_line(&error.render().to_string()))),
    }
}

/// What is wrong and where help is, without usage and tips in between.
fn one_line(text: &str) -> String {
    let mut said = String::new();
    let mut help = "try 'tidemark --help'".to_owned();
    for line in text.lines().map(str::trim) {
        if let Some(usage) = line.strip_prefix("Usage: ") {
            let is_word = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
            let words: Vec<&str> = usage.split_whitespace().take_while(is_word).collect();
            help = format!("try '{} --help'", words.join(" "));
            break;
        }
        let line = line.trim_start_matches("error: ");
        if !line.is_empty() && !line.starts_with("For more information") {
            if !said.is_empty() {
                said.push(' ');
            }
            said.push_str(line);
        }
    }
    format!("{said}; {help}")
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_mistake_is_one_line_with_the_way_to_help() {
        let text = "error: the following required arguments were not provided:\n  <IMAGE>\n\n\
                    Usage: tidemark bitmap list <IMAGE>\n\nFor more information, try '--help'.\n";
        assert_eq!(
            one_line(text),
            "the following required arguments were not provided: <IMAGE>; \
             try 'tidemark bitmap list --help'"
        );
    }
}
