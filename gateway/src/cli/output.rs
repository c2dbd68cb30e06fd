//! What a verb prints, and what is said when it fails: the one place that writes to standard output and standard error.
//!
//! A reader that goes away (`granary map | head -1`) is no failure worth a word: the verb ends quietly with the exit
//! code that a shell shows for other tools that a closed pipe ended, 128 + SIGPIPE.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

/// 128 + SIGPIPE (13).
const CLOSED_PIPE: u8 = 141;
/// Longest message of an error, in characters: some quote what they were given.
const MAX_ERROR_CHARS: usize = 2000;

/// Standard output does not take more.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub struct OutputError(#[source] pub io::Error);

/// Prints what `write` writes, all of it, before it returns.
///
/// # Errors
/// The reader is gone, or the disk behind it is full.
pub fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), OutputError> {
    let mut out = BufWriter::new(io::stdout().lock());
    write(&mut out).and_then(|()| out.flush()).map_err(OutputError)
}

/// Prints a value as JSON.
///
/// # Errors
/// As [`print`].
pub fn print_json<T: serde::Serialize>(value: &T) -> Result<(), OutputError> {
    print(|out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        writeln!(out)
    })
}

/// Says on standard error why the process fails, in one line, and gives its exit code.
pub fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    if error.downcast_ref::<OutputError>().is_some_and(|error| error.0.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::from(CLOSED_PIPE);
    }
    say(&one_line(&error.to_string()));
    ExitCode::FAILURE
}

/// A line on standard error; one that nobody reads is no failure.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "granary: {text}");
}

/// What clap found: help and version go to standard output, mistakes to standard error.
pub fn clap(found: &clap::Error) -> ExitCode {
    match found.print() {
        Ok(()) => ExitCode::from(u8::try_from(found.exit_code()).unwrap_or(2)),
        Err(error) => failed(&OutputError(error)),
    }
}

/// A message as one line of printable characters.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        for character in word.chars() {
            // A control character from outside must not steer the terminal.
            if character.is_control() {
                let _ = write!(line, "{}", character.escape_default());
            } else {
                line.push(character);
            }
        }
    }
    match line.char_indices().nth(MAX_ERROR_CHARS) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_of_bounded_length() {
        assert_eq!(one_line("no such file:\n  at line 3\t(x)\u{1b}[31m"), "no such file: at line 3 (x)\\u{1b}[31m");
        let long = one_line(&"é".repeat(MAX_ERROR_CHARS * 2));
        assert_eq!(long.chars().count(), MAX_ERROR_CHARS + 3);
    }
}
