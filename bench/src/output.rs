//! What a measurement prints: a reader that goes away (`granary-bench codec | head -1`) is no panic.

use std::error::Error;
use std::fmt::Arguments;
use std::io::{self, Write};
use std::process::ExitCode;

/// 128 + SIGPIPE (13), as a shell shows it for tools that a closed pipe ended.
const CLOSED_PIPE: u8 = 141;

/// Prints a line at once.
///
/// # Errors
/// The reader is gone, or the disk behind it is full.
pub(crate) fn line(text: Arguments<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Says on standard error why the process fails, and gives its exit code. A reader that is gone is not worth a word.
pub(crate) fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::from(CLOSED_PIPE);
    }
    say(format_args!("{error}"));
    ExitCode::FAILURE
}

/// A line on standard error; one that nobody reads is no failure.
pub(crate) fn say(text: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "granary-bench: {text}");
}
