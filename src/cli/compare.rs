//! `sdxl-squeeze compare`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::calibration::{PromptSet, settings};
use sdxl_squeeze::compare::{Entry, compare, container_path};
use sdxl_squeeze::compress::workspace_folder;
use sdxl_squeeze::config::{RunConfig, read_prompts};
use sdxl_squeeze::output::write_file;
use sdxl_squeeze::pipeline::LoraFile;
use sdxl_squeeze::report;
use sdxl_squeeze::{Error, Result};

use super::edits::{Edits, model_of};
use super::limits::LimitArgs;
use super::paths::Paths;
use super::progress::Reporter;
use super::stdout;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The runs to compare
    #[arg(value_name = "CONFIG.yaml", required = true)]
    configs: Vec<PathBuf>,
    /// The folder for report.html, report.json, the contact sheet and the containers
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Prompts to judge the results on, one a line; no run may be calibrated on any of them
    #[arg(long, value_name = "FILE")]
    judge: PathBuf,
    /// Seed of the first judged picture; each further one has the next
    #[arg(long, value_name = "N", default_value_t = 231)]
    judge_seed: u64,
    /// UNet calls on which the error of the UNet's output is measured
    #[arg(long, value_name = "N", default_value_t = 48)]
    held_out: usize,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut outputs = Paths::default().reads("--judge", Some(&args.judge)).puts_into("--out", &args.out);
    for path in &args.configs {
        let config = args.edits.config(path)?;
        let name = path.file_stem().expect("a file that was read has a name").to_string_lossy().into_owned();
        let container = container_path(&args.out, &name);
        outputs = outputs.run("the config", path, &config);
        outputs = outputs.writes(&name, Some(&container)).fills(&name, &workspace_folder(&container));
        if let Some(first) = entries.first() {
            check_alike((&args.configs[0], &first.config), (path, &config))?;
        }
        entries.push(Entry { name, config });
    }
    let Some(first) = entries.first() else { return Err(Error::Argument("there is nothing to compare".into())) };
    for name in ["report.html", "report.json", "table.md"] {
        outputs = outputs.writes("--out", Some(&args.out.join(name)));
    }
    outputs.check()?;
    let folder = model_of(&first.config)?;
    let options = args.limits.options(&first.config)?;
    let judged =
        PromptSet { prompts: read_prompts(&args.judge)?, seed: args.judge_seed, ..settings(&folder, &first.config.calibration)? };
    let comparison = compare(&folder, &entries, judged, args.held_out, &options, &args.out, reporter)?;
    let written = report::write(&comparison, &args.out)?;
    write_file(&args.out.join("table.md"), |out| out.write_all(report::table::markdown(&comparison).as_bytes()))?;
    stdout::print(&format!("{}\n{}\n", report::table::plain(&comparison), written.html.display()))
}

/// Refuses to compare configs that name different models, devices or dtypes: all results are judged
/// against one dense model.
fn check_alike((first, one): (&Path, &RunConfig), (second, other): (&Path, &RunConfig)) -> Result<()> {
    let shown = |path: &Option<PathBuf>| path.as_ref().map_or("none".to_owned(), |path| path.display().to_string());
    // Two names of one folder are one model.
    let real = |path: &Option<PathBuf>| path.as_ref().map(|path| path.canonicalize().unwrap_or_else(|_| path.clone()));
    let listed = |loras: &[LoraFile]| match loras {
        [] => "none".to_owned(),
        loras => loras.iter().map(LoraFile::to_string).collect::<Vec<_>>().join(", "),
    };
    let text = |pattern: &Option<String>| pattern.clone().unwrap_or_else(|| "none".to_owned());
    let (one, other) = (&one.model, &other.model);
    let differing = [
        ("model", real(&one.path) != real(&other.path), shown(&one.path), shown(&other.path)),
        ("base", real(&one.base) != real(&other.base), shown(&one.base), shown(&other.base)),
        ("vae", real(&one.vae) != real(&other.vae), shown(&one.vae), shown(&other.vae)),
        ("lora", one.loras != other.loras, listed(&one.loras), listed(&other.loras)),
        ("lora-ignore", one.lora_ignore != other.lora_ignore, text(&one.lora_ignore), text(&other.lora_ignore)),
        ("device", one.device != other.device, one.device.clone(), other.device.clone()),
        ("dtype", one.dtype != other.dtype, one.dtype.clone(), other.dtype.clone()),
    ];
    match differing.into_iter().find(|(_, differs, ..)| *differs) {
        None => Ok(()),
        Some((flag, _, one, other)) => Err(Error::Argument(format!(
            "{} names the {flag} {one}, and {} {other}: they cannot be compared; give --{flag} for all",
            first.display(),
            second.display()
        ))),
    }
}
