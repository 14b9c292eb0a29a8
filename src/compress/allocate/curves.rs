//! What each layer would lose with each of its settings.

use std::collections::BTreeMap;

use tch::Tensor;

use super::super::lane::{self, Lane, Pass, Way};
use super::super::{Gatherer, Job, Treatment, Treatments};
use crate::calibration::Samples;
use crate::codebook::{BitWidth, Effort, Grouping, PaletteOptions, PruneOptions, Sparsity};
use crate::error::{Error, Result};
use crate::model::{Layer, LayerInput};
use crate::plan::stored_bytes;
use crate::progress::{Progress, Task};
use crate::solver::{Hessian, JointFactors, JointOptions, LayerEvidence, Order, joint};

/// A setting of a layer, and what it comes to.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    pub treatment: Treatment,
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
        settings: &BTreeMap<String, Vec<Treatment>>,
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
    settings: &BTreeMap<String, Vec<Treatment>>,
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
        let of_order = |treatment: &&Treatment| options_of(treatment).is_some_and(|options| options.order() == order);
        let mut factors: Option<JointFactors> = None;
        for layer in &layers {
            task.go_on()?;
            if order == Order::Natural {
                task.advance(layer.name());
            }
            for treatment in settings[layer.name()].iter().filter(of_order) {
                let Some(options) = options_of(treatment) else { continue };
                let failed = Error::layer(layer.name());
                if factors.as_ref().is_none_or(|made| !made.fit(options.dampening(), order)) {
                    drop(factors.take());
                    factors = Some(JointFactors::new(hessian, options.dampening(), order).map_err(failed)?);
                }
                let Some(factors) = &factors else { continue };
                let (rows, share) = some_rows(layer.weight(), treatment, hessian.groups())?;
                let failed = Error::layer(layer.name());
                let found = joint(layer.name(), &rows, hessian, factors, &LayerEvidence::default(), &options).map_err(failed)?;
                curves.entry(layer.name().to_owned()).or_default().push(Measured {
                    treatment: treatment.clone(),
                    bytes: stored_bytes(&layer.weight().size(), treatment),
                    error: to_error * found.loss / share,
                });
            }
        }
    }
    Ok(())
}

/// The joint solver with less effort: curves need not be right, only alike.
fn options_of(treatment: &Treatment) -> Option<JointOptions> {
    let options = treatment.joint_options()?;
    let Effort { refit_steps, turns, .. } = options.effort;
    let effort = Effort { refit_steps: refit_steps.min(4), exchange_turns: 0, turns: turns.min(1), ..options.effort };
    Some(JointOptions { effort, ..options })
}

/// Whole groups of a weight's rows from all over it, and what share of it they are.
fn some_rows(weight: &Tensor, treatment: &Treatment, groups: i64) -> Result<(Tensor, f64)> {
    let rows = weight.size()[0];
    let unit = match treatment.palettize.map(|palettize| (palettize.grouping, palettize.axis)) {
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

/// The settings that the treated layers may get: more or fewer bits, pruned or not, by what their own say and the limits allow.
pub(super) fn settings(
    treatments: &Treatments,
    shapes: &BTreeMap<String, Vec<i64>>,
    limits: &super::Limits,
) -> BTreeMap<String, Vec<Treatment>> {
    const SPARSE: [(f64, BitWidth); 6] = [
        (0.4, BitWidth::Four),
        (0.5, BitWidth::Four),
        (0.6, BitWidth::Four),
        (0.4, BitWidth::Three),
        (0.5, BitWidth::Three),
        (0.5, BitWidth::Two),
    ];
    const FINE: usize = 4;
    let mut found = BTreeMap::new();
    for (name, base) in treatments {
        let (Some(palettize), Some(shape), Some(_)) = (base.palettize, shapes.get(name), base.joint) else { continue };
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
            Treatment { prune, palettize: Some(PaletteOptions { bits, grouping, ..palettize }), ..base.clone() }
        };
        let columns: i64 = shape.iter().skip(1).product();
        let share = base.prune.map_or(0.0, |options| options.sparsity.share(columns.unsigned_abs() as usize));
        let allowed = share <= limits.max_sparsity && palettize.bits >= limits.min_bits;
        let mut all: Vec<Treatment> = allowed.then(|| base.clone()).into_iter().collect();
        let mut add = |treatment: Treatment| {
            if !all.contains(&treatment) {
                all.push(treatment);
            }
        };
        // Two entries are too few for any layer.
        for bits in BitWidth::ALL.into_iter().filter(|bits| *bits > BitWidth::One && *bits >= limits.min_bits) {
            add(with(bits, None, None));
            if bits <= BitWidth::Four && shape.first().is_some_and(|rows| (*rows as usize).is_multiple_of(FINE)) {
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
