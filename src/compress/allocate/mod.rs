//! Settings for each layer that together take a given number of bytes at the least error.
//!
//! Each layer is tried with several settings on the Hessians of the dense network. Backpropagation
//! measures the effect of an error in its output on the output of the UNet. Bytes go where they
//! reduce the error most ([`choose`]). The result is a config with a rule for each layer.

mod choose;
mod curves;
mod measurement;
mod sensitivity;

use std::collections::BTreeMap;

pub use choose::{Choice, choose};
use measurement::Limits;
pub(super) use measurement::Measurement;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;

use crate::config::{self, BudgetSection, BudgetTarget, RunConfig};
use crate::plan::{Plan, stored_bytes};
use crate::recipe::{LayerRecipe, LayerRecipes, Recipe, layers_of};

/// The result of an allocation.
#[derive(Debug)]
pub struct Allocation {
    /// The config without a budget, but with a rule for each layer.
    pub config: RunConfig,
    /// Bytes of the result's tensors.
    pub payload_bytes: u64,
}

/// The recipes for measuring: every layer that can be allocated needs its Hessian, whatever its
/// setting.
pub(super) fn measuring(layers: &LayerRecipes) -> LayerRecipes {
    let unpruned = |recipe: &LayerRecipe| LayerRecipe { prune: None, ..recipe.clone() };
    layers.iter().map(|(name, recipe)| (name.clone(), unpruned(recipe))).collect()
}

/// Finds settings for `budget`. `plan` is that of `recipe` as it is.
///
/// # Errors
/// [`Error::Argument`] if no layer can be allocated, or even the smallest settings take too many
/// bytes; the message names the smallest size.
pub(super) fn allocate(
    measurement: Measurement<'_>,
    config: &RunConfig,
    recipe: &Recipe,
    plan: &Plan,
    budget: &BudgetSection,
) -> Result<Allocation> {
    let layers = layers_of(measurement.job.model.chain)?.into_iter();
    let shapes: BTreeMap<String, Vec<i64>> = layers.map(|layer| (layer.name, layer.shape)).collect();
    let limits = Limits { min_bits: budget.min_bits, max_sparsity: budget.max_sparsity, vectors: !budget.no_vectors };
    let mut settings = curves::settings(&recipe.layers, &shapes, &limits);
    if settings.is_empty() {
        return Err(Error::Argument("a budget needs layers that are palettized by the joint solver; there are none".into()));
    }
    measurement.job.calibration.check()?;
    let sensitivities = sensitivity::measure(&measurement, budget.probes)?;
    settings.retain(|name, _| sensitivities.by_layer.contains_key(name));
    let curves = curves::measure(measurement, &settings)?;

    // Rounded, so that summation-order noise cannot change the choice.
    let rounded = |value: f64| format!("{value:.3e}").parse::<f64>().expect("a printed number is a number");
    let mut names = Vec::new();
    let mut choices = Vec::new();
    for (name, measured) in &curves {
        let sensitivity = sensitivities.by_layer.get(name).expect("settings are those of layers with a sensitivity");
        let weight = rounded(sensitivity / sensitivities.energy.max(f64::MIN_POSITIVE));
        let choice = |measured: &curves::Measured| Choice { bytes: measured.bytes, cost: weight * rounded(measured.error) };
        names.push(name);
        choices.push(measured.iter().map(choice).collect::<Vec<_>>());
    }
    // The bytes of the allocated layers in the recipe as it is; the bytes of everything else are
    // fixed.
    let allocated_bytes: u64 = names.iter().map(|name| stored_bytes(&shapes[*name], &recipe.layers[*name])).sum();
    let fixed = plan.payload_bytes - allocated_bytes;
    let total = match budget.target {
        BudgetTarget::Size(bytes) => bytes,
        BudgetTarget::Bits(bits) => {
            fixed + (bits / 8.0 * plan.compressed_elements as f64) as u64 - (plan.compressed_bytes - allocated_bytes)
        }
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

/// Puts a rule for each layer before the rules of the config.
fn write_rules(config: &mut RunConfig, rules: &[(String, &LayerRecipe)]) -> Result<()> {
    let (mut prune, mut palettize) = (Vec::new(), Vec::new());
    for (name, recipe) in rules {
        let pattern = config::Written::own(&regex::escape(name))?;
        prune.push((pattern.clone(), recipe.prune));
        palettize.push((pattern, recipe.palettize));
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
