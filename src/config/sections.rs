//! The sections of a run config.

use std::path::{Path, PathBuf};

use sdxl_model::scheduler::SpacingKind;
use sdxl_pipeline::{LoraFile, ModelFiles, PromptOptions};
use serde::{Serialize, Serializer};
use squeeze_base::error::Place;
use squeeze_base::pattern::NamePattern;
use squeeze_codebook::{BitWidth, OnMisfit, PaletteOptions, PruneMethod, PruneOptions, Quantizer};

use super::fields::{Fields, text, texts};
use super::keys;
use super::mistake::{Mistakes, Written};
use super::prompts::{self, Prompts};
use super::rules::{self, Rules, pattern};
use super::tree::Position;
use super::words::{Feed, TimestepWeighting};

/// The model, and where it is computed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSection {
    /// The pipeline's folder, or a single-file checkpoint; absent where the command line names it.
    #[serde(serialize_with = "path_or_null")]
    pub path: Option<PathBuf>,
    /// Another pipeline, for what a single-file checkpoint lacks.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "path_or_null")]
    pub base: Option<PathBuf>,
    /// A VAE in the place of the pipeline's own.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "path_or_null")]
    pub vae: Option<PathBuf>,
    /// LoRAs that are merged into UNet and text encoders.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_texts")]
    pub loras: Vec<LoraFile>,
    /// A regular expression for whole names of tensors in the LoRAs that are left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_ignore: Option<String>,
    /// cpu, cuda, cuda:N or mps, or several with commas. Whether this machine has them is
    /// checked by the run.
    pub device: String,
    /// The precision of the UNet's runs: f32, f16 or bf16.
    pub dtype: String,
}

/// The samples on which Hessians are built.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationSection {
    /// The prompts that are run through the dense pipeline.
    pub prompts: Prompts,
    /// A safetensors file of samples that are read instead of drawn from prompts.
    #[serde(serialize_with = "path_or_null")]
    pub samples: Option<PathBuf>,
    /// Prompts that are encoded but not drawn. They calibrate the layers whose inputs come from the
    /// text states alone, or from the timestep and the pooled text.
    #[serde(serialize_with = "path_or_null")]
    pub captions: Option<PathBuf>,
    /// How many captions are taken, evenly over the file. At least 1.
    pub captions_nsamples: usize,
    /// Weight of each UNet call in the Hessians.
    pub timestep_weighting: TimestepWeighting,
    /// How many UNet calls are taken, evenly over prompts and timesteps. At least 1.
    pub calibration_nsamples: usize,
    /// The sampler in the place of the model's own.
    pub scheduler: Option<String>,
    /// The spacing of the timesteps in the place of the sampler's own.
    pub timestep_spacing: Option<SpacingKind>,
    /// The share of noise that each step of DDIM or TCD adds. In [0, 1].
    pub eta: f64,
    /// The share of the timesteps, from pure noise on, at which no samples are taken; `None` is
    /// what the model was made for. In [0, 1). What is absent is not written, as it was before the
    /// key was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denoising_start: Option<f64>,
    /// Denoising steps for each prompt, at least 1; `None` is what the model was made for.
    pub steps: Option<usize>,
    /// Guidance scale, at least 0; 1 is none. `None` is what the model was made for.
    pub guidance: Option<f64>,
    /// The share of the guided prediction whose deviation is brought to that of the prompt's own.
    /// In [0, 1].
    pub guidance_rescale: f64,
    /// The negative prompt; `None` is the pipeline's default.
    pub negative_prompt: Option<String>,
    /// What the UNet is given: one feed, or two different ones, between which prompts are divided.
    /// The default is not written, as it was before the key was there.
    #[serde(skip_serializing_if = "is_default_mix")]
    pub mix: Vec<Feed>,
    /// How prompts and captions are read. What is the default is not written, as it was before
    /// these keys were there.
    #[serde(flatten, serialize_with = "write_reading")]
    pub reading: PromptOptions,
    /// Seed of the noise.
    pub seed: u64,
    /// Height and width of the pictures in pixels; absent: what the model was made for.
    #[serde(flatten, serialize_with = "write_size")]
    pub size: Option<(i64, i64)>,
}

/// Which layers are pruned, and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PruneSection {
    /// Patterns for the stages that are pruned (coremltools' `layers`). Other stages and the UNet's
    /// two ends are not pruned.
    pub layers: Vec<Written<NamePattern>>,
    /// The solver.
    pub algorithm: PruneMethod,
    /// The settings of their layers.
    #[serde(flatten, serialize_with = "rules::write")]
    pub rules: Rules<PruneOptions>,
}

/// Which layers are palettized, and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PalettizeSection {
    /// The settings of all the UNet's layers.
    #[serde(flatten, serialize_with = "rules::write")]
    pub rules: Rules<PaletteOptions>,
    /// Treatment of layers whose channels the group size does not divide.
    pub on_misfit: OnMisfit,
    /// Weights of at most this many elements stay fp16. coremltools' converter skips those of 2,048
    /// and fewer.
    pub weight_threshold: u64,
}

/// How the layers of the text encoders or of the VAE are palettized.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkSection {
    /// Texts, or pictures, to calibrate with. At least 1.
    pub nsamples: usize,
    /// The settings of the layers.
    #[serde(flatten)]
    pub palettize: PalettizeSection,
}

/// How the layers of the VAE are palettized.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VaeSection {
    /// Whether the encoder is palettized too, and not the decoder alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub encoder: bool,
    /// Pictures to calibrate with, and the settings of the layers.
    #[serde(flatten)]
    pub network: NetworkSection,
}

/// A size that the result keeps to, or a closeness that it reaches at the smallest size. Each layer
/// gets settings of its own (see [`compress`](crate::compress)).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BudgetSection {
    /// `target_size`, `target_bits`, `target_error` or `target_psnr`.
    #[serde(flatten, serialize_with = "write_target")]
    pub target: BudgetTarget,
    /// How the size is searched for where the target is a closeness; `None` for a size.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub search: Option<SizeSearch>,
    /// Fewest bits of a palette index in any layer.
    pub min_bits: BitWidth,
    /// Largest sparsity of any layer. In [0, 1).
    pub max_sparsity: f64,
    /// Whether no layer gets palettes of vectors.
    pub no_vectors: bool,
    /// Samples by which the effect of a layer's error on the network's output is measured. At least
    /// 1.
    pub probes: usize,
}

/// The size of the result, or its closeness to the dense model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BudgetTarget {
    /// Bytes of all tensors of the result.
    Size(u64),
    /// Mean bits of a compressed weight.
    Bits(f64),
    /// The largest error of the UNet's output on held-out calls, in per cent of the dense output's
    /// squared norm.
    Error(f64),
    /// The lowest mean PSNR of pictures against the dense model's, in dB.
    Psnr(f64),
}

/// How the smallest size of a closeness is searched for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SizeSearch {
    /// The prompts that results are judged on.
    #[serde(rename = "target_prompts")]
    pub prompts: Prompts,
    /// UNet calls on which the error of the UNet's output is measured; `None` is one for each
    /// prompt, and at least 48. At least 1.
    #[serde(rename = "target_calls")]
    pub calls: Option<usize>,
    /// Sizes that are compressed to at most. From 1 to 100.
    #[serde(rename = "target_solves")]
    pub solves: usize,
}

impl Default for SizeSearch {
    fn default() -> Self {
        use keys::budget::*;
        SizeSearch { prompts: Prompts::of(&TARGET_PROMPTS.default_value()), calls: None, solves: TARGET_SOLVES.default_value() }
    }
}

impl Default for ModelSection {
    fn default() -> Self {
        let (device, dtype) = (keys::model::DEVICE.default_value(), keys::model::DTYPE.default_value());
        ModelSection { path: None, base: None, vae: None, loras: Vec::new(), lora_ignore: None, device, dtype }
    }
}

impl CalibrationSection {
    /// Steps of a model that is not distilled, where the config gives none.
    pub const STEPS: usize = 20;
    /// Guidance scale of a model that is not distilled, where the config gives none.
    pub const GUIDANCE: f64 = 5.0;
    /// Share of the timesteps that SDXL's base denoises before its refiner, where the config gives
    /// none: the refiner was trained on the last fifth alone (Podell et al. 2023, arXiv:2307.01952,
    /// section 2.5, and `denoising_start` in the documentation of diffusers).
    pub const REFINER_START: f64 = 0.8;
}

impl Default for CalibrationSection {
    fn default() -> Self {
        use keys::calibration::*;
        CalibrationSection {
            prompts: Prompts::of(&PROMPTS.default_value()),
            samples: None,
            captions: None,
            captions_nsamples: CAPTIONS_NSAMPLES.default_value(),
            timestep_weighting: TIMESTEP_WEIGHTING.default_value(),
            calibration_nsamples: CALIBRATION_NSAMPLES.default_value(),
            scheduler: None,
            timestep_spacing: None,
            eta: ETA.default_value(),
            denoising_start: None,
            steps: None,
            guidance: None,
            guidance_rescale: GUIDANCE_RESCALE.default_value(),
            negative_prompt: None,
            mix: vec![Feed::default()],
            reading: PromptOptions::default(),
            seed: SEED.default_value(),
            size: None,
        }
    }
}

impl Default for PruneSection {
    fn default() -> Self {
        PruneSection {
            layers: default_layers(),
            algorithm: keys::prune::ALGORITHM.default_value(),
            rules: Rules::global(PruneOptions::default()),
        }
    }
}

impl Default for PalettizeSection {
    fn default() -> Self {
        PalettizeSection {
            rules: Rules::global(PaletteOptions::default()),
            on_misfit: keys::palettize::ON_MISFIT.default_value(),
            weight_threshold: keys::palettize::WEIGHT_THRESHOLD.default_value(),
        }
    }
}

impl PalettizeSection {
    /// The quantizers of the rules that give fixed values.
    pub(super) fn quantizers(&self) -> impl Iterator<Item = Quantizer> {
        self.rules.all_settings().filter_map(|settings| settings.quantizer)
    }
}

/// Writes LoRAs as they are read.
fn as_texts<S: Serializer>(loras: &[LoraFile], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(loras.iter().map(LoraFile::to_string))
}

impl ModelSection {
    /// The files of the section's model, which is `model`.
    #[must_use]
    pub fn files(&self, model: PathBuf) -> ModelFiles {
        let ModelSection { path: _, base, vae, loras, lora_ignore, device: _, dtype: _ } = self.clone();
        ModelFiles { model, base, vae, loras, lora_ignore, ..ModelFiles::default() }
    }

    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::model::*;
        ModelSection {
            path: fields.get(&PATH, mistakes),
            base: fields.get(&BASE, mistakes),
            vae: fields.get(&VAE, mistakes),
            loras: fields.get(&LORAS, mistakes).unwrap_or_default(),
            lora_ignore: fields.get(&LORA_IGNORE, mistakes),
            device: fields.value(&DEVICE, mistakes),
            dtype: fields.value(&DTYPE, mistakes),
        }
    }
}

impl CalibrationSection {
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::calibration::*;
        for (key, partner) in [(&HEIGHT, &WIDTH), (&WIDTH, &HEIGHT)] {
            if let (Some(alone), None) = (fields.given(key.name), fields.given(partner.name)) {
                let advice = match alone.position {
                    Position::File { .. } => "give both or neither".to_owned(),
                    Position::Flag(_) => format!("--{} needs --{} too", key.name, partner.name),
                };
                mistakes.add(alone.position, format!("`height` and `width` go together; {advice}"));
            }
        }
        let (height, width) = (fields.get(&HEIGHT, mistakes), fields.get(&WIDTH, mistakes));
        let prompts = fields.value(&PROMPTS, mistakes);
        prompts::check(&prompts, mistakes);
        CalibrationSection {
            prompts: Prompts::of(&prompts),
            samples: fields.get(&SAMPLES, mistakes),
            captions: fields.get(&CAPTIONS, mistakes),
            captions_nsamples: fields.value(&CAPTIONS_NSAMPLES, mistakes),
            timestep_weighting: fields.value(&TIMESTEP_WEIGHTING, mistakes),
            calibration_nsamples: fields.value(&CALIBRATION_NSAMPLES, mistakes),
            scheduler: fields.get(&SCHEDULER, mistakes),
            timestep_spacing: fields.get(&TIMESTEP_SPACING, mistakes),
            eta: fields.value(&ETA, mistakes),
            denoising_start: fields.get(&DENOISING_START, mistakes),
            steps: fields.get(&STEPS, mistakes),
            guidance: fields.get(&GUIDANCE, mistakes),
            guidance_rescale: fields.value(&GUIDANCE_RESCALE, mistakes),
            negative_prompt: fields.get(&NEGATIVE_PROMPT, mistakes),
            mix: fields.get(&MIX, mistakes).unwrap_or_else(|| vec![Feed::default()]),
            reading: PromptOptions {
                clip_skip: fields.value(&CLIP_SKIP, mistakes),
                long_prompts: fields.value(&LONG_PROMPTS, mistakes),
            },
            seed: fields.value(&SEED, mistakes),
            size: height.zip(width),
        }
    }
}

impl PruneSection {
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::prune::*;
        PruneSection {
            layers: layers(fields, mistakes),
            algorithm: fields.value(&ALGORITHM, mistakes),
            rules: rules::read(fields, mistakes),
        }
    }
}

fn layers(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Vec<Written<NamePattern>> {
    let key = &keys::prune::LAYERS;
    let (Some(listed), Some(node)) = (fields.get(key, mistakes), fields.given(key.name)) else { return default_layers() };
    let listed = texts(key.name, &listed, mistakes);
    if let Some(problem) = rules::too_many(listed.len()) {
        mistakes.add(node.position, format!("`{}` {problem}", key.name));
        return Vec::new();
    }
    let mut patterns = Vec::new();
    for (written, position) in listed {
        match pattern(written) {
            Ok(value) => patterns.push(Written { value, place: mistakes.place(position) }),
            Err(problem) => mistakes.add(position, problem),
        }
    }
    patterns
}

/// The stages that are pruned where a config does not name them.
fn default_layers() -> Vec<Written<NamePattern>> {
    let stages = keys::prune::LAYERS.default_value();
    let stages = stages.iter().map(|stage| text(stage).expect("the default stages are text"));
    let patterns = stages.map(|stage| pattern(stage).expect("the default stages are regular expressions"));
    patterns.map(|value| Written { value, place: Place::Default }).collect()
}

impl PalettizeSection {
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::palettize::*;
        PalettizeSection {
            rules: rules::read(fields, mistakes),
            on_misfit: fields.value(&ON_MISFIT, mistakes),
            weight_threshold: fields.value(&WEIGHT_THRESHOLD, mistakes),
        }
    }
}

impl NetworkSection {
    pub(super) fn of_text_encoders(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::text_encoders::*;
        let rules = fitted(fields, mistakes);
        let (on_misfit, weight_threshold) = (fields.value(&ON_MISFIT, mistakes), fields.value(&WEIGHT_THRESHOLD, mistakes));
        let palettize = PalettizeSection { rules, on_misfit, weight_threshold };
        NetworkSection { nsamples: fields.value(&NSAMPLES, mistakes), palettize }
    }
}

impl VaeSection {
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::vae::*;
        let rules = fitted(fields, mistakes);
        let (on_misfit, weight_threshold) = (fields.value(&ON_MISFIT, mistakes), fields.value(&WEIGHT_THRESHOLD, mistakes));
        let palettize = PalettizeSection { rules, on_misfit, weight_threshold };
        let network = NetworkSection { nsamples: fields.value(&NSAMPLES, mistakes), palettize };
        VaeSection { encoder: fields.value(&ENCODER, mistakes), network }
    }
}

/// The rules of a section whose palettes are fitted: fixed values are a mistake.
fn fitted(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Rules<PaletteOptions> {
    let rules: Rules<PaletteOptions> = rules::read(fields, mistakes);
    let fixed = rules.all_settings().find_map(|settings| settings.quantizer);
    if let Some(Quantizer { grid, .. }) = fixed {
        let (section, values) = (fields.name(), grid.name());
        mistakes
            .add(fields.position(), format!("`{section}` has fitted palettes alone (`values: kmeans`), not `values: {values}`"));
    }
    rules
}

impl BudgetSection {
    /// A target, with the defaults of all else.
    #[must_use]
    pub fn of(target: BudgetTarget) -> Self {
        use keys::budget::*;
        BudgetSection {
            target,
            search: target.is_closeness().then(SizeSearch::default),
            min_bits: MIN_BITS.default_value(),
            max_sparsity: MAX_SPARSITY.default_value(),
            no_vectors: NO_VECTORS.default_value(),
            probes: PROBES.default_value(),
        }
    }

    /// `None` if there is no target that can be read, which is a mistake.
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Self> {
        use keys::budget::*;
        let targets = [TARGET_SIZE.name, TARGET_BITS.name, TARGET_ERROR.name, TARGET_PSNR.name];
        let given: Vec<_> = targets.into_iter().filter_map(|name| Some((name, fields.given(name)?))).collect();
        match given.as_slice() {
            [] => {
                mistakes.add(fields.position(), "`budget` needs `target_size` or `target_bits`, `target_error` or `target_psnr`")
            }
            [_] => {}
            [(one, node), others @ ..] => {
                for (other, _) in others {
                    mistakes.add(node.position, format!("`{one}` and `{other}` exclude each other; give one"));
                }
            }
        }
        let size = fields.get(&TARGET_SIZE, mistakes).map(BudgetTarget::Size);
        let bits = fields.get(&TARGET_BITS, mistakes).map(BudgetTarget::Bits);
        let error = fields.get(&TARGET_ERROR, mistakes).map(BudgetTarget::Error);
        let psnr = fields.get(&TARGET_PSNR, mistakes).map(BudgetTarget::Psnr);
        let is_size = |(name, _): &(&str, _)| *name == TARGET_SIZE.name || *name == TARGET_BITS.name;
        if !given.is_empty() && given.iter().all(is_size) {
            for name in [TARGET_PROMPTS.name, TARGET_CALLS.name, TARGET_SOLVES.name] {
                if let Some(node) = fields.given(name) {
                    mistakes.add(node.position, format!("`{name}` goes with `target_error` or `target_psnr`"));
                }
            }
        }
        let prompts = fields.value(&TARGET_PROMPTS, mistakes);
        prompts::check(&prompts, mistakes);
        let search = SizeSearch {
            prompts: Prompts::of(&prompts),
            calls: fields.get(&TARGET_CALLS, mistakes),
            solves: fields.value(&TARGET_SOLVES, mistakes),
        };
        let (min_bits, max_sparsity) = (fields.value(&MIN_BITS, mistakes), fields.value(&MAX_SPARSITY, mistakes));
        let probes = fields.value(&PROBES, mistakes);
        let no_vectors = fields.value(&NO_VECTORS, mistakes);
        let target = size.or(bits).or(error).or(psnr)?;
        let search = target.is_closeness().then_some(search);
        Some(BudgetSection { target, search, min_bits, max_sparsity, no_vectors, probes })
    }

    /// The budget with a size in the place of its target.
    #[must_use]
    pub fn with_size(&self, target: BudgetTarget) -> Self {
        BudgetSection { target, search: None, ..self.clone() }
    }
}

impl BudgetTarget {
    /// Whether the target is a closeness to the dense model, whose size has to be searched for.
    #[must_use]
    pub fn is_closeness(self) -> bool {
        match self {
            BudgetTarget::Error(_) | BudgetTarget::Psnr(_) => true,
            BudgetTarget::Size(_) | BudgetTarget::Bits(_) => false,
        }
    }
}

fn path_or_null<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}

/// Writes the keys `height` and `width`.
fn write_size<S: Serializer>(size: &Option<(i64, i64)>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys {
        height: Option<i64>,
        width: Option<i64>,
    }
    let (height, width) = size.unzip();
    Keys { height, width }.serialize(serializer)
}

fn is_default_mix(mix: &[Feed]) -> bool {
    mix == [Feed::default()]
}

/// Writes how prompts are read, where it is not the default.
fn write_reading<S: Serializer>(reading: &PromptOptions, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys {
        #[serde(skip_serializing_if = "Option::is_none")]
        clip_skip: Option<usize>,
        #[serde(skip_serializing_if = "Option::is_none")]
        long_prompts: Option<bool>,
    }
    let PromptOptions { clip_skip, long_prompts } = *reading;
    let keys =
        Keys { clip_skip: Some(clip_skip).filter(|skip| *skip > 0), long_prompts: Some(long_prompts).filter(|long| *long) };
    keys.serialize(serializer)
}

/// Writes the key of the target.
fn write_target<S: Serializer>(target: &BudgetTarget, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    enum Keys {
        #[serde(rename = "target_size")]
        Size(String),
        #[serde(rename = "target_bits")]
        Bits(f64),
        #[serde(rename = "target_error")]
        Error(String),
        #[serde(rename = "target_psnr")]
        Psnr(f64),
    }
    match target {
        BudgetTarget::Size(bytes) => Keys::Size(format!("{bytes} B")),
        BudgetTarget::Bits(bits) => Keys::Bits(*bits),
        BudgetTarget::Error(percent) => Keys::Error(format!("{percent}%")),
        BudgetTarget::Psnr(decibels) => Keys::Psnr(*decibels),
    }
    .serialize(serializer)
}
