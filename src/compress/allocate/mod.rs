//! Settings for each layer that together take a given number of bytes at the least error.
//!
//! Each layer is tried with several settings on the dense network's Hessians; what an error of its output does to the UNet's output is
//! measured by backpropagation; then bytes go where they spare the most ([`choose`]). What comes out is a plain config.

mod choose;
mod curves;
mod sensitivity;

use std::collections::BTreeMap;

pub use choose::{Choice, choose};

use super::{Gatherer, Job, LayerRecipe, LayerRecipes, Recipe};
use crate::calibration::Samples;
use crate::config::{self, BudgetSection, BudgetTarget, PaletteSettings, PruneSettings, RunConfig};
use crate::error::{Error, Result};
use crate::number;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::solver::palette::{Granularity, PaletteOptions};
use crate::solver::{PruneOptions, Sparsity};

/// What no layer's settings may go beyond.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub min_bits: u8,
    pub max_sparsity: f64,
}

/// What an allocation came to.
#[derive(Debug)]
pub struct Allocation {
    /// The config without a budget, but with a rule for each layer.
    pub config: RunConfig,
    /// Bytes of the result's tensors.
    pub payload_bytes: u64,
}

/// What is done to every layer for measuring: all that any setting might need.
pub(super) fn measuring(recipes: &LayerRecipes) -> LayerRecipes {
    let hungry = |recipe: &LayerRecipe| LayerRecipe { prune: None, ..recipe.clone() };
    recipes.iter().map(|(name, recipe)| (name.clone(), hungry(recipe))).collect()
}

/// Finds settings for `budget`. `job` is planned for [`measuring`]; `plan` is of the recipe as it is.
///
/// # Errors
/// [`Error::Argument`] if nothing can be allocated or not even the smallest settings are few enough bytes, naming how many those are.
#[expect(clippy::too_many_arguments, reason = "what a run knows of its model and samples")]
pub(super) fn allocate(
    job: &Job,
    config: &RunConfig,
    recipe: &Recipe,
    plan: &Plan,
    budget: &BudgetSection,
    samples: &Samples,
    captions: Gatherer,
    folder: &std::path::Path,
    progress: &dyn Progress,
) -> Result<Allocation> {
    // The ends stay as they are: they are few bytes, and how far their errors reach is not measured.
    let staged = crate::recipe::layers_of(job.chain)?.into_iter().filter(|layer| layer.stage.is_some());
    let shapes: BTreeMap<String, Vec<i64>> = staged.map(|layer| (layer.name, layer.shape)).collect();
    let limits = Limits { min_bits: budget.min_bits, max_sparsity: budget.max_sparsity };
    let settings = curves::settings(&recipe.layers, &shapes, &limits);
    if settings.is_empty() {
        return Err(Error::Argument("a budget needs layers that are palettized by the joint solver; there are none".into()));
    }
    let sensitivities = job.sensitivities(samples, budget.probes, progress)?;
    let curves = job.curves(&settings, samples, captions, folder, progress)?;

    // Rounded, so that what threads add in another order does not decide.
    let rounded = |value: f64| format!("{value:.3e}").parse::<f64>().unwrap_or(value);
    let mut names = Vec::new();
    let mut choices = Vec::new();
    for (name, measured) in &curves {
        let reaches =
            rounded(sensitivities.by_layer.get(name).copied().unwrap_or(0.0) / sensitivities.energy.max(f64::MIN_POSITIVE));
        names.push(name);
        choices.push(
            measured
                .iter()
                .map(|measured| Choice { bytes: measured.bytes, cost: reaches * rounded(measured.error) })
                .collect::<Vec<_>>(),
        );
    }
    // What the allocated layers take in the recipe as it is; everything else stays as it is.
    let own: u64 = names.iter().map(|name| crate::plan::stored_bytes(&shapes[*name], &recipe.layers[*name])).sum();
    let fixed = plan.payload_bytes - own;
    let total = match budget.target {
        BudgetTarget::Size(bytes) => bytes,
        BudgetTarget::Bits(bits) => fixed + (bits / 8.0 * plan.compressed_elements as f64) as u64 - (plan.compressed_bytes - own),
    };
    let Some(chosen) = choose(&choices, total.saturating_sub(fixed)) else {
        let least: u64 = choices.iter().filter_map(|choices| choices.iter().map(|choice| choice.bytes).min()).sum();
        return Err(Error::Argument(format!(
            "{} ({} bytes) are too few: the smallest settings take {} ({} bytes)",
            number::size(total),
            number::count(total),
            number::size(fixed + least),
            number::count(fixed + least)
        )));
    };
    let mut allocated = config.clone();
    allocated.budget = None;
    let mut bytes = fixed;
    let mut rules = Vec::new();
    for ((name, index), (choices, measured)) in names.iter().zip(&chosen).zip(choices.iter().zip(curves.values())) {
        bytes += choices[*index].bytes;
        rules.push(((*name).clone(), &measured[*index].recipe));
    }
    write_rules(&mut allocated, &rules)?;
    Ok(Allocation { config: allocated, payload_bytes: bytes })
}

/// Puts a rule for each layer before the config's own.
fn write_rules(config: &mut RunConfig, rules: &[(String, &LayerRecipe)]) -> Result<()> {
    let (mut prune, mut palettize) = (Vec::new(), Vec::new());
    for (name, recipe) in rules {
        let pattern = config::Written::own(&regex::escape(name))?;
        prune.push((pattern.clone(), recipe.prune.as_ref().map(prune_settings)));
        palettize.push((pattern, recipe.palettize.as_ref().map(palette_settings)));
    }
    if let Some(section) = &mut config.prune {
        prune.append(&mut section.rules.module_name_configs);
        section.rules.module_name_configs = prune;
    }
    if let Some(section) = &mut config.palettize {
        palettize.append(&mut section.rules.module_name_configs);
        section.rules.module_name_configs = palettize;
    }
    Ok(())
}

fn prune_settings(options: &PruneOptions) -> PruneSettings {
    let sparsity = match options.sparsity {
        Sparsity::Unstructured(share) => config::Sparsity::Unstructured(share),
        Sparsity::NM { n, m } => config::Sparsity::NOfM(config::NmRatio { n, m }),
    };
    PruneSettings { sparsity, hessian_dampening: options.dampening, processing_group_size: options.block }
}

fn palette_settings(options: &PaletteOptions) -> PaletteSettings {
    let (granularity, channel_axis) = match options.granularity {
        Granularity::PerTensor => (config::Granularity::PerTensor, 0),
        Granularity::PerGroupedChannel { group_size, axis } => (config::Granularity::PerGroupedChannel { group_size }, axis),
    };
    PaletteSettings { n_bits: options.bits, granularity, channel_axis, enable_per_channel_scale: options.per_channel_scale }
}
