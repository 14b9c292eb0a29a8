//! The command line: arguments, progress bars, tables, error messages and exit codes.

mod beside_model;
mod bundle;
mod bundled;
mod compare;
mod compare_networks;
mod completions;
mod compress;
mod configs;
mod container;
mod device_limit;
mod doctor;
mod edits;
mod entries;
mod environment;
mod export;
mod failure;
mod generate;
mod inspect;
mod json_log;
mod limits;
mod man;
mod opened;
mod own_files;
mod paths;
mod place;
mod plan;
mod profile;
mod progress;
mod stdout;
mod synth;
mod table;
mod terminal;
mod verify;
mod version;
mod wanted;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use json_log::JsonLog;
use paths::Paths;
use profile::Profile;
use progress::{Mode, Reporter};
use sdxl_squeeze::Error;
use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use version::VERSION;

/// Makes the SDXL UNet small enough for a phone and keeps its pictures.
#[derive(Debug, Parser)]
#[command(name = "sdxl-squeeze", version = VERSION, max_term_width = 100)]
struct Args {
    /// Print nothing but errors and the result
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Progress on standard error: bars on a terminal and lines elsewhere, or JSON lines for
    /// programs
    #[arg(long, global = true, value_name = "auto|json|none", default_value = "auto")]
    progress: Mode,
    /// Log more: -v each step, -vv everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Write the time of each kind of step to FILE, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Replace files that are there already, each in one step once the new one is whole; folders
    /// and packages are never replaced
    #[arg(long, global = true)]
    overwrite: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compress a UNet as a config says
    Compress(compress::Args),
    /// Compress with several configs and report size and quality of each
    Compare(compare::Args),
    /// Measure how far compressed text encoders and a compressed VAE move embeddings and pictures
    CompareNetworks(compare_networks::Args),
    /// Show the work, time, memory and result size of a compression without running it
    Plan(plan::Args),
    /// Check a container or a Core ML package: structure, counts and hashes
    Verify(verify::Args),
    /// Write a model for other programs: a diffusers folder, a Core ML package
    Export(export::Args),
    /// Write everything that Apple's Swift pipeline reads: Core ML packages of all networks, and
    /// the vocabulary
    Bundle(bundle::Args),
    /// Draw a picture from a prompt
    Generate(Box<generate::Args>),
    /// Show a model's stages and layers with their shapes, parameters and bytes
    Inspect(inspect::Args),
    /// Write a whole pipeline with made-up weights, for tests and benchmarks
    Synth(synth::Args),
    /// List the configs in the program, or print one
    Configs(configs::Args),
    /// Say what a run would find on this machine, and what would fail
    Doctor(doctor::Args),
    /// Print a shell's completion script
    Completions(completions::Args),
    /// Print the man page, or write those of all commands
    Man(man::Args),
}

/// Runs the program and returns its exit code. A failure is one line on standard error.
pub(crate) fn main() -> ExitCode {
    // TF32 would cut fp32 to ten bits of mantissa on a GPU. `init` below turns it off inside
    // libtorch. The variable also reaches NVIDIA's libraries in a libtorch without the functions
    // that `init` calls.
    // SAFETY: this is the program's first statement; no other thread reads the environment yet.
    unsafe { std::env::set_var("NVIDIA_TF32_OVERRIDE", "0") };
    sdxl_squeeze::init();
    match Args::try_parse() {
        Ok(args) => ExitCode::from(failure::exit_code(args.progress == Mode::Json, || run(args))),
        Err(answer) => tell(&answer),
    }
}

/// Prints clap's answer: help or the version to standard output, a mistake to standard error.
fn tell(answer: &clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(2));
    let printed = answer.print().and_then(|()| io::stdout().flush());
    match printed {
        Err(why) if !answer.use_stderr() && why.kind() != io::ErrorKind::BrokenPipe => {
            failure::report(&Error::write("standard output".as_ref())(why), false);
            ExitCode::from(1)
        }
        _ => code,
    }
}

/// Prepares the process for any command.
fn prepare() -> Result<(), Error> {
    place::check()?;
    // A write beyond `ulimit -f` kills a program that does not catch the signal. With a handler the
    // write fails instead, and is reported like any other failure. Windows has no such limit.
    #[cfg(unix)]
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default())
        .map_err(|why| Error::Failed(format!("the signal of the file size limit cannot be caught: {why}")))?;
    Ok(())
}

fn run(args: Args) -> Result<(), Error> {
    prepare()?;
    let reporter = Reporter::new(if args.quiet { Mode::None } else { args.progress });
    let level = match (args.quiet, args.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::WARN,
        (false, 1) => Level::INFO,
        (false, _) => Level::DEBUG,
    };
    let (json, lines) = match args.progress {
        Mode::Json => (Some(JsonLog), None),
        Mode::Auto | Mode::None => {
            let log = reporter.log_writer();
            let lines = tracing_subscriber::fmt::layer().with_writer(move || log.clone()).with_ansi(terminal::has_colours());
            (None, Some(lines.without_time().with_target(false)))
        }
    };
    let level = LevelFilter::from_level(level);
    Paths::default().writes("--profile", args.profile.as_deref()).check_new(args.overwrite)?;
    let profile = args.profile.map(|path| (path, Profile::default()));
    let times = profile.as_ref().map(|(_, profile)| profile.clone());
    let log = tracing_subscriber::registry().with(lines.with_filter(level)).with(json.with_filter(level));
    log.with(times).init();
    if matches!(args.command, Command::Compress(_) | Command::Compare(_) | Command::CompareNetworks(_)) {
        environment::settle();
    }
    let result = command(args.command, args.overwrite, &reporter);
    // A run that was stopped has a profile, too.
    let written = profile.map_or(Ok(()), |(path, profile)| profile.write(&path));
    result.and(written)
}

fn command(command: Command, overwrite: bool, reporter: &Reporter) -> Result<(), Error> {
    match command {
        Command::Compress(args) => compress::run(args, overwrite, reporter),
        Command::Compare(args) => compare::run(args, reporter),
        Command::CompareNetworks(args) => compare_networks::run(args, reporter),
        Command::Plan(args) => plan::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Export(args) => export::run(args, overwrite, reporter),
        Command::Bundle(args) => bundle::run(args, reporter),
        Command::Generate(args) => generate::run(*args, overwrite, reporter),
        Command::Inspect(args) => inspect::run(args),
        Command::Synth(args) => synth::run(args, overwrite, reporter),
        Command::Configs(args) => configs::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args, Args::command()),
        Command::Man(args) => man::run(args, overwrite, Args::command()),
    }
}
