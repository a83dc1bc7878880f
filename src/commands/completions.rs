//! `completions`: a script for the user's shell.

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::error::ExitStatus;

/// Prints the completion script of a shell.
pub fn completions(shell: clap_complete::Shell) -> ExitStatus {
    clap_complete::generate(shell, &mut Cli::command(), "lookalike", &mut std::io::stdout().lock());
    ExitStatus::Success
}
