//! `sdxl-squeeze compress`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sdxl_squeeze::calibration::calibrate;
use sdxl_squeeze::compare::{Closeness, Reached, Reaching, reach};
use sdxl_squeeze::compress::{
    JobReport, NetworkReport, Prepared, PreparedNetwork, check_disk_of, is_unfinished, run as run_job, workspace_folder,
};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::number;
use sdxl_squeeze::output::{check_file, write_file};
use sdxl_squeeze::pipeline::{DenseUnet, PipelineFolder};
use sdxl_squeeze::plan::Plan;
use sdxl_squeeze::recipe::RunOptions;
use sdxl_squeeze::{Error, Result};

use super::edits::Edits;
use super::limits::LimitArgs;
use super::own_files::{REPORT, RESOLVED, check_own};
use super::paths::Paths;
use super::progress::Reporter;
use super::wanted::{self, Wanted};
use super::{stdout, table};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The run, in YAML, see docs/config.md; or the name of a config in the program, which
    /// `sdxl-squeeze configs` lists
    #[arg(long, value_name = "FILE.yaml|NAME")]
    config: Option<PathBuf>,
    /// Compress to a file of this size at most, e.g. 1GB, without a config: each layer gets what
    /// spares most for its bytes, as configs/squeeze-3bits.yaml says
    #[arg(long, value_name = "SIZE", conflicts_with = "config")]
    size: Option<String>,
    /// The folder for the container, the config as resolved, and the report
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write the calibration samples too
    #[arg(long, value_name = "FILE.safetensors")]
    samples_out: Option<PathBuf>,
    /// Continue an unfinished run in this folder
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
}

impl Args {
    /// The run that the flags ask for.
    fn wanted(&self) -> Result<Wanted> {
        match (&self.config, &self.size) {
            (Some(path), _) => Wanted::by_config(path, &self.edits),
            (None, Some(size)) => Wanted::by_size(size, &self.edits),
            (None, None) => Err(wanted::nothing()),
        }
    }
}

pub(super) fn run(args: Args, overwrite: bool, reporter: &Reporter) -> Result<()> {
    let start = Instant::now();
    let Wanted { path, config, model, size } = args.wanted()?;
    let options = RunOptions { resume: args.resume, ..args.limits.options(&config)? };
    let [container, resolved, about] = ["unet.squeezed.safetensors", RESOLVED, REPORT].map(|name| args.out.join(name));
    let outputs = Paths::default().run("--config", &path, &config).puts_into("--out", &args.out);
    let outputs = outputs.fills("the work folder", &workspace_folder(&container));
    let networks = networks(model.unet(), &config, &options, &args.out)?;
    let outputs = networks.iter().fold(outputs, |outputs, network| {
        outputs.fills("the work folder", &workspace_folder(network.path())).writes("--out", Some(network.path()))
    });
    if let (false, Some(path)) = (config.compresses_unet(), &args.samples_out) {
        return Err(Error::Argument(format!(
            "--samples-out {} has no effect: the config compresses no UNet, whose samples it would write",
            path.display()
        )));
    }
    let outputs = [&container, &resolved, &about].into_iter().fold(outputs, |outputs, path| outputs.writes("--out", Some(path)));
    let outputs = outputs.writes("--samples-out", args.samples_out.as_deref());
    outputs.check()?;
    let shares = args.samples_out.is_some();
    if shares {
        model.pipeline("--samples-out")?;
    }
    check_own(&args.out)?;
    // A run that is resumed finds files of its own.
    if !args.resume && !overwrite {
        check_no_run(std::iter::once(container.as_path()).chain(networks.iter().map(PreparedNetwork::path)))?;
        outputs.check_new(overwrite)?;
    }
    let task = match config.compresses_unet() {
        true => Some(task(model.unet(), &config, shares, &options, &container)?),
        false => None,
    };
    check_disk_of(&networks, task.as_ref().map(|task| &task.plan().disk))?;
    std::fs::create_dir_all(&args.out).map_err(Error::write(&args.out))?;

    let samples = match &args.samples_out {
        None => None,
        Some(path) => {
            check_file(path)?;
            let folder = model.pipeline("--samples-out")?;
            let samples = calibrate(folder, &folder.unet_weights()?, &config.calibration, &options, reporter)?;
            samples.write(path)?;
            Some(samples)
        }
    };
    reporter.end_on_interrupt()?;
    // The other networks come first: their layers are kept until the UNet is done, too.
    let reports = networks.iter().map(|network| network.run(reporter)).collect::<Result<Vec<_>>>();
    let done = reports.and_then(|reports| {
        let done = match task {
            None => Ok(Done { config: config.to_yaml(), report: "{}".into(), summary: String::new() }),
            Some(Task::Run(prepared)) => run_job(&prepared, samples.as_ref(), reporter).and_then(Done::of_run),
            Some(Task::Search(reaching)) => reach(*reaching, samples.as_ref(), reporter).and_then(Done::of_search),
        };
        done.and_then(|done| done.with_networks(&networks, &reports))
    });
    if let Err(Error::Stopped) = done {
        stdout::print(&format!("stopped; the same command with --resume continues the run ({})\n", args.out.display()))?;
    }
    let has_unet = config.compresses_unet();
    let Done { config, report, summary } = done?;
    write_file(&resolved, |out| out.write_all(config.as_bytes()))?;
    write_file(&about, |out| writeln!(out, "{report}"))?;
    networks.iter().try_for_each(PreparedNetwork::clean_up)?;

    let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!(", peak memory {}", number::size(peak)));
    let time = number::time(start.elapsed().as_secs_f64());
    if !has_unet {
        return stdout::print(&format!("{summary}{}: {time}{peak}\n", args.out.display()));
    }
    let bytes = std::fs::metadata(&container).map_err(Error::read(&container))?.len();
    if let Some(size) = size.filter(|size| bytes > *size) {
        let [bytes, size] = [bytes, size].map(number::count);
        tracing::warn!(
            "the file has {bytes} bytes, more than --size, which is {size}: its header is larger than was allowed for"
        );
    }
    stdout::print(&format!(
        "{summary}\n{}: {} ({}), {time}{peak}\n",
        container.display(),
        number::size(bytes),
        number::count(bytes),
    ))
}

/// Checks that no run for one of the `containers` waits to be resumed.
///
/// # Errors
/// [`Error::Argument`] naming its folder.
fn check_no_run<'p>(mut containers: impl Iterator<Item = &'p Path>) -> Result<()> {
    match containers.find(|path| is_unfinished(path)) {
        None => Ok(()),
        Some(path) => Err(Error::Argument(format!(
            "{} has an unfinished run; --resume continues it, --overwrite begins anew",
            workspace_folder(path).display()
        ))),
    }
}

/// Checks a run with all checks that are possible before it computes. Returns the plan of a single
/// run on the UNet; `None` for a search, or if the UNet is not compressed.
pub(super) fn planned(folder: &PipelineFolder, config: &RunConfig, options: &RunOptions, out: &Path) -> Result<Option<Plan>> {
    PreparedNetwork::all(folder, config, options, out)?;
    if !config.compresses_unet() {
        return Ok(None);
    }
    Ok(match task(folder.into(), config, false, options, &out.join("unet.squeezed.safetensors"))? {
        Task::Run(prepared) => Some(prepared.plan().clone()),
        Task::Search(_) => None,
    })
}

/// The networks beside the UNet that `config` compresses, after all checks that are possible before
/// it computes.
fn networks<'a>(unet: DenseUnet<'a>, config: &RunConfig, options: &RunOptions, out: &Path) -> Result<Vec<PreparedNetwork<'a>>> {
    if config.text_encoders.is_none() && config.vae.is_none() {
        return Ok(Vec::new());
    }
    PreparedNetwork::all(unet.pipeline("compression of text encoders and VAE")?, config, options, out)
}

/// The work that `config` asks for on the UNet, after all checks that are possible before it
/// computes.
fn task<'a>(unet: DenseUnet<'a>, config: &RunConfig, shares: bool, options: &RunOptions, container: &Path) -> Result<Task<'a>> {
    Ok(match config.budget.as_ref().is_some_and(|budget| budget.target.is_closeness()) {
        true => {
            let folder = unet.pipeline("a budget")?;
            Task::Search(Box::new(Reaching::new(folder, config, shares, options, container)?))
        }
        false => Task::Run(Box::new(Prepared::new(unet, config, shares, options, container)?)),
    })
}

/// What the config asks for on the UNet.
enum Task<'a> {
    /// One run, of a size that is known.
    Run(Box<Prepared<'a>>),
    /// Several runs, for the smallest size of a closeness.
    Search(Box<Reaching<'a>>),
}

impl Task<'_> {
    fn plan(&self) -> &Plan {
        match self {
            Task::Run(prepared) => prepared.plan(),
            Task::Search(reaching) => reaching.plan(),
        }
    }
}

/// What is said of a run that has written its container.
struct Done {
    /// The config as resolved, in YAML.
    config: String,
    /// The report, in JSON.
    report: String,
    /// What is printed.
    summary: String,
}

impl Done {
    /// With the reports on the networks beside the UNet: the key `networks` of the report, and
    /// lines of the summary before the UNet's.
    fn with_networks(mut self, networks: &[PreparedNetwork<'_>], reports: &[NetworkReport]) -> Result<Self> {
        if reports.is_empty() {
            return Ok(self);
        }
        let mut lines = String::new();
        for (network, report) in networks.iter().zip(reports) {
            let notes: Vec<&str> = report.notes.iter().map(String::as_str).collect();
            let layers: Vec<&str> = report.layers.iter().map(|layer| layer.name.as_str()).collect();
            for note in grouped(&notes, &layers) {
                lines.push_str(&format!("note: {note}\n"));
            }
            lines.push_str(&format!(
                "{}: {} of {} in fp16; {} layers, {:.3} bits a weight\n",
                network.path().display(),
                number::size(report.bytes),
                number::size(report.dense_bytes),
                report.layers.len(),
                report.bits_per_weight,
            ));
        }
        self.summary = lines + &self.summary;
        let mut report: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&self.report).map_err(not_json)?;
        report.insert("networks".to_owned(), serde_json::to_value(reports).map_err(not_json)?);
        self.report = as_json(&report)?;
        Ok(self)
    }

    fn of_run(report: JobReport) -> Result<Self> {
        Ok(Done { config: report.config.to_yaml(), report: as_json(&report)?, summary: summary(&report) })
    }

    fn of_search(reached: Reached) -> Result<Self> {
        Ok(Done { config: reached.config.to_yaml(), report: as_json(&reached.report)?, summary: tried(&reached) })
    }
}

fn as_json(report: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(report).map_err(not_json)
}

fn not_json(why: serde_json::Error) -> Error {
    Error::Failed(format!("the report cannot be written as JSON: {why}"))
}

/// The notes on the result of a search, followed by a table of the sizes that it solved.
fn tried(reached: &Reached) -> String {
    let mut table = table::new(&["asked", "bits", "bytes", "UNet error", "PSNR, dB", "target"]);
    for size in &reached.sizes {
        let Closeness { unet_error, psnr } = size.closeness;
        table.add_row([
            size.target_bits.to_string(),
            format!("{:.3}", size.bits_per_weight),
            number::count(size.bytes),
            format!("{:.3} %", 100.0 * unet_error),
            psnr.map_or(String::new(), |psnr| format!("{psnr:.2}")),
            if size.is_reached { "reached" } else { "missed" }.to_owned(),
        ]);
    }
    let texts = |key: &str| reached.report[key].as_array().into_iter().flatten();
    let layers: Vec<&str> = texts("layers").filter_map(|layer| layer["name"].as_str()).collect();
    let notes: Vec<&str> = texts("notes").filter_map(serde_json::Value::as_str).collect();
    let notes: String = grouped(&notes, &layers).into_iter().map(|note| format!("note: {note}\n")).collect();
    notes + &table::right_aligned(table, 0)
}

/// A table of the stages, followed by the notes, which may have scrolled away by the end of the
/// run.
fn summary(report: &JobReport) -> String {
    let mut table = table::new(&["stage", "layers", "sparsity", "bits", "bytes", "pruned", "stored", "weights"]);
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
            format!("{:.2}", mean(&|layer| Some(layer.bits_per_weight)).expect("every layer has it")),
            number::count(layers.iter().map(|layer| layer.bytes).sum()),
            percent(mean(&|layer| layer.errors.pruned_output)),
            percent(mean(&|layer| layer.errors.output)),
            percent(mean(&|layer| Some(layer.errors.weight))),
        ]);
    }
    let mut text = table::right_aligned(table, 1);
    text.push_str("\n(pruned, stored: output error on the calibration inputs; weights: error of the weights)\n");
    let notes: Vec<&str> = report.notes.iter().map(String::as_str).collect();
    let layers: Vec<&str> = report.layers.iter().map(|layer| layer.name.as_str()).collect();
    for note in grouped(&notes, &layers) {
        text.push_str(&format!("note: {note}\n"));
    }
    text.push_str(&format!(
        "{:.2} % of the compressed weights are zero; {:.3} bits a weight",
        100.0 * report.sparsity,
        report.bits_per_weight
    ));
    text
}

/// The notes, with notes on many of the layers that differ in their numbers alone in one line. The
/// report lists each of them.
fn grouped(notes: &[&str], layers: &[&str]) -> Vec<String> {
    const FEW: usize = 3;
    let mut groups: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    for &note in notes {
        let Some((name, text)) = note.split_once(": ").filter(|(name, _)| layers.contains(name)) else {
            if !groups.iter().any(|(text, noted)| noted.is_empty() && text == note) {
                groups.push((note.to_owned(), Vec::new()));
            }
            continue;
        };
        let kind = number::masked(text);
        match groups.iter_mut().find(|(grouped, noted)| !noted.is_empty() && *grouped == kind) {
            Some((_, noted)) => noted.push((name, text)),
            None => groups.push((kind, vec![(name, text)])),
        }
    }
    let line = |(text, noted): (String, Vec<(&str, &str)>)| match noted[..] {
        [] => vec![text],
        [(first, text), .., (last, _)] if noted.len() > FEW => {
            let such = if noted.iter().all(|(_, other)| *other == text) { "" } else { "for example " };
            vec![format!("{} layers, {first} to {last}: {such}{text}", noted.len())]
        }
        _ => noted.iter().map(|(name, text)| format!("{name}: {text}")).collect(),
    };
    groups.into_iter().flat_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_on_many_layers_take_a_line_for_each_kind() {
        let layers = ["a", "b", "c", "d"];
        let few = ["16", "16", "8", "16"].map(|count| format!("calibrated on {count} vectors, fewer than its 1,152 inputs"));
        let notes =
            |each: &[&str]| -> Vec<String> { layers.iter().zip(each).map(|(layer, note)| format!("{layer}: {note}")).collect() };
        let text = |notes: &[String]| grouped(&notes.iter().map(String::as_str).collect::<Vec<_>>(), &layers);
        let mut all = vec!["no layer: 3 prompts are few".to_owned(), "no layer: 4 prompts are few".to_owned()];
        all.extend(notes(&[&few[0], &few[1], &few[2], &few[3]]));
        all.extend(notes(&["equal for 2"; 4]));
        all.extend(notes(&["seldom", "seldom"]));
        let expected = [
            "no layer: 3 prompts are few",
            "no layer: 4 prompts are few",
            "4 layers, a to d: for example calibrated on 16 vectors, fewer than its 1,152 inputs",
            "4 layers, a to d: equal for 2",
            "a: seldom",
            "b: seldom",
        ];
        assert_eq!(text(&all), expected);
    }
}
