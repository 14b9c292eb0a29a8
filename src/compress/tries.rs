//! Runs of one config at several sizes, which share their samples and what settings cost.

use std::path::{Path, PathBuf};

use sdxl_pipeline::PipelineFolder;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_base::output::write_file;
use squeeze_base::progress::Progress;

use super::allocate::Forecast;
use super::identity::{Inputs, of_any_size, sources_of};
use super::mean_bits::MeanBits;
use super::prepare::Prepared;
use super::run::{forecast, own_samples, run};
use super::workspace::{Claim, Workspace, workspace_folder};
use crate::calibration::Samples;
use crate::config::{BudgetTarget, RunConfig};
use crate::recipe::RunOptions;

/// One config at several sizes, one of which will be the result.
///
/// Everything is kept in the [work folder](workspace_folder) of the result: samples, prices,
/// containers of sizes, and what the caller [keeps](Tries::keep). With
/// [`RunOptions::resume`](crate::recipe::RunOptions::resume) nothing of it is made again, and a
/// size that was not finished goes on from its finished layers.
#[derive(Debug)]
pub struct Tries<'a> {
    folder: &'a PipelineFolder,
    config: RunConfig,
    options: RunOptions,
    path: PathBuf,
    given: Option<&'a Samples>,
    drawn: Samples,
    workspace: Workspace,
    forecast: Forecast,
}

/// A size that was compressed to.
#[derive(Debug)]
pub struct Solved {
    /// Its container, which [`Tries::finish`] makes the result.
    pub container: PathBuf,
    /// The report of its run, [`JobReport`](super::JobReport), as JSON.
    pub report: Value,
    /// The config with a rule for each layer.
    pub config: RunConfig,
}

/// What is kept of a size beside its container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// SHA-256 of the container.
    sha256: String,
    report: Value,
    /// The config with a rule for each layer, in YAML.
    config: String,
}

/// The file that keeps what settings cost.
const PRICES: &str = "prices.json";
/// The size that stands for all where a run is checked before any size is known.
const USUAL: MeanBits = MeanBits::of_thousandths(4000);

impl<'a> Tries<'a> {
    /// Checks and plans a run of `config` at a usual size; the other arguments are those of
    /// [`Prepared::new`]. The config has a budget, whose target does not matter.
    ///
    /// # Errors
    /// As [`Prepared::new`]; [`Error::Argument`] if the config has no budget.
    pub fn prepared(
        folder: &'a PipelineFolder,
        config: &RunConfig,
        shares: bool,
        options: &RunOptions,
        path: &Path,
    ) -> Result<Prepared<'a>> {
        Prepared::new(folder, &at_size(config, USUAL)?, shares, options, path)
    }

    /// Draws the samples of a run that was [`prepared`](Self::prepared), unless `samples` are
    /// given, and measures what settings cost. `also` is what the content of [`keep`](Self::keep)
    /// depends on besides the config.
    ///
    /// # Errors
    /// As [`run`]; [`Error::Argument`] if the options say to resume and the work folder is that of
    /// another run.
    pub fn new(
        prepared: Prepared<'a>,
        options: &RunOptions,
        samples: Option<&'a Samples>,
        also: Value,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Prepared { unet, weights, recipe, config: settled, path, .. } = &prepared;
        let (folder, config, path) = (prepared.folder()?, settled.clone(), path.clone());
        let mut inputs = Inputs::read(*unet, settled, samples, recipe.needs_samples())?;
        let claim = Claim::of(&workspace_folder(&path))?;
        let (claim, sources) = claim.during(|_| sources_of(*unet, weights, progress))?;
        let mut identity = inputs.identity(&of_any_size(settled), &sources, options);
        identity.insert("judged".to_owned(), also);
        let mut workspace = claim.open(&identity, options.resume)?;
        let drawn = match samples {
            Some(_) => None,
            None => own_samples(&prepared, &mut inputs, None, &mut workspace, progress)
                .map_err(|error| error.during("the calibration samples"))?,
        };
        let drawn = drawn.unwrap_or_default();
        let prepared = prepared.with_prices(workspace.folder().join(PRICES));
        let forecast = forecast(&prepared, samples.unwrap_or(&drawn), &sources, &mut workspace, progress)?;
        Ok(Tries { folder, config, options: options.clone(), path, given: samples, drawn, workspace, forecast })
    }

    /// What sizes are expected to be like.
    #[must_use]
    pub fn forecast(&self) -> &Forecast {
        &self.forecast
    }

    /// Compresses to a size, unless its container is there.
    ///
    /// # Errors
    /// As [`Prepared::new`] and [`run`].
    pub fn solve(&mut self, bits: MeanBits, progress: &dyn Progress) -> Result<Solved> {
        let container = self.container(bits);
        if let Some(kept) = self.kept(&record(bits))
            && container.is_file()
        {
            let read = serde_json::from_slice::<Record>(&kept).map_err(|why| Error::internal(format!("a record: {why}")))?;
            if read.sha256 == SourceFile::read(&container, "")?.sha256 {
                let config = RunConfig::parse(&container, read.config.as_bytes())?;
                return Ok(Solved { container, report: read.report, config });
            }
            self.workspace.warn(format!("{} is damaged, and made again", container.display()));
        }
        // Layers of this size that are finished are in a folder of their own.
        let options = RunOptions { resume: true, ..self.options.clone() };
        let prepared = Prepared::new(self.folder, &at_size(&self.config, bits)?, true, &options, &container)?;
        let prepared = prepared.with_prices(self.workspace.folder().join(PRICES));
        let report = run(&prepared, Some(self.given.unwrap_or(&self.drawn)), progress)?;
        let config = report.config.clone();
        let as_json = |why: serde_json::Error| Error::internal(format!("a report cannot be written as JSON: {why}"));
        let report = serde_json::to_value(&report).map_err(as_json)?;
        let sha256 = SourceFile::read(&container, "")?.sha256;
        let kept = Record { sha256, report: report.clone(), config: config.to_yaml() };
        self.keep(&record(bits), &serde_json::to_vec(&kept).map_err(as_json)?)?;
        Ok(Solved { container, report, config })
    }

    /// Removes the container of a size that will not be the result.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn drop_container(&self, bits: MeanBits) -> Result<()> {
        let path = self.container(bits);
        if path.exists() { std::fs::remove_file(&path).map_err(Error::write(&path)) } else { Ok(()) }
    }

    /// Keeps `content` under a name, for this run and those that resume it.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn keep(&self, name: &str, content: &[u8]) -> Result<()> {
        self.workspace.keep(name, content)
    }

    /// What was kept under a name; `None` if nothing was, or if it is damaged, of which this warns.
    pub fn kept(&mut self, name: &str) -> Option<Vec<u8>> {
        self.workspace.kept(name)
    }

    /// Warnings about damaged files of the work folder.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        self.workspace.warnings()
    }

    /// Makes a size the result, and removes the work folder.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Write`].
    pub fn finish(self, solved: &Solved) -> Result<()> {
        let mut container = std::fs::File::open(&solved.container).map_err(Error::read(&solved.container))?;
        write_file(&self.path, |out| std::io::copy(&mut container, out).map(drop))?;
        self.workspace.remove()
    }

    fn container(&self, bits: MeanBits) -> PathBuf {
        self.workspace.folder().join(format!("{bits}-bits.squeezed.safetensors"))
    }
}

/// The name under which the record of a size is kept.
fn record(bits: MeanBits) -> String {
    format!("{bits}-bits.json")
}

/// The config with this size in the place of its budget's target.
fn at_size(config: &RunConfig, bits: MeanBits) -> Result<RunConfig> {
    let budget = config.budget.as_ref().ok_or_else(|| Error::Argument("a search over sizes needs a budget".into()))?;
    Ok(RunConfig { budget: Some(budget.with_size(BudgetTarget::Bits(bits.bits()))), ..config.clone() })
}
