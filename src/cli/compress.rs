//! `sdxl-squeeze compress`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sdxl_squeeze::calibration::calibrate;
use sdxl_squeeze::compress::{JobReport, Prepared, run as run_job, workspace_folder};
use sdxl_squeeze::config::{Overrides, RunConfig};
use sdxl_squeeze::memory::parse_size;
use sdxl_squeeze::number;
use sdxl_squeeze::output::{check_file, write_file};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::recipe::RunOptions;
use sdxl_squeeze::{Error, Result};

use super::paths::Paths;
use super::progress::Reporter;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run, in YAML (configs/ has the tutorial's)
    #[arg(long, value_name = "FILE.yaml")]
    config: PathBuf,
    /// The folder for the container, the config as resolved, and the report
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write the calibration samples too
    #[arg(long, value_name = "FILE.safetensors")]
    samples_out: Option<PathBuf>,
    /// Go on with a run in this folder that was ended before it was finished
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

/// What a run may take.
#[derive(Debug, Clone, clap::Args)]
pub struct LimitArgs {
    /// Memory to take at most, e.g. 8GiB; what the device has free, less a tenth, if not given
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
}

impl LimitArgs {
    /// The budget in bytes, if one is given.
    pub fn budget(&self) -> Result<Option<u64>> {
        self.memory_budget.as_deref().map(parse_size).transpose()
    }

    /// Where and how to compute, as config and flags say.
    pub fn options(&self, config: &RunConfig) -> Result<RunOptions> {
        Ok(RunOptions { budget: self.budget()?, ..RunOptions::of(config)? })
    }
}

/// Flags that win over the config.
#[derive(Debug, Clone, clap::Args)]
pub struct OverrideArgs {
    /// The pipeline: a folder in diffusers layout
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N, or several with commas
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Precision of activations: f32, f16 or bf16
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<String>,
    /// Calibration prompts, one a line
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Calibration samples made before or elsewhere
    #[arg(long, value_name = "FILE.safetensors")]
    samples: Option<PathBuf>,
    /// UNet calls to calibrate with
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    calibration_nsamples: Option<i64>,
    /// Denoising steps of the calibration runs
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    steps: Option<i64>,
    /// Guidance scale of the calibration runs
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Seed of the calibration runs
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Height of the calibration runs in pixels
    #[arg(long, value_name = "H", allow_negative_numbers = true)]
    height: Option<i64>,
    /// Width of the calibration runs in pixels
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    width: Option<i64>,
    /// How masks, weights and palettes are found: sequential or joint
    #[arg(long, value_name = "SOLVER")]
    solver: Option<String>,
    /// When the layers of a stage learn of each other: stage or sublayer
    #[arg(long, value_name = "WHEN")]
    granularity: Option<String>,
    /// What outputs are to be close to: current or dense
    #[arg(long, value_name = "WHAT")]
    target: Option<String>,
    /// Prompts that are only encoded, for the layers that see nothing but text and time
    #[arg(long, value_name = "FILE")]
    captions: Option<PathBuf>,
    /// Bytes of the result's tensors, e.g. 933MiB: settings are found for each layer
    #[arg(long, value_name = "SIZE")]
    target_size: Option<String>,
    /// Bits of a compressed weight in the mean: likewise
    #[arg(long, value_name = "BITS", allow_negative_numbers = true)]
    target_bits: Option<f64>,
    /// Share of the weights to prune
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    target_sparsity: Option<f64>,
    /// Prune n of every m weights instead, e.g. 2:4
    #[arg(long, value_name = "N:M")]
    n_m_ratio: Option<String>,
    /// Bits of a palette index: 1, 2, 3, 4, 6 or 8
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    n_bits: Option<i64>,
    /// Channels that share a palette
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    group_size: Option<i64>,
    /// Where a group does not divide the channels: error, smaller_group or dense
    #[arg(long, value_name = "WHAT")]
    on_misfit: Option<String>,
}

impl OverrideArgs {
    fn into_overrides(self) -> Overrides {
        let OverrideArgs {
            model,
            device,
            dtype,
            prompts,
            samples,
            calibration_nsamples,
            steps,
            guidance,
            seed,
            height,
            width,
            solver,
            granularity,
            target,
            captions,
            target_size,
            target_bits,
            target_sparsity,
            n_m_ratio,
            n_bits,
            group_size,
            on_misfit,
        } = self;
        Overrides {
            model,
            device,
            dtype,
            prompts,
            samples,
            calibration_nsamples,
            steps,
            guidance,
            seed,
            height,
            width,
            solver,
            granularity,
            target,
            captions,
            target_size,
            target_bits,
            target_sparsity,
            n_m_ratio,
            n_bits,
            group_size,
            on_misfit,
        }
    }

    /// The config in `path` with the flags applied.
    pub fn config(self, path: &Path) -> Result<RunConfig> {
        let mut config = RunConfig::read(path)?;
        config.apply(&self.into_overrides())?;
        Ok(config)
    }

    /// The same, and its model.
    pub fn resolve(self, path: &Path) -> Result<(RunConfig, PipelineFolder)> {
        let config = self.config(path)?;
        let folder = model_of(&config)?;
        Ok((config, folder))
    }
}

/// The model that a config names.
pub fn model_of(config: &RunConfig) -> Result<PipelineFolder> {
    let asked = || Error::Argument("which model? give --model DIR, or model: {path: DIR} in the config".into());
    PipelineFolder::open(config.model.path.as_deref().ok_or_else(asked)?)
}

pub fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let start = Instant::now();
    let (config, folder) = args.overrides.resolve(&args.config)?;
    let options = RunOptions { resume: args.resume, ..args.limits.options(&config)? };
    let [container, resolved, about] =
        ["unet.squeezed.safetensors", "config.yaml", "report.json"].map(|name| args.out.join(name));
    let outputs = Paths::default().run("--config", &args.config, &config).puts_into("--out", &args.out);
    let outputs = outputs.fills("the work folder", &workspace_folder(&container));
    let outputs = [&container, &resolved, &about].into_iter().fold(outputs, |outputs, path| outputs.writes("--out", Some(path)));
    outputs.writes("--samples-out", args.samples_out.as_deref()).check()?;
    let prepared = Prepared::new(&folder, &config, args.samples_out.is_some(), &options, &container)?;
    std::fs::create_dir_all(&args.out).map_err(Error::write(&args.out))?;

    let samples = match &args.samples_out {
        None => None,
        Some(path) => {
            check_file(path)?;
            let samples = calibrate(&folder, prepared.weights(), &config.calibration, &options, reporter)?;
            samples.write(path)?;
            Some(samples)
        }
    };
    reporter.end_on_interrupt()?;
    let report = run_job(&prepared, samples.as_ref(), reporter);
    if let Err(Error::Stopped) = report {
        super::print(&format!("stopped; the same command with --resume goes on from here ({})\n", args.out.display()))?;
    }
    let report = report?;
    write_file(&resolved, |out| out.write_all(report.config.to_yaml().as_bytes()))?;
    let json = serde_json::to_string_pretty(&report).map_err(|why| Error::Failed(why.to_string()))?;
    write_file(&about, |out| writeln!(out, "{json}"))?;

    let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!(", peak memory {}", number::size(peak)));
    super::print(&format!(
        "{}\n{}: {} ({}), {}{peak}\n",
        summary(&report),
        container.display(),
        number::size(report.bytes),
        number::count(report.bytes),
        number::time(start.elapsed().as_secs_f64()),
    ))
}

/// The stages in a table, and the warnings again, where they are not scrolled away.
fn summary(report: &JobReport) -> String {
    let mut table = super::table::new(&["stage", "layers", "sparsity", "bits", "bytes", "pruned", "stored", "weights"]);
    let mut stages: Vec<&str> = Vec::new();
    for layer in &report.layers {
        if stages.last() != Some(&layer.stage.as_str()) {
            stages.push(&layer.stage);
        }
    }
    let percent = |value: Option<f64>| value.map_or(String::new(), |value| format!("{:.2} %", 100.0 * value));
    for stage in stages {
        let layers: Vec<_> = report.layers.iter().filter(|layer| layer.stage == stage).collect();
        let elements = |shape: &[i64]| shape.iter().product::<i64>() as f64;
        let all: f64 = layers.iter().map(|layer| elements(&layer.shape)).sum();
        // Means over weights, each layer by its size.
        let mean = |pick: &dyn Fn(&sdxl_squeeze::compress::LayerReport) -> Option<f64>| -> Option<f64> {
            layers.iter().map(|layer| Some(pick(layer)? * elements(&layer.shape))).sum::<Option<f64>>().map(|sum| sum / all)
        };
        table.add_row([
            stage.to_owned(),
            layers.len().to_string(),
            percent(mean(&|layer| Some(layer.sparsity))),
            format!("{:.2}", mean(&|layer| Some(layer.bits_per_weight)).unwrap_or(0.0)),
            number::count(layers.iter().map(|layer| layer.bytes).sum()),
            percent(mean(&|layer| layer.errors.pruned_output)),
            percent(mean(&|layer| layer.errors.output)),
            percent(mean(&|layer| Some(layer.errors.weight))),
        ]);
    }
    let mut text = super::table::right_aligned(table, 1);
    text.push_str("\n(pruned, stored: output error on the calibration inputs; weights: distance of the weights)\n");
    for note in grouped(report) {
        text.push_str(&format!("note: {note}\n"));
    }
    text.push_str(&format!(
        "{:.2} % of the compressed weights are zero; {:.3} bits a weight",
        100.0 * report.sparsity,
        report.bits_per_weight
    ));
    text
}

/// The notes, those that say the same of many layers in one; the report has each of them.
fn grouped(report: &JobReport) -> Vec<String> {
    const FEW: usize = 3;
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for note in &report.notes {
        let layer = note.split_once(": ").filter(|(name, _)| report.layers.iter().any(|layer| layer.name == *name));
        let (name, what) = layer.unwrap_or(("", note));
        match groups.iter_mut().find(|(other, _)| *other == what) {
            Some((_, names)) => names.push(name),
            None => groups.push((what, vec![name])),
        }
    }
    let line = |(what, names): (&str, Vec<&str>)| match names[..] {
        [""] => vec![what.to_owned()],
        [first, .., last] if names.len() > FEW => vec![format!("{} layers, {first} to {last}: {what}", names.len())],
        _ => names.iter().map(|name| format!("{name}: {what}")).collect(),
    };
    groups.into_iter().flat_map(line).collect()
}
