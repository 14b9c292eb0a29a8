//! Settings for each layer that together take a given number of bytes at the least error.
//!
//! Each layer is tried with several settings on the Hessians of the dense network. Backpropagation
//! measures the effect of an error in its output on the output of the UNet. Bytes go where they
//! reduce the error most ([`choose`]). The result is a config with a rule for each layer.

mod choose;
mod curves;
mod forecast;
mod measurement;
mod prices;
mod room;
mod sensitivity;

pub use choose::{Choice, choose};
pub use forecast::{Expected, Forecast};
use measurement::Limits;
pub(super) use measurement::Measurement;
use prices::Priced;
pub(super) use prices::{PriceFile, Prices, Settings, Shapes};
use room::Room;
use sdxl_model::unet::UnetChain;
use squeeze_base::error::{Error, Result};

use crate::config::{self, BudgetSection, RunConfig};
use crate::plan::Plan;
use crate::recipe::{LayerRecipe, LayerRecipes, Recipe, layers_of, stored_bytes};

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
    let unpruned = |recipe: &LayerRecipe| match recipe.palettize {
        Some(_) => LayerRecipe { prune: None, ..recipe.clone() },
        None => recipe.clone(),
    };
    layers.iter().map(|(name, recipe)| (name.clone(), unpruned(recipe))).collect()
}

/// The settings that layers of `recipe` may get within `budget`.
///
/// # Errors
/// [`Error::Argument`] if no layer can be allocated.
pub(super) fn settings(recipe: &Recipe, shapes: &Shapes, budget: &BudgetSection) -> Result<Settings> {
    let limits = Limits { min_bits: budget.min_bits, max_sparsity: budget.max_sparsity, vectors: !budget.no_vectors };
    let settings = curves::settings(&recipe.layers, shapes, &limits);
    if settings.is_empty() {
        return Err(Error::Argument("a budget needs layers that are compressed by the joint solver; there are none".into()));
    }
    Ok(settings)
}

/// The shape of every weight of `chain`.
///
/// # Errors
/// If the network cannot be built.
pub(super) fn shapes(chain: &UnetChain) -> Result<Shapes> {
    Ok(layers_of(chain)?.into_iter().map(|layer| (layer.name, layer.shape)).collect())
}

/// Checks that the smallest settings of the layers of `recipe` have room within `budget`, which
/// needs no measurement. `plan` is that of `recipe` as it is.
///
/// # Errors
/// [`Error::Argument`] if they have not, or if no layer can be allocated.
pub(super) fn check(chain: &UnetChain, recipe: &Recipe, plan: &Plan, budget: &BudgetSection) -> Result<()> {
    let shapes = shapes(chain)?;
    let settings = settings(recipe, &shapes, budget)?;
    if budget.target.is_closeness() {
        return Ok(());
    }
    // A layer that turns out to have no effect on the output keeps its setting of the recipe.
    let least = |(name, settings): (&String, &Vec<LayerRecipe>)| {
        let own = std::iter::once(&recipe.layers[name]);
        settings.iter().chain(own).map(|setting| stored_bytes(&shapes[name], setting)).min()
    };
    let room = Room::beside(settings.keys(), &shapes, recipe, plan);
    room.bytes_of_layers(budget.target, settings.iter().filter_map(least).sum()).map(drop)
}

/// Measures the cost of each of `settings`, with `probes` samples for the sensitivities.
///
/// # Errors
/// [`Error::Argument`] if there are no samples; if the network cannot be run.
pub(super) fn measure(measurement: Measurement<'_>, mut settings: Settings, probes: usize) -> Result<Prices> {
    measurement.job.calibration.check()?;
    let sensitivities = sensitivity::measure(&measurement, probes)?;
    settings.retain(|name, _| sensitivities.by_layer.contains_key(name));
    let curves = curves::measure(measurement, &settings)?;

    // Rounded, so that summation-order noise cannot change the choice.
    let rounded = |value: f64| format!("{value:.3e}").parse::<f64>().expect("a printed number is a number");
    let priced = |(name, measured): (String, Vec<curves::Measured>)| {
        let sensitivity = sensitivities.by_layer.get(&name).expect("settings are those of layers with a sensitivity");
        let weight = rounded(sensitivity / sensitivities.energy.max(f64::MIN_POSITIVE));
        let price = |curves::Measured { recipe, bytes, error }: curves::Measured| {
            let choice = Choice { bytes, cost: weight * rounded(error) };
            Priced { recipe, choice }
        };
        (name, measured.into_iter().map(price).collect())
    };
    Ok(curves.into_iter().map(priced).collect())
}

/// Finds settings for `budget` at these `prices`. `plan` is that of `recipe` as it is.
///
/// # Errors
/// [`Error::Argument`] if even the smallest settings take too many bytes; the message names the
/// smallest size.
pub(super) fn allocate(
    prices: &Prices,
    shapes: &Shapes,
    config: &RunConfig,
    recipe: &Recipe,
    plan: &Plan,
    budget: &BudgetSection,
) -> Result<Allocation> {
    let choices: Vec<Vec<Choice>> = prices.values().map(|priced| priced.iter().map(|priced| priced.choice).collect()).collect();
    let room = Room::beside(prices.keys(), shapes, recipe, plan);
    let least = choices.iter().filter_map(|choices| choices.iter().map(|choice| choice.bytes).min()).sum();
    let most = room.bytes_of_layers(budget.target, least)?;
    let chosen = choose(&choices, most).ok_or_else(|| Error::internal("the smallest settings do not fit, though they do"))?;
    let mut allocated = config.clone();
    allocated.budget = None;
    let mut bytes = room.fixed_bytes;
    let mut rules = Vec::new();
    for ((name, priced), index) in prices.iter().zip(&chosen) {
        bytes += priced[*index].choice.bytes;
        rules.push((name.clone(), &priced[*index].recipe));
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
