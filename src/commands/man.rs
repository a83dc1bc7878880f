//! `man`: manual pages for packagers.

use clap::{Command, CommandFactory as _};

use crate::cli::Cli;
use crate::context::Context;
use crate::error::{Error, ExitStatus};

/// Prints the page of the program, or writes that page and one for each command to the folder `to`, as `lookalike-run.1`.
pub fn man(context: &Context, to: Option<&str>) -> Result<ExitStatus, Error> {
    let mut command = Cli::command().version(env!("CARGO_PKG_VERSION")).disable_help_subcommand(true);
    command.build();
    let Some(to) = to else {
        context.print(page(&command)?.trim_end())?;
        return Ok(ExitStatus::Success);
    };
    let store = context.stores.open(&context.locate("--to", to)?)?;
    let mut commands = vec![&command];
    let mut num_pages = 0;
    while let Some(command) = commands.pop() {
        commands.extend(command.get_subcommands());
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        context.block_on(store.put(&format!("{name}.1"), page(command)?.into()))?;
        num_pages += 1;
    }
    context.say(&format!("{num_pages} pages in {}", store.url()))?;
    Ok(ExitStatus::Success)
}

/// The page of a command, in roff. Signs beyond ASCII are written by their numbers, since what groff takes them for depends on where it runs.
fn page(command: &Command) -> Result<String, Error> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .render(&mut page)
        .map_err(|source| Error::Io { action: "write a manual page".to_owned(), source })?;
    let page = String::from_utf8_lossy(&page);
    let sign = |sign: char| if sign.is_ascii() { sign.to_string() } else { format!("\\[u{:04X}]", u32::from(sign)) };
    Ok(page.chars().map(sign).collect())
}
