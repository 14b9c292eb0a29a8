//! Compresses one layer whose weight is on a GPU: only packing is left to the host.

use squeeze_base::error::Result;
use squeeze_codebook::PruneMethod;
use squeeze_container::CompressedWeight;
use squeeze_numerics::sum::squares;
use squeeze_solver::palette::{Palettized, decode_on_device, palettize_on_device, palettizes_on_device};
use squeeze_solver::{DeviceJoint, Hessian, Pruned, joint_on_device, output_energies};
use tch::{Device, Kind, Tensor};

use super::device_pack;
use super::layer::{CompressedLayer, Evidence, JointProblem, LayerErrors, prune_by_evidence};
use crate::recipe::LayerRecipe;

/// A solved weight on its device.
struct Solved {
    stored: Option<CompressedWeight>,
    /// The values as stored, of the weight's shape, fp32.
    values: Tensor,
    /// The regression target, if it differs from the original weight.
    target: Option<Tensor>,
    /// The loss of the pruned weight.
    loss: Option<f64>,
    notes: Vec<String>,
}

/// Compresses a weight [o, ...] by `recipe`, as
/// [`compress_layer`](super::one_layer::compress_layer) does. `None` where the host has to: for
/// weights on the CPU, pruning by magnitude, and palettes that no GPU makes.
///
/// # Errors
/// As [`compress_layer`](super::one_layer::compress_layer), without the layer's name.
pub(super) fn compress_on_device(
    name: &str,
    weight: &Tensor,
    recipe: &LayerRecipe,
    evidence: Option<Evidence<'_>>,
) -> Result<Option<CompressedLayer>> {
    let by_magnitude = recipe.prune.is_some() && recipe.method == PruneMethod::Magnitude;
    let palettes = recipe.palettize.as_ref();
    if weight.device() == Device::Cpu || by_magnitude || palettes.is_some_and(|options| !palettizes_on_device(weight, options)) {
        return Ok(None);
    }
    let original = weight.f_to_kind(Kind::Float)?;
    let solved = match recipe.joint {
        Some(_) => jointly(name, weight, recipe, evidence)?,
        None => sequentially(name, &original, recipe, evidence)?,
    };
    let Solved { stored, values, target, loss, notes } = solved;
    let scale = squares(&original)?;
    let distance = squares(&original.f_sub(&values)?)? / if scale > 0.0 { scale } else { 1.0 };
    let mut errors = LayerErrors { weight: distance, ..LayerErrors::default() };
    if let Some(Evidence { hessian, .. }) = evidence {
        let lost = target.as_ref().unwrap_or(&original).f_to_device(values.device())?.f_sub(&values)?;
        errors.add_outputs(&original, &lost, loss, hessian)?;
    }
    Ok(Some(CompressedLayer { stored, errors, notes }))
}

impl LayerErrors {
    /// Sets the errors of the outputs, given what is lost of the weight, and the loss of the pruned
    /// weight.
    pub(super) fn add_outputs(&mut self, original: &Tensor, lost: &Tensor, pruned: Option<f64>, hessian: &Hessian) -> Result<()> {
        let [energy, lost] = output_energies([original, lost], hessian)?;
        let share = |lost: f64| if lost > 0.0 { lost / energy } else { 0.0 };
        self.pruned_output = pruned.map(share);
        self.output = Some(share(lost));
        Ok(())
    }
}

/// Finds mask, weights and palettes together.
fn jointly(name: &str, weight: &Tensor, recipe: &LayerRecipe, evidence: Option<Evidence<'_>>) -> Result<Solved> {
    let size = weight.size();
    let shaped = |values: &Tensor| -> Result<Tensor> { Ok(values.f_to_kind(Kind::Float)?.f_view(size.as_slice())?) };
    let problem = JointProblem::new(recipe, evidence)?;
    let Some(solved) = problem.solve_with(name, weight, joint_on_device)? else {
        let mut solution = problem.solution(name, weight)?;
        let values = shaped(&Tensor::f_from_slice(&solution.values)?.f_to_device(weight.device())?)?;
        let stored = solution.pack(&size)?;
        return Ok(Solved { stored, values, target: solution.target, loss: solution.loss, notes: solution.notes });
    };
    let DeviceJoint { weight: values, mask, palettized, pruned_loss: loss, target, notes, .. } = solved;
    let stored = match (palettized, &mask) {
        (Some((Palettized { codebook, .. }, indices)), mask) => {
            Some(device_pack::palettized(size.clone(), mask.as_ref(), codebook, &indices)?)
        }
        (None, Some(mask)) => Some(device_pack::sparse(size.clone(), mask, &values)?),
        (None, None) => None,
    };
    Ok(Solved { stored, values: shaped(&values)?, target, loss, notes: notes.iter().map(ToString::to_string).collect() })
}

/// Prunes, then palettizes the kept weights.
fn sequentially(name: &str, original: &Tensor, recipe: &LayerRecipe, evidence: Option<Evidence<'_>>) -> Result<Solved> {
    let new;
    let pruned: Option<&Pruned> = match &recipe.prune {
        None => None,
        Some(options) => match evidence.and_then(|evidence| evidence.pruned) {
            Some(pruned) => Some(pruned),
            None => {
                new = prune_by_evidence(original, options, evidence)?;
                Some(&new)
            }
        },
    };
    let size = original.size();
    let rows = [size[0], -1];
    let half = pruned.map_or(original, |pruned| &pruned.weight).f_to_kind(Kind::Half)?.f_reshape(rows)?;
    let keep = pruned.map(|pruned| pruned.mask.f_reshape(rows)).transpose()?;
    let (stored, values) = match &recipe.palettize {
        Some(options) => {
            let made = palettize_on_device(name, &half, keep.as_ref(), None, options)?;
            let (Palettized { codebook, .. }, indices) = made.expect("it was asked whether a GPU makes these palettes");
            let values = decode_on_device(&codebook, &indices, keep.as_ref())?;
            (Some(device_pack::palettized(size.clone(), keep.as_ref(), codebook, &indices)?), values)
        }
        None => {
            let stored = keep.as_ref().map(|keep| device_pack::sparse(size.clone(), keep, &half)).transpose()?;
            (stored, half.f_to_kind(Kind::Float)?)
        }
    };
    Ok(Solved {
        stored,
        values: values.f_view(size.as_slice())?,
        target: None,
        loss: pruned.map(|pruned| pruned.loss),
        notes: pruned.map_or_else(Vec::new, |pruned| pruned.notes.iter().map(ToString::to_string).collect()),
    })
}
