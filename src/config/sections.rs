//! The four sections of a run config.

use std::path::PathBuf;

use super::emit::{self, Yaml};
use super::fields::{Fields, number, path, text, whole, word};
use super::limits;
use super::mistake::{Mistakes, Place, Written};
use super::prompts::{prompt_of_length, too_many};
use super::rules::{self, Rules, pattern};
use super::tree::{Node, Position, Value};
use crate::codebook::{BitWidth, OnMisfit, PaletteOptions, PruneMethod, PruneOptions};
use crate::pattern::NamePattern;

/// What is compressed, and where it is computed.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSection {
    /// The pipeline's folder; absent where the command line names it.
    pub path: Option<PathBuf>,
    /// cpu, cuda or cuda:N. Whether this machine has it is not known here.
    pub device: String,
    /// The precision of the UNet's runs: f32, f16 or bf16.
    pub dtype: String,
}

/// Where the UNet inputs come from that Hessians are built on.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationSection {
    /// The prompts that are run through the dense pipeline.
    pub prompts: Prompts,
    /// A safetensors file of samples that are read instead; then no prompt is run.
    pub samples: Option<PathBuf>,
    /// Prompts that are only encoded, not drawn: for the layers that see nothing but text, and those that see nothing but time and text.
    pub captions: Option<PathBuf>,
    /// How many captions are taken, evenly over the file. At least 1.
    pub captions_nsamples: usize,
    /// How much each UNet call counts.
    pub timestep_weighting: TimestepWeighting,
    /// How many UNet calls are taken, evenly over prompts and timesteps. At least 1.
    pub calibration_nsamples: usize,
    /// Denoising steps for each prompt. At least 1.
    pub steps: usize,
    /// Guidance scale; 1 is none. At least 0.
    pub guidance: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Height and width of the pictures in pixels; absent: what the model was made for.
    pub size: Option<(i64, i64)>,
}

/// Prompts, or the file that they are in.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompts {
    /// A file for [`read_prompts`](super::read_prompts). A relative path starts at the current folder.
    File(PathBuf),
    /// The prompts themselves; at least one.
    List(Vec<String>),
}

/// Which layers are pruned, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct PruneSection {
    /// The stages that are pruned (coremltools' `layers`); other stages and the UNet's two ends are not.
    pub layers: Vec<Written<NamePattern>>,
    /// The solver.
    pub algorithm: PruneMethod,
    /// The settings of their layers.
    pub rules: Rules<PruneOptions>,
}

/// How mask, weights and palette of a layer are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SolverKind {
    /// `sequential`: pruned first, then palettized without looking at the inputs again, as coremltools does.
    Sequential,
    /// `joint`: all together, for the least error of the layer's output; see [`joint`](crate::solver::joint()). Calibrates palettes too.
    #[default]
    Joint,
}

/// When a stage's layers learn of each other (the key `granularity`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pace {
    /// `stage`: all Hessians of a stage come from its layers as they were. What the sequential solver does unless told otherwise.
    Stage,
    /// `sublayer`: each input's Hessian comes from the layers before it as they will be stored. More passes over the samples.
    #[default]
    Sublayer,
}

/// What a layer's outputs are to be close to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Target {
    /// `current`: those that its dense weights make of the inputs it will have.
    Current,
    /// `dense`: those of the dense network, so that errors of the layers before are corrected too. Needs the joint solver and
    /// `granularity: sublayer`, and is what these do unless told otherwise.
    #[default]
    Dense,
}

/// How much each sample counts in the Hessians, by its timestep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimestepWeighting {
    /// `uniform`: all the same.
    #[default]
    Uniform,
    /// `early`: as sigma, the noise to signal ratio: early steps decide what a picture becomes.
    Early,
    /// `log`: as ln(1 + sigma).
    Log,
}

/// Which layers are palettized, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct PalettizeSection {
    /// The settings of all the UNet's layers.
    pub rules: Rules<PaletteOptions>,
    /// What becomes of a layer whose channels no group of its size divides.
    pub on_misfit: OnMisfit,
    /// Weights of at most this many elements stay fp16. coremltools' converter skips those of 2,048 and fewer.
    pub weight_threshold: u64,
}

/// How many bytes the result may have. Settings for each layer are found that keep to it (see [`compress`](crate::compress)).
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetSection {
    /// `target_size` or `target_bits`.
    pub target: BudgetTarget,
    /// The least bits of a palette index.
    pub min_bits: BitWidth,
    /// The largest share of a layer that is pruned. In [0, 1).
    pub max_sparsity: f64,
    /// Samples on which it is measured how far errors reach. At least 1.
    pub probes: usize,
}

/// How many bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BudgetTarget {
    /// Bytes of all tensors of the result.
    Size(u64),
    /// Bits for each compressed weight, in the mean.
    Bits(f64),
}

/// The names of an enum's values in a config.
macro_rules! words {
    ($kind:ident, $($word:literal => $value:ident),+) => {
        impl $kind {
            pub(super) const WORDS: &[(&str, $kind)] = &[$(($word, $kind::$value)),+];

            /// The name in a config.
            pub fn name(self) -> &'static str {
                match self {
                    $($kind::$value => $word),+
                }
            }
        }
    };
}

words!(SolverKind, "sequential" => Sequential, "joint" => Joint);
words!(Pace, "stage" => Stage, "sublayer" => Sublayer);
words!(Target, "current" => Current, "dense" => Dense);
words!(TimestepWeighting, "uniform" => Uniform, "early" => Early, "log" => Log);

impl SolverKind {
    /// What is taken where a config names none: joint, unless masks go by magnitude.
    pub(super) fn that_can(prune: Option<&PruneSection>) -> Self {
        match prune.map(|section| section.algorithm) {
            Some(PruneMethod::Magnitude) => SolverKind::Sequential,
            Some(PruneMethod::SparseGpt) | None => SolverKind::Joint,
        }
    }
}

impl Pace {
    /// What goes with a solver.
    pub(super) fn of(solver: SolverKind) -> Self {
        match solver {
            SolverKind::Sequential => Pace::Stage,
            SolverKind::Joint => Pace::Sublayer,
        }
    }
}

impl Target {
    /// What goes with a solver and a pace.
    pub(super) fn of(solver: SolverKind, pace: Pace) -> Self {
        match (solver, pace) {
            (SolverKind::Joint, Pace::Sublayer) => Target::Dense,
            (SolverKind::Joint, Pace::Stage) | (SolverKind::Sequential, _) => Target::Current,
        }
    }
}

impl Default for ModelSection {
    fn default() -> Self {
        ModelSection { path: None, device: "cpu".into(), dtype: "f32".into() }
    }
}

impl Default for CalibrationSection {
    fn default() -> Self {
        CalibrationSection {
            prompts: Prompts::File("calibration/varied.txt".into()),
            samples: None,
            captions: None,
            captions_nsamples: 512,
            timestep_weighting: TimestepWeighting::Uniform,
            calibration_nsamples: 384,
            steps: 20,
            guidance: 5.0,
            seed: 0,
            size: None,
        }
    }
}

impl Default for PruneSection {
    fn default() -> Self {
        // These compile: a test says so.
        let stages =
            [r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"].into_iter().filter_map(|stage| NamePattern::parse(stage).ok());
        PruneSection {
            layers: stages.map(|value| Written { value, place: Place::Default }).collect(),
            algorithm: PruneMethod::SparseGpt,
            rules: Rules::global(PruneOptions::default()),
        }
    }
}

impl Default for PalettizeSection {
    fn default() -> Self {
        PalettizeSection { rules: Rules::global(PaletteOptions::default()), on_misfit: OnMisfit::Error, weight_threshold: 2048 }
    }
}

impl ModelSection {
    pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        ModelSection {
            path: fields.get("path", mistakes, path),
            device: fields.get("device", mistakes, |node| limits::device(text(node)?)).unwrap_or(default.device),
            dtype: fields.get("dtype", mistakes, |node| limits::dtype(text(node)?)).unwrap_or(default.dtype),
        }
    }

    pub(super) fn write(&self, yaml: &mut Yaml) {
        let ModelSection { path, device, dtype } = self;
        yaml.entry("path", emit::or_null(path.as_ref(), |path| emit::text(&path.to_string_lossy())));
        yaml.entry("device", emit::text(device));
        yaml.entry("dtype", emit::text(dtype));
    }
}

impl CalibrationSection {
    pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        let (tall, wide) = (fields.given("height"), fields.given("width"));
        if let (Some(alone), None) | (None, Some(alone)) = (tall, wide) {
            mistakes.add(alone.position, "`height` and `width` go together; give both or neither");
        }
        let height = fields.get("height", mistakes, |node| limits::pixels(whole(node)?));
        let width = fields.get("width", mistakes, |node| limits::pixels(whole(node)?));
        CalibrationSection {
            prompts: prompts(fields, mistakes).unwrap_or(default.prompts),
            samples: fields.get("samples", mistakes, path),
            captions: fields.get("captions", mistakes, path),
            captions_nsamples: fields
                .get("captions_nsamples", mistakes, |node| limits::count(whole(node)?))
                .unwrap_or(default.captions_nsamples),
            timestep_weighting: fields
                .get("timestep_weighting", mistakes, |node| word(node, TimestepWeighting::WORDS))
                .unwrap_or(default.timestep_weighting),
            calibration_nsamples: fields
                .get("calibration_nsamples", mistakes, |node| limits::count(whole(node)?))
                .unwrap_or(default.calibration_nsamples),
            steps: fields.get("steps", mistakes, |node| limits::count(whole(node)?)).unwrap_or(default.steps),
            guidance: fields.get("guidance", mistakes, |node| limits::not_negative(number(node)?)).unwrap_or(default.guidance),
            seed: fields.get("seed", mistakes, |node| limits::elements(whole(node)?)).unwrap_or(default.seed),
            size: height.zip(width),
        }
    }

    pub(super) fn write(&self, yaml: &mut Yaml) {
        let CalibrationSection { prompts, samples, captions, captions_nsamples, timestep_weighting, .. } = self;
        let CalibrationSection { calibration_nsamples, steps, guidance, seed, size, .. } = self;
        match prompts {
            Prompts::File(path) => yaml.entry("prompts", emit::text(&path.to_string_lossy())),
            Prompts::List(prompts) => yaml.list("prompts", prompts.iter().map(|prompt| emit::text(prompt))),
        }
        yaml.entry("samples", emit::or_null(samples.as_ref(), |path| emit::text(&path.to_string_lossy())));
        yaml.entry("captions", emit::or_null(captions.as_ref(), |path| emit::text(&path.to_string_lossy())));
        yaml.entry("captions_nsamples", captions_nsamples.to_string());
        yaml.entry("timestep_weighting", timestep_weighting.name());
        yaml.entry("calibration_nsamples", calibration_nsamples.to_string());
        yaml.entry("steps", steps.to_string());
        yaml.entry("guidance", emit::number(*guidance));
        yaml.entry("seed", seed.to_string());
        yaml.entry("height", emit::or_null(*size, |(height, _)| height.to_string()));
        yaml.entry("width", emit::or_null(*size, |(_, width)| width.to_string()));
    }
}

/// A path, or a list of prompts.
fn prompts(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Prompts> {
    let node = fields.get("prompts", mistakes, |node| match &node.value {
        Value::List(list) if list.is_empty() => Err("must list at least one prompt".to_owned()),
        Value::Text(_) | Value::List(_) => Ok(node),
        _ => Err("must be a file or a list of prompts".to_owned()),
    })?;
    if let Value::Text(_) = node.value {
        return fields.get("prompts", mistakes, path).map(Prompts::File);
    }
    let listed = texts("prompts", node, mistakes);
    if let Some(problem) = too_many(listed.len()) {
        mistakes.add(node.position, format!("`prompts` {problem}"));
    }
    for (number, (prompt, position)) in (1..).zip(&listed) {
        if let Err(problem) = prompt_of_length(&format!("prompt {number}"), prompt) {
            mistakes.add(*position, problem);
        }
    }
    Some(Prompts::List(listed.into_iter().map(|(prompt, _)| prompt.to_owned()).collect()))
}

/// The entries of a list that are text. The others are mistakes.
fn texts<'a>(key: &str, node: &'a Node, mistakes: &mut Mistakes<'_>) -> Vec<(&'a str, Position)> {
    let Value::List(list) = &node.value else { return Vec::new() };
    let mut texts = Vec::new();
    for node in list {
        match text(node) {
            Ok(text) => texts.push((text, node.position)),
            Err(must) => mistakes.add(node.position, format!("an entry of `{key}` {must}, not {}", node.value)),
        }
    }
    texts
}

impl PruneSection {
    pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        PruneSection {
            layers: layers(fields, mistakes).unwrap_or(default.layers),
            algorithm: fields
                .get("algorithm", mistakes, |node| word(node, &PruneMethod::ALL.map(|method| (method.name(), method))))
                .unwrap_or(default.algorithm),
            rules: rules::read(fields, mistakes),
        }
    }

    pub(super) fn write(&self, yaml: &mut Yaml) {
        let PruneSection { layers, algorithm, rules } = self;
        yaml.list("layers", layers.iter().map(|stage| emit::text(&stage.value.to_string())));
        yaml.entry("algorithm", algorithm.name());
        rules::write(rules, yaml);
    }
}

fn layers(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Vec<Written<NamePattern>>> {
    let node = fields.get("layers", mistakes, |node| match &node.value {
        Value::List(list) if list.is_empty() => Err("must name at least one stage".to_owned()),
        Value::List(_) => Ok(node),
        _ => Err("must be a list of regular expressions".to_owned()),
    })?;
    let mut patterns = Vec::new();
    let listed = texts("layers", node, mistakes);
    if let Some(problem) = rules::too_many(listed.len()) {
        mistakes.add(node.position, format!("`layers` {problem}"));
        return None;
    }
    for (written, position) in listed {
        match pattern(written) {
            Ok(value) => patterns.push(Written { value, place: mistakes.place(position) }),
            Err(why) => mistakes.add(position, why),
        }
    }
    Some(patterns)
}

impl PalettizeSection {
    pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        PalettizeSection {
            rules: rules::read(fields, mistakes),
            on_misfit: fields
                .get("on_misfit", mistakes, |node| word(node, &OnMisfit::ALL.map(|policy| (policy.name(), policy))))
                .unwrap_or(default.on_misfit),
            weight_threshold: fields
                .get("weight_threshold", mistakes, |node| limits::elements(whole(node)?))
                .unwrap_or(default.weight_threshold),
        }
    }

    pub(super) fn write(&self, yaml: &mut Yaml) {
        let PalettizeSection { rules, on_misfit, weight_threshold } = self;
        rules::write(rules, yaml);
        yaml.entry("on_misfit", on_misfit.name());
        yaml.entry("weight_threshold", weight_threshold.to_string());
    }
}

/// A size with its unit, or a number of bytes.
fn byte_size(node: &Node) -> Result<u64, String> {
    match &node.value {
        Value::Integer(bytes) => limits::bytes(&bytes.to_string()),
        _ => limits::bytes(text(node)?),
    }
}

impl BudgetSection {
    /// Only this target.
    pub fn of(target: BudgetTarget) -> Self {
        BudgetSection { target, min_bits: BitWidth::Two, max_sparsity: 0.6, probes: 8 }
    }

    pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Self> {
        let (size, bits) = (fields.given("target_size"), fields.given("target_bits"));
        match (size, bits) {
            (Some(size), Some(_)) => mistakes.add(size.position, "`target_size` and `target_bits` exclude each other; give one"),
            (None, None) => mistakes.add(fields.position(), "`budget` needs `target_size` or `target_bits`"),
            _ => {}
        }
        let size = fields.get("target_size", mistakes, byte_size).map(BudgetTarget::Size);
        let bits = fields.get("target_bits", mistakes, |node| limits::target_bits(number(node)?)).map(BudgetTarget::Bits);
        let default = Self::of(BudgetTarget::Bits(4.0));
        let min_bits = fields.get("min_bits", mistakes, |node| limits::n_bits(whole(node)?)).unwrap_or(default.min_bits);
        let max_sparsity =
            fields.get("max_sparsity", mistakes, |node| limits::target_sparsity(number(node)?)).unwrap_or(default.max_sparsity);
        let probes = fields.get("probes", mistakes, |node| limits::count(whole(node)?)).unwrap_or(default.probes);
        Some(BudgetSection { target: size.or(bits)?, min_bits, max_sparsity, probes })
    }

    pub(super) fn write(&self, yaml: &mut Yaml) {
        let BudgetSection { target, min_bits, max_sparsity, probes } = self;
        match target {
            BudgetTarget::Size(bytes) => yaml.entry("target_size", emit::text(&format!("{bytes} B"))),
            BudgetTarget::Bits(bits) => yaml.entry("target_bits", emit::number(*bits)),
        }
        yaml.entry("min_bits", min_bits.to_string());
        yaml.entry("max_sparsity", emit::number(*max_sparsity));
        yaml.entry("probes", probes.to_string());
    }
}
