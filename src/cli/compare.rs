//! `sdxl-squeeze compare`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::calibration::{PromptSet, settings};
use sdxl_squeeze::compare::{Entry, Judging, Lpips, compare, container_path, row_path};
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
    /// Seed of the first judged picture; each further prompt has the next
    #[arg(long, value_name = "N", default_value_t = 231)]
    judge_seed: u64,
    /// Noises for each judged prompt; the k-th noise of a prompt has its seed + 2^20 k
    #[arg(long, value_name = "N", default_value_t = 1)]
    seeds: usize,
    /// UNet calls on which the error of the UNet's output is measured [default: one for each
    /// picture, at least 48]
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
    /// The config that all others are compared with, by the name of its file without .yaml
    /// [default: the first]
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
    /// Leaves out the dense model in fp16 (beside runs in fp16 or bf16: in fp32), whose row shows
    /// how far pictures differ by rounding alone
    #[arg(long)]
    no_noise_floor: bool,
    /// Weights of LPIPS with AlexNet as safetensors, to measure LPIPS too (docs/usage.md says how
    /// to make them)
    #[arg(long, value_name = "FILE")]
    lpips: Option<PathBuf>,
    /// Pictures of each model that the report shows, from the first on
    #[arg(long, value_name = "N", default_value_t = Judging::SHOWN)]
    pictures: usize,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut outputs = Paths::default().reads("--judge", Some(&args.judge)).puts_into("--out", &args.out);
    outputs = outputs.reads("--lpips", args.lpips.as_deref());
    for path in &args.configs {
        let config = args.edits.config(path)?;
        let name = path.file_stem().expect("a file that was read has a name").to_string_lossy().into_owned();
        let container = container_path(&args.out, &name);
        outputs = outputs.run("the config", path, &config);
        outputs = outputs
            .writes(&name, Some(&container))
            .writes(&name, Some(&row_path(&args.out, &name)))
            .fills(&name, &workspace_folder(&container));
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
    let set =
        PromptSet { prompts: read_prompts(&args.judge)?, seed: args.judge_seed, ..settings(&folder, &first.config.calibration)? };
    let judging = Judging {
        seeds: args.seeds,
        held_out: args.held_out,
        baseline: args.baseline,
        noise_floor: !args.no_noise_floor,
        lpips: args.lpips.as_deref().map(|path| Lpips::read(path, options.placement().device)).transpose()?,
        shown: args.pictures,
        ..Judging::of(set)
    };
    let comparison = compare(&folder, &entries, &judging, &options, &args.out, reporter)?;
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
