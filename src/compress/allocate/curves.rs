//! What each layer would lose with each of its settings.

use std::collections::BTreeMap;

use tch::Tensor;

use super::super::lane::{self, Lane, Pass, Way};
use super::super::{Gatherer, Job, LayerRecipe, LayerRecipes};
use crate::calibration::Samples;
use crate::error::{Error, Result};
use crate::model::{Layer, LayerInput};
use crate::plan::stored_bytes;
use crate::progress::{Progress, Task};
use crate::solver::palette::{Granularity, PaletteOptions};
use crate::solver::{Beside, Effort, Hessian, JointFactors, JointOptions, Order, joint};

/// A setting of a layer, and what it comes to.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    pub recipe: LayerRecipe,
    pub bytes: u64,
    /// The squared error of the layer's output for one call.
    pub error: f64,
}

/// Rows that a setting is tried on; the others are taken to be like them.
const ROWS: i64 = 128;

impl Job<'_> {
    /// Tries every one of `settings` on its layer, on Hessians of the dense network.
    pub(super) fn curves(
        &self,
        settings: &BTreeMap<String, Vec<LayerRecipe>>,
        samples: &Samples,
        captions: Gatherer,
        folder: &std::path::Path,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<String, Vec<Measured>>> {
        let mut curves = BTreeMap::new();
        let task = Task::begin(progress, "error curves", "stages", self.chain.stages().len());
        let mut lanes = self.lanes(folder)?;
        let blueprint = crate::checkpoint::Blueprint::default();
        let outlines = self.chain.stages().iter().map(|spec| spec.load(&blueprint)).collect::<Result<Vec<_>>>()?;
        let layers = outlines.iter().flat_map(|stage| stage.layers()).filter(|layer| settings.contains_key(layer.name()));
        let mut shared = self.first_carries(&mut lanes, samples, layers, None, progress)?;
        shared.merge(captions)?;
        let batch = samples.shape().map_or(1, |calls| calls.batch) as f64;
        for (spec, plan) in self.chain.stages().iter().zip(&self.plan.stages) {
            let name = spec.name().to_string();
            task.go_on()?;
            task.advance(&name);
            for lane in &mut lanes {
                lane.load(spec, self.source)?;
            }
            for wave in plan.waves.iter().filter(|wave| !wave.is_empty()) {
                let pass = Pass { way: Way::Whole, inputs: wave, hold: false, last: false };
                let mut gatherer = lane::gather(&mut lanes, pass, &name, progress)?;
                for input in wave {
                    if let Some(hessian) = gatherer.take(input) {
                        try_input(&lanes[0], input, &hessian, settings, batch, &mut curves, progress)?;
                    }
                }
            }
            for input in [LayerInput::Text, LayerInput::Time] {
                if let Some(hessian) = shared.hessian(&input) {
                    try_input(&lanes[0], &input, hessian, settings, batch, &mut curves, progress)?;
                }
            }
            lane::outputs(&mut lanes, Way::Whole, &name, true, progress)?;
        }
        Ok(curves)
    }
}

fn try_input(
    lane: &Lane,
    input: &LayerInput,
    hessian: &Hessian,
    settings: &BTreeMap<String, Vec<LayerRecipe>>,
    batch: f64,
    curves: &mut BTreeMap<String, Vec<Measured>>,
    progress: &dyn Progress,
) -> Result<()> {
    let layers: Vec<&Layer> =
        lane.layers().iter().filter(|layer| layer.input() == input && settings.contains_key(layer.name())).collect();
    let task = Task::begin(progress, "settings tried", "layers", layers.len());
    // The Hessian is 2/n sum x x^T, and n counts items of a batch but where the input has two dimensions.
    let to_error = if *input == LayerInput::Time { 0.5 } else { 0.5 * batch };
    for order in [Order::Natural, Order::Activation] {
        let of_order = |recipe: &&LayerRecipe| options_of(recipe).is_some_and(|options| options.order() == order);
        let mut factors: Option<JointFactors> = None;
        for layer in &layers {
            task.go_on()?;
            if order == Order::Natural {
                task.advance(layer.name());
            }
            for recipe in settings[layer.name()].iter().filter(of_order) {
                let Some(options) = options_of(recipe) else { continue };
                let failed = Error::layer(layer.name());
                if factors.as_ref().is_none_or(|made| !made.fit(options.dampening(), order)) {
                    drop(factors.take());
                    factors = Some(JointFactors::new(hessian, options.dampening(), order).map_err(failed)?);
                }
                let Some(factors) = &factors else { continue };
                let (rows, share) = some_rows(layer.weight(), recipe, hessian.groups())?;
                let failed = Error::layer(layer.name());
                let found = joint(layer.name(), &rows, hessian, factors, &Beside::default(), &options).map_err(failed)?;
                curves.entry(layer.name().to_owned()).or_default().push(Measured {
                    recipe: recipe.clone(),
                    bytes: stored_bytes(&layer.weight().size(), recipe),
                    error: to_error * found.loss / share,
                });
            }
        }
    }
    Ok(())
}

/// The joint solver with less effort: curves need not be right, only alike.
fn options_of(recipe: &LayerRecipe) -> Option<JointOptions> {
    let options = recipe.joint_options()?;
    let Effort { refit_steps, turns, .. } = options.effort;
    let effort = Effort { refit_steps: refit_steps.min(4), exchange_turns: 0, turns: turns.min(1), ..options.effort };
    Some(JointOptions { effort, ..options })
}

/// Whole groups of a weight's rows from all over it, and what share of it they are.
fn some_rows(weight: &Tensor, recipe: &LayerRecipe, groups: i64) -> Result<(Tensor, f64)> {
    let rows = weight.size()[0];
    let unit = match recipe.palettize {
        Some(PaletteOptions { granularity: Granularity::PerGroupedChannel { group_size, axis: 0 }, .. }) => group_size as i64,
        Some(PaletteOptions { granularity: Granularity::PerTensor, .. }) | None => 16,
        Some(_) => rows,
    };
    let unit = unit.max(16);
    if groups > 1 || rows <= ROWS || rows % unit != 0 {
        return Ok((weight.shallow_clone(), 1.0));
    }
    let (all, wanted) = (rows / unit, (ROWS / unit).max(1));
    if wanted >= all {
        return Ok((weight.shallow_clone(), 1.0));
    }
    let parts: Vec<Tensor> =
        (0..wanted).map(|k| Ok(weight.f_narrow(0, k * all / wanted * unit, unit)?)).collect::<Result<_>>()?;
    Ok((Tensor::f_cat(&parts, 0)?, wanted as f64 / all as f64))
}

/// The settings that the treated layers may get: more or fewer bits, pruned or not, by what their own say and the limits allow.
pub(super) fn settings(
    recipes: &LayerRecipes,
    shapes: &BTreeMap<String, Vec<i64>>,
    limits: &super::Limits,
) -> BTreeMap<String, Vec<LayerRecipe>> {
    const BITS: [u8; 5] = [2, 3, 4, 6, 8];
    const SPARSE: [(f64, u8); 6] = [(0.4, 4), (0.5, 4), (0.6, 4), (0.4, 3), (0.5, 3), (0.5, 2)];
    const FINE: usize = 4;
    let mut found = BTreeMap::new();
    for (name, base) in recipes {
        let (Some(palettize), Some(shape), Some(_)) = (base.palettize, shapes.get(name), base.joint) else { continue };
        let with = |bits: u8, group: Option<usize>, share: Option<f64>| {
            let granularity = match (palettize.granularity, group) {
                (Granularity::PerGroupedChannel { axis: 0, group_size }, Some(group)) if group < group_size => {
                    Granularity::PerGroupedChannel { axis: 0, group_size: group }
                }
                (granularity, _) => granularity,
            };
            let prune = share.and_then(|share| {
                let prune = base.prune?;
                Some(crate::solver::PruneOptions { sparsity: crate::solver::Sparsity::Unstructured(share), ..prune })
            });
            LayerRecipe { prune, palettize: Some(PaletteOptions { bits, granularity, ..palettize }), ..base.clone() }
        };
        let columns: i64 = shape.iter().skip(1).product();
        let share = base.prune.map_or(0.0, |options| options.sparsity.share(columns.unsigned_abs() as usize));
        let allowed = share <= limits.max_sparsity && palettize.bits >= limits.min_bits;
        let mut all: Vec<LayerRecipe> = allowed.then(|| base.clone()).into_iter().collect();
        let mut add = |recipe: LayerRecipe| {
            if !all.contains(&recipe) {
                all.push(recipe);
            }
        };
        for bits in BITS.into_iter().filter(|bits| *bits >= limits.min_bits) {
            add(with(bits, None, None));
            if bits <= 4 && shape.first().is_some_and(|rows| (*rows as usize).is_multiple_of(FINE)) {
                add(with(bits, Some(FINE), None));
            }
        }
        if base.prune.is_some() {
            for (share, bits) in SPARSE {
                if share <= limits.max_sparsity && bits >= limits.min_bits {
                    add(with(bits, None, Some(share)));
                }
            }
        }
        found.insert(name.clone(), all);
    }
    found
}
