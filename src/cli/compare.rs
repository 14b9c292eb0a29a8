//! `sdxl-squeeze compare`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::calibration::{PromptSet, settings, settings_for};
use sdxl_squeeze::compare::{
    Entry, Judging, Lpips, Part, compare, container_path, judge_part, make_containers, merge, prices_path, row_path,
};
use sdxl_squeeze::compress::workspace_folder;
use sdxl_squeeze::config::{Feed, RunConfig, read_prompts};
use sdxl_squeeze::output::write_file;
use sdxl_squeeze::pipeline::LoraFile;
use sdxl_squeeze::report::{self, Comparison};
use sdxl_squeeze::{Error, Result};

use super::edits::{Edits, model_of};
use super::entries::{self, Named};
use super::limits::LimitArgs;
use super::paths::Paths;
use super::progress::Reporter;
use super::stdout;

#[derive(Debug, clap::Args)]
#[command(override_usage = "sdxl-squeeze compare [OPTIONS] --out <DIR> --judge <FILE> <CONFIG.yaml>...
       sdxl-squeeze compare [OPTIONS] --out <DIR> --judge <FILE> --sweep <LOW..HIGH[:STEP]> [CONFIG.yaml]...
       sdxl-squeeze compare --merge <DIR> [--out <DIR>]")]
pub(super) struct Args {
    /// The runs to compare [default with --sweep: the tutorial's recipes]
    #[arg(value_name = "CONFIG.yaml", required_unless_present_any = ["merge", "sweep"], conflicts_with = "merge")]
    configs: Vec<PathBuf>,
    /// Draw the curve of error against size: compress to each mean of bits a weight from LOW to
    /// HIGH, in steps of STEP [default: 0.5], and show the CONFIGs beside the curve
    #[arg(long, value_name = "LOW..HIGH[:STEP]", conflicts_with = "merge")]
    sweep: Option<String>,
    /// The config to draw the curve of, whose budget's target the sweep replaces; repeatable, for a
    /// curve each [default: the program's own configs/squeeze-3bits.yaml]
    #[arg(long = "config", value_name = "FILE.yaml", requires = "sweep")]
    bases: Vec<PathBuf>,
    /// Draw the curves alone, without the tutorial's recipes
    #[arg(long, requires = "sweep", conflicts_with = "configs")]
    no_points: bool,
    /// The folder for report.html, report.json, the contact sheet and the containers [with
    /// --merge: the folder of the parts]
    #[arg(long, value_name = "DIR", required_unless_present = "merge")]
    out: Option<PathBuf>,
    /// Prompts to judge the results on, one a line; no run may be calibrated on any of them
    #[arg(long, value_name = "FILE", required_unless_present = "merge", conflicts_with = "merge")]
    judge: Option<PathBuf>,
    /// Seed of the first judged picture; each further prompt has the next
    #[arg(long, value_name = "N", default_value_t = Judging::SEED, conflicts_with = "merge")]
    judge_seed: u64,
    /// Noises for each judged prompt; the k-th noise of a prompt has its seed + 2^20 k
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "merge")]
    seeds: usize,
    /// UNet calls on which the error of the UNet's output is measured [default: one for each
    /// picture, at least 48]
    #[arg(long, value_name = "N", conflicts_with = "merge")]
    held_out: Option<usize>,
    /// The config that all others are compared with, by the name of its file without .yaml
    /// [default: the first]
    #[arg(long, value_name = "NAME", conflicts_with = "merge")]
    baseline: Option<String>,
    /// Leave out the dense model in fp16 (beside runs in fp16 or bf16: in fp32), whose row shows
    /// how far pictures differ by rounding alone
    #[arg(long, conflicts_with = "merge")]
    no_noise_floor: bool,
    /// Weights of LPIPS with AlexNet as safetensors, to measure LPIPS too (docs/usage.md says how
    /// to make them)
    #[arg(long, value_name = "FILE", conflicts_with = "merge")]
    lpips: Option<PathBuf>,
    /// Pictures of each model that the report shows, from the first on
    #[arg(long, value_name = "N", default_value_t = Judging::SHOWN, conflicts_with = "merge")]
    pictures: usize,
    /// What the UNet is given when results are judged: as diffusers does, or as Apple's Swift
    /// pipeline [default: the first of the first config's mix, which is diffusers]
    #[arg(long, value_name = "FEED", value_parser = Feed::ALL.map(Feed::name), conflicts_with = "merge")]
    feed: Option<String>,
    /// Compress and do not judge: the first step of judging in parts
    #[arg(long, conflicts_with_all = ["part", "merge"])]
    containers_only: bool,
    /// Judge the K-th of N parts of the pictures, with the containers of --containers-only, into
    /// one file in --out; a part that is there already is not drawn again
    #[arg(long, value_name = "K/N", conflicts_with = "merge")]
    part: Option<String>,
    /// Make the report of the parts in DIR, or say which are missing
    #[arg(long, value_name = "DIR")]
    merge: Option<PathBuf>,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    if let Some(parts) = &args.merge {
        return merged(parts, &args);
    }
    let (Some(out), Some(judge)) = (&args.out, &args.judge) else {
        return Err(Error::Argument("--out and --judge are needed".into()));
    };
    let sweep = args.sweep.as_deref().map(|text| text.parse().map_err(|why| Error::Argument(format!("--sweep {text} {why}"))));
    let named = match sweep.transpose()? {
        Some(sweep) => entries::of_sweep(sweep, &args.bases, &args.configs, args.no_points, &args.edits)?,
        None => entries::of_configs(&args.configs, &args.edits)?,
    };
    let mut curves: Vec<String> = Vec::new();
    let mut outputs = Paths::default().prompts("--judge", Some(judge)).puts_into("--out", out);
    outputs = outputs.reads("--lpips", args.lpips.as_deref());
    for Named { path, entry } in &named {
        let Entry { name, config, curve } = entry;
        let container = container_path(out, name);
        outputs = outputs.run("the config", path, config);
        outputs = outputs.writes(name, Some(&container)).writes(name, Some(&row_path(out, name)));
        outputs = outputs.fills(name, &workspace_folder(&container));
        if let Some(curve) = curve.as_ref().filter(|curve| !curves.contains(curve)) {
            outputs = outputs.writes(curve, Some(&prices_path(out, curve)));
            curves.push(curve.clone());
        }
        if let Some(first) = named.first() {
            check_alike((&first.path, &first.entry.config), (path, config))?;
        }
    }
    let entries: Vec<Entry> = named.into_iter().map(|named| named.entry).collect();
    let Some(first) = entries.first() else { return Err(Error::Argument("there is nothing to compare".into())) };
    let part =
        args.part.as_deref().map(|text| text.parse::<Part>().map_err(|why| Error::Argument(format!("--part {text} {why}"))));
    let part = part.transpose()?;
    for path in REPORT.map(|name| out.join(name)).into_iter().chain(part.map(|part| part.path(out))) {
        outputs = outputs.writes("--out", Some(&path));
    }
    outputs.check()?;
    let folder = model_of(&first.config)?;
    let options = args.limits.options(&first.config)?;
    let section = &first.config.calibration;
    let feed = args.feed.as_deref().and_then(|name| Feed::ALL.into_iter().find(|feed| feed.name() == name));
    let set = match feed {
        Some(feed) => settings_for(&folder, section, feed)?,
        None => settings(&folder, section)?,
    };
    let set = PromptSet { prompts: read_prompts(judge)?, seed: args.judge_seed, ..set };
    let judging = Judging {
        seeds: args.seeds,
        held_out: args.held_out,
        baseline: args.baseline,
        noise_floor: !args.no_noise_floor,
        lpips: args.lpips.as_deref().map(|path| Lpips::read(path, options.placement().device)).transpose()?,
        shown: args.pictures,
        ..Judging::of(set)
    };
    if args.containers_only {
        return make_containers(&folder, &entries, &judging, &options, out, reporter);
    }
    if let Some(part) = part {
        let path = judge_part(&folder, &entries, &judging, &options, (out, part), reporter)?;
        return stdout::print(&format!("{}\n", path.display()));
    }
    write_report(&compare(&folder, &entries, &judging, &options, out, reporter)?, out)
}

/// The files of a report.
const REPORT: [&str; 4] = ["report.html", "report.json", "table.md", "curve.svg"];

/// Makes the report of the parts in a folder.
fn merged(parts: &Path, args: &Args) -> Result<()> {
    if !args.edits.is_empty() || args.limits.budget()?.is_some() {
        return Err(Error::Argument("--merge takes no flags of runs, since the parts have been judged".into()));
    }
    let out = args.out.as_deref().unwrap_or(parts);
    let outputs = REPORT.iter().fold(Paths::default(), |outputs, name| outputs.writes("--out", Some(&out.join(name))));
    outputs.check()?;
    write_report(&merge(parts)?, out)
}

/// Writes the report into `out` and prints its table.
fn write_report(comparison: &Comparison, out: &Path) -> Result<()> {
    let written = report::write(comparison, out)?;
    write_file(&out.join("table.md"), |out| out.write_all(report::table::markdown(comparison).as_bytes()))?;
    stdout::print(&format!("{}\n{}\n", report::table::plain(comparison), written.html.display()))
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
