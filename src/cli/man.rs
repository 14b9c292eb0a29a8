//! `sdxl-squeeze man`.

use std::path::PathBuf;

use clap::Command;
use clap_mangen::Man;
use sdxl_squeeze::output::write_file;
use sdxl_squeeze::{Error, Result};

use super::paths::Paths;
use super::stdout;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write the pages of all commands into this folder, instead of the first one to standard
    /// output
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// `command` is the whole program.
pub(super) fn run(args: Args, overwrite: bool, mut command: Command) -> Result<()> {
    // Gives the subcommands their full names.
    command.build();
    let Some(out) = args.out else { return stdout::print(&page(&command)) };
    std::fs::create_dir_all(&out).map_err(Error::write(&out))?;
    let subcommands = command.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    let pages = std::iter::once(&command).chain(subcommands);
    let pages: Vec<_> = pages.map(|command| (out.join(Man::new(command.clone()).get_filename()), command)).collect();
    let files = pages.iter().fold(Paths::default(), |files, (path, _)| files.writes("--out", Some(path)));
    files.check_new(overwrite)?;
    for (path, command) in pages {
        write_file(&path, |file| file.write_all(page(command).as_bytes()))?;
    }
    stdout::print(&format!("{}\n", out.display()))
}

fn page(command: &Command) -> String {
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page).expect("memory can be written to");
    String::from_utf8(page).expect("man pages are text")
}
