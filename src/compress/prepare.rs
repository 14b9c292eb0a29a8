//! Checks of a run before it computes anything.

use std::path::{Path, PathBuf};

use sdxl_model::checkpoint::Weights;
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::{DenseUnet, LoraFile, ModelFiles, PipelineFolder};
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_base::output::parent;
use squeeze_numerics::device::{parse_devices, parse_dtype};
use tch::Device;

use super::allocate;
use super::workspace::workspace_folder;
use crate::calibration::{Calls, defaults, encoder_bytes, expected_calls, hint, settings};
use crate::config::{BudgetSection, BudgetTarget, CalibrationSection, RunConfig, read_prompts};
use crate::plan::{self, Disk, Memory, Plan, TuningPlan};
use crate::recipe::{LayerRecipes, Recipe, RunOptions, Sequencing};
use crate::tune::split;

/// A run that has passed all checks that are possible before it computes: its config fits the
/// model, its prompts can be read, and memory and disk are enough by its [plan](Plan).
#[derive(Debug)]
pub struct Prepared<'a> {
    pub(super) unet: DenseUnet<'a>,
    pub(super) config: RunConfig,
    pub(super) options: RunOptions,
    pub(super) path: PathBuf,
    pub(super) weights: Weights,
    pub(super) recipe: Recipe,
    /// The file that keeps what the settings of a budget cost; `None` keeps it nowhere.
    pub(super) prices: Option<PathBuf>,
    plan: Plan,
}

impl<'a> Prepared<'a> {
    /// Prepares to compress `unet`, that of a pipeline or one alone, by `config` into the container
    /// `path`. `shares` says whether the run will be given its samples; it does not keep those.
    ///
    /// # Errors
    /// [`Error::Argument`] if `options` or the model are not those that `config` names, if the
    /// config needs more of a pipeline than the UNet and there is no more, or memory or disk are
    /// too small; [`Error::Config`] if the config does not fit the model; if weights,
    /// prompts or samples cannot be read.
    pub fn new(
        unet: impl Into<DenseUnet<'a>>,
        config: &RunConfig,
        shares: bool,
        options: &RunOptions,
        path: &Path,
    ) -> Result<Self> {
        let unet = unet.into();
        if config.budget.as_ref().is_some_and(|budget| budget.target.is_closeness()) {
            return Err(Error::Argument(
                "`target_error` and `target_psnr` are reached by a search over several sizes, which `sdxl-squeeze compress` and \
                 `compare::reach` make; a single run needs `target_bits` or `target_size`"
                    .into(),
            ));
        }
        check_place(unet, config, options)?;
        let config = &match unet {
            DenseUnet::OfPipeline(folder) => settled(folder, config),
            DenseUnet::Alone(_) => config.clone(),
        };
        let recipe = Recipe::new(config, unet.chain())?;
        recipe.check_not_empty()?;
        if let Some(what) = recipe.needs_pipeline(config) {
            unet.pipeline(what)?;
        }
        let weights = unet.weights()?;
        let (calls, encoders) = match unet {
            DenseUnet::OfPipeline(folder) => {
                folder.scheduler.train_timesteps()?;
                let calls = if recipe.needs_samples() { Some(calls(folder, config)?) } else { None };
                (calls, encoder_bytes(folder, options.kind.elt_size_in_bytes() as u64)?)
            }
            DenseUnet::Alone(_) => (None, 0),
        };
        let mut budget = options.memory_budget()?;
        if let (None, Some(calls), Device::Cpu) = (options.budget, &calls, options.placement().device) {
            // The samples wait in the CPU's memory and will take a share of what is free now.
            let samples = plan::of_samples(calls, unet.chain().config());
            let size = number::size;
            let few = || Error::Argument(format!("{} of memory are too little for {} of samples", size(budget), size(samples)));
            budget = budget.checked_sub(samples).ok_or_else(few)?;
        }
        let placement = options.placement();
        let memory = Memory::new(budget, options.kind, placement.device);
        let memory = memory.with_encoders(encoders);
        let bytes_of = |name: &str| weights.narrow_bytes(name, placement).unwrap_or(4);
        let mut plan = plan_of_run(unet.chain(), config, &recipe, calls, memory, &bytes_of)?;
        if let Some(section) = &config.tune {
            let folder = unet.pipeline("tuning")?;
            // Too few prompts would be found hours later otherwise.
            split(&section.prompts.as_ref().unwrap_or(&config.calibration.prompts).load()?)?;
            let shape = expected_calls(folder, &CalibrationSection { samples: None, ..config.calibration.clone() })?;
            let steps = settings(folder, &config.calibration)?.calls()?;
            let tuning = TuningPlan::new(unet.chain(), section, &recipe.layers, (shape, steps), memory, &bytes_of)?;
            tuning.check(budget)?;
            plan.disk.parts += tuning.disk_bytes;
        }
        if shares {
            plan.disk = plan.disk.without_samples();
        }
        let (disk, work) = (plan.disk, workspace_folder(path));
        plan::check_disk(parent(path), disk.peak(), plan::taken(&work), &disk.text())?;
        let (config, mut options, path) = (config.clone(), options.clone(), path.to_owned());
        if options.placement().device.is_cuda() {
            // Later, blocks that libtorch keeps for its next tensors would not count as free.
            options.budget = Some(budget);
        }
        Ok(Prepared { unet, config, options, path, weights, recipe, prices: None, plan })
    }

    /// The run with a file, in a folder that exists, for what the settings of its budget cost. Runs
    /// whose configs differ in nothing but the budget's target measure once if they share the file.
    /// A file that is damaged, or of another run, is written anew, which the report says.
    #[must_use]
    pub fn with_prices(self, path: PathBuf) -> Self {
        Prepared { prices: Some(path), ..self }
    }

    /// The UNet that is compressed.
    #[must_use]
    pub fn unet(&self) -> DenseUnet<'a> {
        self.unet
    }

    /// The pipeline, for what draws or encodes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a UNet alone. [`new`](Self::new) has refused the configs that need
    /// more.
    pub(super) fn folder(&self) -> Result<&'a PipelineFolder> {
        self.unet.pipeline("calibration")
    }

    /// The config of the run.
    #[must_use]
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// The dense UNet's weights.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The path of the container.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The plan of the run for as many samples as its config asks for.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan for `recipes` and for the samples that were drawn.
    pub(super) fn plan_for(
        &self,
        recipes: &LayerRecipes,
        sequencing: Sequencing,
        calls: Option<Calls>,
        memory: Memory,
    ) -> Result<Plan> {
        let placement = self.options.placement();
        let bytes_of = |name: &str| self.weights.narrow_bytes(name, placement).unwrap_or(4);
        let plan = Plan::new(self.unet.chain(), recipes, sequencing, calls, memory, &bytes_of)?;
        // Whether samples are kept on the disk was decided with the first plan.
        let keeps = self.plan.disk.samples > 0;
        let disk = if keeps { plan.disk } else { plan.disk.without_samples() };
        Ok(Plan { disk, drawing_bytes: self.plan.drawing_bytes, ..plan })
    }
}

/// Plans the run of `config`, resolved to `recipe`; the other arguments are those of [`Plan::new`].
/// A run with a budget measures first and makes a result of the budget's size: [`Plan::disk`]
/// accounts for both. Of a closeness the size is not known before, and the plan is for the size of
/// the config as it is.
///
/// # Errors
/// [`Error::Argument`] if the memory is too little, or the budget too small for any settings.
pub fn plan_of_run(
    chain: &UnetChain,
    config: &RunConfig,
    recipe: &Recipe,
    calls: Option<Calls>,
    memory: Memory,
    bytes_of: &dyn Fn(&str) -> usize,
) -> Result<Plan> {
    let mut plan = Plan::new(chain, &recipe.layers, recipe.sequencing, calls, memory, bytes_of)?;
    if let Some(budget) = &config.budget {
        allocate::check(chain, recipe, &plan, budget)?;
        let recipes = allocate::measuring(&recipe.layers);
        let measuring = Plan::new(chain, &recipes, Sequencing::Stage, calls, memory, bytes_of)?.disk;
        let result = budget.bytes(&plan).unwrap_or(plan.payload_bytes);
        let fixed = plan.payload_bytes - plan.compressed_bytes;
        let carries = plan.disk.carries.max(measuring.carries);
        plan.disk = Disk { carries, parts: result.saturating_sub(fixed), result, ..plan.disk };
    }
    if config.calibration.samples.is_some() {
        plan.disk = plan.disk.without_samples();
        // Captions are encoded beside samples that are given.
        let encodes = config.calibration.captions.is_some() && plan.calls.is_some();
        plan.drawing_bytes = if encodes { memory.encoding_bytes() } else { 0 };
    }
    if plan.drawing_bytes > memory.budget {
        let [budget, least] = [memory.budget, plan.drawing_bytes].map(number::size);
        return Err(Error::Argument(format!(
            "{budget} of memory are too little to encode prompts and draw calibration samples in; {least} would do"
        )));
    }
    Ok(plan)
}

/// Checks that options and model are those that the config names, because the config is kept with
/// the result as its description.
pub(super) fn check_place(unet: DenseUnet<'_>, config: &RunConfig, options: &RunOptions) -> Result<()> {
    let disagrees = |key: &str, named: &str, given: String| {
        Err(Error::Argument(format!("the config's `model.{key}` is {named}, but the run was given {given}")))
    };
    let model = &config.model;
    if parse_devices(&model.device)? != options.devices.as_slice() {
        return disagrees("device", &model.device, format!("{:?}", options.devices.as_slice()));
    }
    if parse_dtype(&model.dtype)? != options.kind {
        return disagrees("dtype", &model.dtype, format!("{:?}", options.kind));
    }
    let real = |path: &Path| path.canonicalize().map_err(Error::read(path));
    let alone;
    let files = match unet {
        DenseUnet::OfPipeline(folder) => folder.model_files(),
        DenseUnet::Alone(folder) => {
            alone = ModelFiles::of(&folder.path);
            &alone
        }
    };
    let ModelFiles { model: path, base, vae, text_encoder, text_encoder_2, loras, lora_ignore } = files;
    if let Some(container) = text_encoder.as_ref().or(text_encoder_2.as_ref()) {
        return Err(Error::Argument(format!(
            "a config has no key for a compressed text encoder such as {}; calibrate with the dense ones",
            container.display()
        )));
    }
    if model.loras != *loras || model.lora_ignore != *lora_ignore {
        let shown = |loras: &[LoraFile], ignored: &Option<String>| {
            let loras: Vec<String> = loras.iter().map(LoraFile::to_string).collect();
            format!("[{}] without `{}`", loras.join(", "), ignored.as_deref().unwrap_or_default())
        };
        return disagrees("loras", &shown(&model.loras, &model.lora_ignore), shown(loras, lora_ignore));
    }
    for (key, named, given) in
        [("path", &model.path, Some(path)), ("base", &model.base, base.as_ref()), ("vae", &model.vae, vae.as_ref())]
    {
        let Some(named) = named else { continue };
        if given.map(|given| real(given)).transpose()? != Some(real(named)?) {
            let given = given.map_or("none".to_owned(), |given| given.display().to_string());
            return disagrees(key, &named.display().to_string(), given);
        }
    }
    Ok(())
}

/// The config with the steps and the guidance of its calibration spelt out, so that they are part
/// of the run's identity: their defaults depend on the model's name.
pub(super) fn settled(folder: &PipelineFolder, config: &RunConfig) -> RunConfig {
    let mut config = config.clone();
    let defaults = defaults(folder);
    if let Some(hint) = hint(&defaults, &config.calibration) {
        tracing::warn!("{hint}");
    }
    config.calibration.steps.get_or_insert(defaults.steps);
    config.calibration.guidance.get_or_insert(defaults.guidance);
    config
}

/// The calls that the config will calibrate on. Its prompts and captions are read, to see that they
/// can be.
fn calls(folder: &PipelineFolder, config: &RunConfig) -> Result<Calls> {
    let section = &config.calibration;
    if let Some(path) = &section.captions {
        read_prompts(path)?;
    }
    let mut calls = expected_calls(folder, section)?;
    if section.samples.is_none() {
        calls.count = calls.count.min(section.prompts.load()?.len().saturating_mul(settings(folder, section)?.used_calls()?));
    }
    Ok(calls)
}

impl BudgetSection {
    /// Bytes of the tensors of a result that meets the budget, for the UNet of `plan`; `None` if
    /// the target is a closeness, whose size has to be searched for.
    #[must_use]
    pub fn bytes(&self, plan: &Plan) -> Option<u64> {
        match self.target {
            BudgetTarget::Size(bytes) => Some(bytes),
            BudgetTarget::Bits(bits) => {
                let compressed = (bits / 8.0 * plan.compressed_elements as f64) as u64;
                Some(plan.payload_bytes - plan.compressed_bytes + compressed)
            }
            BudgetTarget::Error(_) | BudgetTarget::Psnr(_) => None,
        }
    }
}
