//! The error of each layer with each of its settings.

use std::collections::BTreeMap;

use sdxl_model::unet::PartName;
use sdxl_model::{Layer, LayerInput};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_codebook::{BitWidth, Effort, Grouping, PaletteOptions, PruneOptions, Sparsity};
use squeeze_solver::{Hessian, JointFactors, JointOptions, LayerEvidence, Order, joint};
use tch::Tensor;

use super::super::gather::Gatherer;
use super::super::walk::{Visitor, Walk, execute};
use super::super::workspace::Workspace;
use super::measurement::{Limits, Measurement};
use super::prices::Settings;
use crate::plan::Stop;
use crate::recipe::{LayerRecipe, LayerRecipes, stored_bytes};

/// A setting of a layer with its size and error.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    pub recipe: LayerRecipe,
    pub bytes: u64,
    /// The squared error of the layer's output for one call.
    pub error: f64,
}

/// The number of rows of a weight that settings are tried on; the other rows are assumed to be
/// alike.
const ROWS: i64 = 128;

/// Tries all `settings` of every layer on the Hessians of the dense network.
pub(super) fn measure(measurement: Measurement<'_>, settings: &Settings) -> Result<BTreeMap<String, Vec<Measured>>> {
    let Measurement { job, captions, folder, progress } = measurement;
    let batch = job.calibration.samples.shape().map_or(1, |calls| calls.batch) as f64;
    let mut walk = Walk::new(&job, captions, folder, progress)?;
    let mut trials = Trials { settings, batch, progress, curves: BTreeMap::new() };
    let task = Task::begin(progress, "error curves", "parts", job.model.chain.stages().len() + 2);
    execute(&job.plan.schedule, &mut walk, &mut trials, &task)?;
    Ok(trials.curves)
}

/// The visitor that tries settings and stores nothing, so that the network stays dense.
struct Trials<'a> {
    settings: &'a Settings,
    /// The batch size of a call.
    batch: f64,
    progress: &'a dyn Progress,
    curves: BTreeMap<String, Vec<Measured>>,
}

impl Visitor for Trials<'_> {
    fn open_inputs(&self, stop: &Stop, walk: &Walk<'_>) -> Vec<LayerInput> {
        let layers = walk.layers_of(stop);
        let is_open =
            |input: &&LayerInput| layers.iter().any(|layer| layer.input() == *input && self.settings.contains_key(layer.name()));
        stop.gather.inputs().iter().filter(is_open).cloned().collect()
    }

    fn solve(&mut self, stop: &Stop, mut gathered: Option<Gatherer>, walk: &Walk<'_>) -> Result<()> {
        for input in self.open_inputs(stop, walk) {
            match &mut gathered {
                Some(gatherer) => {
                    let hessian = gatherer.take(&input)?.expect("the gatherer was asked for the open inputs");
                    self.try_input(stop, &input, &hessian, walk)?;
                }
                None => {
                    let hessian = walk.shared().hessian(&input).expect("text and time are summed before the first stage");
                    self.try_input(stop, &input, hessian, walk)?;
                }
            }
        }
        Ok(())
    }

    fn store(&self) -> Option<&Workspace> {
        None
    }
}

impl Trials<'_> {
    fn try_input(&mut self, stop: &Stop, input: &LayerInput, hessian: &Hessian, walk: &Walk<'_>) -> Result<()> {
        let layers = walk.layers_of(stop);
        let layers: Vec<&Layer> =
            layers.into_iter().filter(|layer| layer.input() == input && self.settings.contains_key(layer.name())).collect();
        let task = Task::begin(self.progress, "settings tried", "layers", layers.len());
        // The Hessian is 2/n sum x x^T, and n counts the items of a batch. An input of two
        // dimensions is one item of several vectors, of which a call has one for each row.
        let items = hessian.samples() as f64;
        let is_flat = *input == LayerInput::Time
            || (stop.part == PartName::InputBlock && layers.iter().all(|layer| layer.weight().dim() == 2));
        let to_error = 0.5 * self.batch * if is_flat { items / hessian.vectors().max(1) as f64 } else { 1.0 };
        for order in [Order::Natural, Order::Activation] {
            let mut factors: Option<JointFactors> = None;
            for layer in &layers {
                task.go_on()?;
                if order == Order::Natural {
                    task.advance(layer.name());
                }
                let recipes = self.settings[layer.name()].iter().map(|recipe| (recipe, trial_options(recipe)));
                for (recipe, options) in recipes.filter(|(_, options)| options.order() == order) {
                    let bytes = stored_bytes(&layer.weight().size(), recipe);
                    let curve = self.curves.entry(layer.name().to_owned()).or_default();
                    if recipe.is_dense() {
                        curve.push(Measured { recipe: recipe.clone(), bytes, error: 0.0 });
                        continue;
                    }
                    let failed = Error::layer(layer.name());
                    let factors = match factors.take().filter(|factors| factors.fit(options.dampening(), order)) {
                        Some(fitting) => factors.insert(fitting),
                        None => factors.insert(JointFactors::new(hessian, options.dampening(), order).map_err(failed)?),
                    };
                    let (rows, share) = some_rows(&walk.dense_weight_on(layer, hessian.device())?, recipe, hessian.groups())?;
                    let solved = joint(layer.name(), &rows, hessian, factors, &LayerEvidence::default(), &options);
                    let solved = solved.map_err(Error::layer(layer.name()))?;
                    curve.push(Measured { recipe: recipe.clone(), bytes, error: to_error * solved.loss / share });
                }
            }
        }
        Ok(())
    }
}

/// The options of a setting with less effort: the errors need not be exact, only comparable.
fn trial_options(recipe: &LayerRecipe) -> JointOptions {
    let options = recipe.joint_options().expect("settings are those of layers that use the joint solver");
    let Effort { refit_steps, turns, .. } = options.effort;
    let effort = Effort { refit_steps: refit_steps.min(4), exchange_turns: 0, turns: turns.min(1), ..options.effort };
    JointOptions { effort, trial: true, ..options }
}

/// Whole groups of rows from all over a weight, and their share of it.
fn some_rows(weight: &Tensor, recipe: &LayerRecipe, groups: i64) -> Result<(Tensor, f64)> {
    let rows = weight.size()[0];
    let unit = match recipe.palettize.map(|palettize| (palettize.grouping, palettize.axis)) {
        Some((Grouping::PerGroupedChannel { group_size }, 0)) => group_size as i64,
        Some((Grouping::PerTensor, _)) | None => 16,
        Some((Grouping::PerGroupedChannel { .. }, _)) => rows,
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

/// The settings that each layer may get within `limits`: its own, fp16, and, if it gets palettes,
/// variants of it with more or fewer bits, in vectors or not, pruned or not.
pub(super) fn settings(recipes: &LayerRecipes, shapes: &BTreeMap<String, Vec<i64>>, limits: &Limits) -> Settings {
    const SPARSE: [(f64, BitWidth); 6] = [
        (0.4, BitWidth::Four),
        (0.5, BitWidth::Four),
        (0.6, BitWidth::Four),
        (0.4, BitWidth::Three),
        (0.5, BitWidth::Three),
        (0.5, BitWidth::Two),
    ];
    /// Vectors with the width of their indices: 1.5 to 4 bits a weight.
    const VECTORS: [(usize, BitWidth); 6] = [
        (2, BitWidth::Three),
        (2, BitWidth::Four),
        (2, BitWidth::Six),
        (2, BitWidth::Eight),
        (4, BitWidth::Six),
        (4, BitWidth::Eight),
    ];
    /// Output channels that share a palette of vectors, besides all of them: palettes of vectors
    /// have so many values that fewer channels are not worth one.
    const WIDE: usize = 64;
    const FINE: usize = 4;
    let mut settings = BTreeMap::new();
    for (name, base) in recipes {
        let (Some(shape), Some(_)) = (shapes.get(name), base.joint) else { continue };
        let columns: i64 = shape.iter().skip(1).product();
        let share = base.prune.map_or(0.0, |options| options.sparsity.share(columns.unsigned_abs() as usize));
        let Some(palettize) = base.palettize else {
            // A layer that is too small for palettes is pruned or left as it is.
            if base.prune.is_some() {
                let pruned = (share <= limits.max_sparsity).then(|| base.clone());
                let dense = LayerRecipe { prune: None, ..base.clone() };
                settings.insert(name.clone(), pruned.into_iter().chain([dense]).collect());
            }
            continue;
        };
        let with = |bits: BitWidth, group: Option<usize>, share: Option<f64>| {
            let finer = |group: &usize| palettize.axis == 0 && palettize.grouping.group_size().is_some_and(|size| *group < size);
            let grouping = match group.filter(finer) {
                Some(group_size) => Grouping::PerGroupedChannel { group_size },
                None => palettize.grouping,
            };
            let prune = share.and_then(|share| {
                let prune = base.prune?;
                Some(PruneOptions { sparsity: Sparsity::Unstructured(share), ..prune })
            });
            LayerRecipe { prune, palettize: Some(PaletteOptions { bits, grouping, ..palettize }), ..base.clone() }
        };
        let allowed = share <= limits.max_sparsity && palettize.bits >= limits.min_bits;
        let mut all: Vec<LayerRecipe> = allowed.then(|| base.clone()).into_iter().collect();
        let mut add = |recipe: LayerRecipe| {
            if !all.contains(&recipe) {
                all.push(recipe);
            }
        };
        // Two entries are too few for any layer.
        for bits in BitWidth::ALL.into_iter().filter(|bits| *bits > BitWidth::One && *bits >= limits.min_bits) {
            add(with(bits, None, None));
            if bits <= BitWidth::Four && shape.first().is_some_and(|rows| (*rows as usize).is_multiple_of(FINE)) {
                add(with(bits, Some(FINE), None));
            }
        }
        let least_bits = f64::from(limits.min_bits.bits());
        for (length, bits) in VECTORS.into_iter().filter(|(length, bits)| f64::from(bits.bits()) / *length as f64 >= least_bits) {
            let rows = shape.first().map_or(0, |rows| *rows as usize);
            let is_plain = palettize.axis == 0 && !palettize.per_channel_scale;
            if !(limits.vectors && is_plain && rows.is_multiple_of(length)) {
                continue;
            }
            let vectors = PaletteOptions { bits, vector_length: length, grouping: Grouping::PerTensor, ..palettize };
            // No layer is the better for a palette of more than a quarter of its indices' bytes.
            let indices = rows * columns.unsigned_abs() as usize / length * usize::from(bits.bits()) / 8;
            if 8 * bits.entries() * length > indices {
                continue;
            }
            add(LayerRecipe { prune: None, palettize: Some(vectors), ..base.clone() });
            if rows > WIDE && rows.is_multiple_of(WIDE) {
                let grouping = Grouping::PerGroupedChannel { group_size: WIDE };
                add(LayerRecipe { prune: None, palettize: Some(PaletteOptions { grouping, ..vectors }), ..base.clone() });
            }
        }
        add(LayerRecipe { prune: None, palettize: None, ..base.clone() });
        match base.prune.map(|prune| prune.sparsity) {
            Some(Sparsity::Unstructured(_)) => {
                for (share, bits) in SPARSE {
                    if share <= limits.max_sparsity && bits >= limits.min_bits {
                        add(with(bits, None, Some(share)));
                    }
                }
            }
            // Whoever asks for n:m needs it where weights are pruned at all.
            Some(Sparsity::NOfM(_)) if share <= limits.max_sparsity => {
                for bits in [BitWidth::Two, BitWidth::Three, BitWidth::Four, BitWidth::Six] {
                    if bits >= limits.min_bits {
                        add(LayerRecipe { prune: base.prune, ..with(bits, None, None) });
                    }
                }
            }
            Some(Sparsity::NOfM(_)) | None => {}
        }
        settings.insert(name.clone(), all);
    }
    settings
}

#[cfg(test)]
mod tests {
    use squeeze_codebook::{NmRatio, PruneMethod};

    use super::*;

    #[test]
    fn layers_without_palettes_are_pruned_or_left_as_they_are() {
        let shapes = BTreeMap::from([("a".to_owned(), vec![32, 64, 1, 1]), ("b".to_owned(), vec![32, 64, 1, 1])]);
        let prune = Some(PruneOptions { sparsity: Sparsity::Unstructured(0.4), ..PruneOptions::default() });
        let pruned = LayerRecipe { prune, method: PruneMethod::SparseGpt, palettize: None, joint: Some(Effort::default()) };
        let dense = LayerRecipe { prune: None, ..pruned.clone() };
        let recipes = LayerRecipes::from([("a".to_owned(), pruned.clone()), ("b".to_owned(), dense.clone())]);
        let of = |max_sparsity| {
            let limits = Limits { min_bits: BitWidth::Two, max_sparsity, vectors: true };
            settings(&recipes, &shapes, &limits)
        };
        assert_eq!(of(0.6), Settings::from([("a".to_owned(), vec![pruned, dense.clone()])]));
        assert_eq!(of(0.3), Settings::from([("a".to_owned(), vec![dense])]));
    }

    #[test]
    fn layers_are_pruned_in_the_pattern_that_was_asked_for_or_not_at_all() {
        let limits = |max_sparsity| Limits { min_bits: BitWidth::Three, max_sparsity, vectors: true };
        let shapes = BTreeMap::from([("a".to_owned(), vec![64, 64])]);
        let of = |sparsity, max_sparsity| {
            let prune = Some(PruneOptions { sparsity, ..PruneOptions::default() });
            let palettize = Some(PaletteOptions { bits: BitWidth::Four, ..PaletteOptions::default() });
            let base = LayerRecipe { prune, method: PruneMethod::SparseGpt, palettize, joint: Some(Effort::default()) };
            settings(&LayerRecipes::from([("a".to_owned(), base)]), &shapes, &limits(max_sparsity)).remove("a").unwrap()
        };
        let pruned = |all: &[LayerRecipe]| -> Vec<(Sparsity, BitWidth)> {
            all.iter().filter_map(|recipe| Some((recipe.prune?.sparsity, recipe.palettize?.bits))).collect()
        };
        let pattern = Sparsity::NOfM(NmRatio { n: 2, m: 4 });
        let all = of(pattern, 0.6);
        assert_eq!(pruned(&all), [BitWidth::Four, BitWidth::Three, BitWidth::Six].map(|bits| (pattern, bits)));
        assert!(all.iter().any(|recipe| recipe.prune.is_none()));
        assert_eq!(pruned(&of(pattern, 0.4)), []);
        let shares = pruned(&of(Sparsity::Unstructured(0.4), 0.5));
        assert!(
            shares.len() == 4
                && shares.iter().all(|(sparsity, _)| matches!(sparsity, Sparsity::Unstructured(share) if *share <= 0.5)),
            "{shares:?}"
        );
    }
}
