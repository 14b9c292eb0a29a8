//! Comparison of several configs on one model: size, closeness to the dense model, cost.

mod bootstrap;
mod containers;
mod entry;
mod figures;
mod frame;
mod judge;
mod judging;
mod lpips;
mod networks;
mod pairs;
mod part;
mod reach;
mod results;
mod shipped;
mod sweep;

use std::ops::Range;
use std::path::{Path, PathBuf};

use containers::Facts;
pub use entry::{Entry, container_path, prices_path, row_path};
use judge::Judge;
pub use judging::Judging;
pub use lpips::Lpips;
pub use networks::{EmbeddingError, LatentError, NetworkComparison, PictureError, compare_networks};
use part::PartFile;
pub use part::{Part, merge};
pub use reach::{Closeness, Ending, Goal, Reached, Reaching, TriedSize, reach};
use results::{ModelResults, Results};
use sdxl_model::checkpoint::Weights;
use sdxl_model::unet::Unet;
use sdxl_pipeline::{PipelineFolder, UnetWeights};
use serde_json::json;
pub use shipped::Shipped;
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_base::number;
use squeeze_base::progress::{Progress, Task};
use squeeze_container::Container;
pub use sweep::Sweep;

use crate::config::RunConfig;
use crate::recipe::RunOptions;
use crate::report::Comparison;

/// Pictures whose dense runs are in memory at once. An even number, because every second picture of
/// a model that is shown pictures needs the one before.
const TOGETHER: usize = 32;

/// Compresses with the config of every entry, judges each result, and leaves the containers in
/// `out`. A container that is there already, made by this program from the same config, model and
/// prompts, is not made again.
///
/// Entries with equal calibration sections share their samples, and all entries share the dense
/// model's pictures. Before anything is computed every entry is checked and planned (see
/// [`Prepared`](crate::compress::Prepared)), and the disk must have room for all of them together.
///
/// # Errors
/// If there are no entries, two have one name, one does not fit the model, `options`, the memory or
/// the disk, a judged prompt is among the calibration's, or a run fails.
pub fn compare(
    folder: &PipelineFolder,
    entries: &[Entry],
    judging: &Judging,
    options: &RunOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Comparison> {
    let comparing = Comparing::new(folder, entries, judging, options, out)?;
    let facts = containers::made(folder, entries, options, out, progress)?;
    let frame = comparing.frame(facts)?;
    let results = comparing.judged(0..comparing.judge.pairs().len(), progress)?;
    figures::figures(frame, results)
}

/// Compresses as [`compare`] does, without judging: what `--part` needs.
///
/// # Errors
/// As [`compare`].
pub fn make_containers(
    folder: &PipelineFolder,
    entries: &[Entry],
    judging: &Judging,
    options: &RunOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let _checked = Comparing::new(folder, entries, judging, options, out)?;
    containers::made(folder, entries, options, out, progress).map(drop)
}

/// Judges the containers in `out` on a part of the pictures, and writes what was measured to
/// [`Part::path`], which is returned. A part that is there already and whole is not drawn again.
///
/// # Errors
/// As [`compare`]; [`Error::Argument`] if a container is missing.
pub fn judge_part(
    folder: &PipelineFolder,
    entries: &[Entry],
    judging: &Judging,
    options: &RunOptions,
    (out, part): (&Path, Part),
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let comparing = Comparing::new(folder, entries, judging, options, out)?;
    let facts = containers::all_found(folder, entries, options, out)?;
    let identity = comparing.identity(&facts)?;
    let frame = comparing.frame(facts)?;
    let path = part.path(out);
    if path.exists() {
        match PartFile::read(&path) {
            Ok(there) if there.identity == identity => {
                tracing::info!("{} is there already", path.display());
                return Ok(path);
            }
            Ok(_) => tracing::warn!("{} is of another comparison, so it is drawn again", path.display()),
            Err(why) => tracing::warn!("{why}"),
        }
    }
    let range = comparing.judge.share(part.number(), part.parts());
    let results = comparing.judged(range.clone(), progress)?;
    PartFile::new(part, identity, (range.start, range.end), frame, results).write(&path)?;
    Ok(path)
}

/// Checks that the memory holds the dense model in the noise floor's dtype, where that is the wider
/// one.
fn check_floor(folder: &PipelineFolder, options: &RunOptions) -> Result<()> {
    let kind = judge::floor_kind(options.kind);
    if kind.elt_size_in_bytes() <= options.kind.elt_size_in_bytes() {
        return Ok(());
    }
    let elements: u64 = folder.unet.tensors()?.iter().map(|tensor| tensor.numel()).sum();
    let (needed, budget) = (elements * kind.elt_size_in_bytes() as u64, options.memory_budget()?);
    if needed <= budget {
        return Ok(());
    }
    let [needed, budget] = [needed, budget].map(number::size);
    Err(Error::Argument(format!(
        "the noise floor needs the dense UNet in fp32, which takes {needed} and {budget} of memory are free; leave it out with \
         --no-noise-floor"
    )))
}

/// What a comparison leaves out of a config, if anything.
fn left_dense(config: &RunConfig) -> Option<&'static str> {
    let has_others = config.text_encoders.is_some() || config.vae.is_some();
    has_others.then_some(
        "UNets are compared: text encoders and VAE are not compressed here (`compress` does that, and `compare-networks` measures it)",
    )
}

/// The files of the VAE, with their hashes.
fn vae_files(folder: &PipelineFolder) -> Result<Vec<SourceFile>> {
    folder.vae_network()?.source_files(|_| String::new())
}

/// A comparison whose entries have been checked.
struct Comparing<'a> {
    folder: &'a PipelineFolder,
    entries: &'a [Entry],
    judging: &'a Judging,
    options: &'a RunOptions,
    out: &'a Path,
    judge: Judge<'a>,
    weights: Weights,
    /// Prompts of the calibration.
    calibration: Vec<String>,
}

impl<'a> Comparing<'a> {
    fn new(
        folder: &'a PipelineFolder,
        entries: &'a [Entry],
        judging: &'a Judging,
        options: &'a RunOptions,
        out: &'a Path,
    ) -> Result<Self> {
        for (index, Entry { name, .. }) in entries.iter().enumerate() {
            if entries[..index].iter().any(|earlier| earlier.name == *name) {
                return Err(Error::Argument(format!("two of the configs to compare are called `{name}`; rename one")));
            }
        }
        if entries.is_empty() {
            return Err(Error::Argument("there is nothing to compare".into()));
        }
        for Entry { name, config, .. } in entries {
            if !config.compresses_unet() {
                return Err(Error::Argument(format!(
                    "`{name}` compresses no UNet; `compare-networks` compares text encoders and VAE"
                )));
            }
            if let Some(note) = left_dense(config) {
                tracing::warn!("{name}: {note}");
            }
        }
        if let Some(baseline) = &judging.baseline
            && !entries.iter().any(|entry| entry.name == *baseline)
        {
            return Err(Error::Argument(format!("no config is named `{baseline}`, the baseline")));
        }
        if judging.noise_floor {
            check_floor(folder, options)?;
        }
        let judge = Judge::new(folder, judging, options.placement())?;
        let calibration = frame::calibration_prompts(entries, &judging.set)?;
        Ok(Comparing { folder, entries, judging, options, out, judge, weights: folder.unet_weights()?, calibration })
    }

    /// The report without measurements.
    fn frame(&self, facts: Vec<Facts>) -> Result<Comparison> {
        let (judging, placement, calibration) = (self.judging, self.options.placement(), self.calibration.clone());
        frame::frame(self.folder, &self.weights, judging, &self.judge, placement, calibration, facts)
    }

    /// A hash of everything that the measurements of all parts depend on.
    fn identity(&self, facts: &[Facts]) -> Result<String> {
        let Judging { set, seeds, held_out, baseline, noise_floor, lpips, shown } = self.judging;
        let (vae, placement) = (vae_files(self.folder)?, self.options.placement());
        let all = json!({
            "containers": facts.iter().map(Facts::hashes).collect::<Vec<_>>(),
            "encoders": self.folder.prompt_files()?,
            "vae": vae,
            "set": format!("{set:?}"),
            "seeds": seeds,
            "held_out": held_out,
            "baseline": baseline,
            "noise_floor": noise_floor,
            "lpips": lpips.as_ref().map(Lpips::sha256),
            "shown": shown,
            "device and dtype": format!("{placement:?}"),
        });
        Ok(digest::of_bytes(all.to_string().as_bytes()))
    }

    /// Judges the containers on the pictures of `range`.
    fn judged(&self, range: Range<usize>, progress: &dyn Progress) -> Result<Results> {
        let models = || self.entries.iter().map(|_| ModelResults::default());
        let mut results = Results {
            stages: self.folder.unet.stages().iter().map(|stage| stage.name().to_string()).collect(),
            rows: models().collect(),
            noise_floor: self.judging.noise_floor.then(ModelResults::default),
            ..Results::default()
        };
        for start in range.clone().step_by(TOGETHER) {
            results.append(self.judged_together(start..range.end.min(start + TOGETHER), progress)?);
        }
        Ok(results)
    }

    fn judged_together(&self, range: Range<usize>, progress: &dyn Progress) -> Result<Results> {
        let (chain, placement) = (&self.folder.unet, self.options.placement());
        let source = self.weights.source(placement);
        let (reference, warnings) = {
            let unet = Unet::resident(chain.clone(), source, progress)?;
            (self.judge.record(range, &unet, progress)?, unet.beyond_half())
        };
        let noise_floor = self.judging.noise_floor.then(|| reference.measure_floor(&self.weights, progress)).transpose()?;
        let task = Task::begin(progress, "judging", "configs", self.entries.len());
        let mut rows = Vec::new();
        for Entry { name, config, .. } in self.entries {
            task.advance(name);
            // Judged on the stored weights, read back.
            let container = Container::open(&container_path(self.out, name))?;
            let stored = UnetWeights::from(&container).source(placement);
            let unet = Unet::resident(chain.clone(), stored, progress)?;
            let mut results = reference.measure(&unet, progress)?;
            results.notes = unet.beyond_half();
            results.notes.extend(left_dense(config).map(str::to_owned));
            drop(unet);
            reference.add_stages(&source, &stored, &mut results)?;
            rows.push(results);
        }
        Ok(Results { rows, noise_floor, warnings, dense_pictures: reference.pictures(), ..Results::default() })
    }
}
