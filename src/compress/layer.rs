//! Compresses one layer: prune, round to fp16, palettize, pack.

use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::container::CompressedWeight;
use crate::error::{Error, Result};
use crate::recipe::{LayerRecipe, PruneMethod};
use crate::solver::palette::{Outcome, Palettized, palettize};
use crate::solver::{
    Beside, Correction, Factor, Hessian, Joint, JointFactors, Pruned, joint, magnitude_prune, output_energies, prune, prune_with,
};

/// A layer's new weight, and what it cost.
#[derive(Debug)]
pub struct Treated {
    /// What is stored; nothing if it stays an fp16 tensor.
    pub stored: Option<CompressedWeight>,
    /// What it decodes to, in fp16, in the weight's own shape.
    pub decoded: Tensor,
    /// Errors before and after.
    pub errors: LayerErrors,
    /// What has to be said about it.
    pub notes: Vec<String>,
}

/// How far a layer is from its original.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerErrors {
    /// ‖W - W'‖² / ‖W‖² of the weights as stored.
    pub weight: f64,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs, as pruned only.
    pub pruned_output: Option<f64>,
    /// The same, as stored.
    pub output: Option<f64>,
}

/// ‖a - b‖² / ‖a‖² summed in fp64; ‖b‖² where a is zero. The same on any number of threads.
fn relative_distance(original: &[f32], new: &[f16]) -> f64 {
    const PIECE: usize = 1 << 13;
    let pieces = original.par_chunks(PIECE).zip(new.par_chunks(PIECE)).map(|(original, new)| {
        original.iter().zip(new).fold((0.0, 0.0), |(distance, scale), (original, new)| {
            let (original, new) = (f64::from(*original), new.to_f64());
            (distance + (original - new).powi(2), scale + original.powi(2))
        })
    });
    let sums: Vec<(f64, f64)> = pieces.collect();
    let (distance, scale) = sums.iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1));
    distance / if scale > 0.0 { scale } else { 1.0 }
}

/// What calibration knows of a layer's inputs.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Their Hessian.
    pub hessian: &'a Hessian,
    /// The weight pruned, if that was done in a batch with other layers.
    pub pruned: Option<&'a Pruned>,
    /// Its factors and the dampening that was asked for, if layers that share it have needed them already.
    pub factors: Option<(f64, &'a [Factor])>,
    /// What the joint solver needs of it, likewise.
    pub joint: Option<&'a JointFactors>,
    /// By how much the layer's outputs are off, if it is to make up for that. For the joint solver.
    pub correction: Option<&'a Correction>,
    /// Vectors of the layer's input that are not in the Hessian, [n, groups d], to check the joint solver on.
    pub held_out: Option<&'a Tensor>,
}

/// What has become of a weight before it is packed.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Its values, row by row.
    pub half: Vec<f16>,
    /// Which of them are kept, if it was pruned.
    pub keep: Option<Vec<bool>>,
    /// The same in palettes and indices, if it was palettized.
    pub palettized: Option<Palettized>,
    /// tr((W - W0) H (W - W0)^T) of the pruned weight.
    pub loss: Option<f64>,
    /// What the weight was to be, if not what it was: fp32, of its shape.
    pub target: Option<Tensor>,
    /// What has to be said about it.
    pub notes: Vec<String>,
}

/// Compresses the weight [o, ...] of the layer `name` as `recipe` says. Pruning and the joint solver need calibration, palettizing does
/// not.
///
/// # Errors
/// [`Error::Layer`]: NaN in its weight, a group that does not divide its channels, a Hessian that cannot be factored.
pub fn treat(name: &str, weight: &Tensor, recipe: &LayerRecipe, calibrated: Option<Evidence<'_>>) -> Result<Treated> {
    treat_weight(name, weight, recipe, calibrated).map_err(Error::layer(name))
}

fn treat_weight(name: &str, weight: &Tensor, recipe: &LayerRecipe, calibrated: Option<Evidence<'_>>) -> Result<Treated> {
    let original = weight.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    let size = original.size();
    let found = match recipe.joint {
        Some(_) => joint_solution(name, weight, recipe, calibrated)?,
        None => one_after_the_other(name, &original, recipe, calibrated)?,
    };
    let Found { half, keep, palettized, loss, target, notes } = found;
    let stored = match (palettized, &keep) {
        (Some(found), keep) => Some(CompressedWeight::palettized(
            size.clone(),
            keep.as_deref(),
            found.bits,
            found.axis,
            found.group_size,
            found.palettes,
            &found.indices,
            found.scales,
        )?),
        (None, Some(keep)) => Some(CompressedWeight::sparse(size.clone(), keep, &half)?),
        (None, None) => None,
    };
    drop(keep);
    let values = match &stored {
        Some(stored) => {
            drop(half);
            stored.decode()?
        }
        None => half,
    };
    let decoded = Tensor::f_from_slice(&values)?.f_view(size.as_slice())?;
    let distance = relative_distance(&Vec::<f32>::try_from(&original.f_reshape([-1])?)?, &values);
    drop(values);
    let mut errors = LayerErrors { weight: distance, ..LayerErrors::default() };
    if let Some(Evidence { hessian, .. }) = calibrated {
        let lost = match target {
            Some(mut target) => target.f_sub_(&decoded)?,
            None => original.f_sub(&decoded)?,
        };
        let [energy, lost] = output_energies([&original, &lost], hessian)?;
        let share = |lost: f64| if lost > 0.0 { lost / energy } else { 0.0 };
        errors.pruned_output = loss.map(share);
        errors.output = Some(share(lost));
    }
    Ok(Treated { stored, decoded, errors, notes })
}

/// Mask, weights and palettes of `weight` [o, ...], together.
fn joint_solution(name: &str, weight: &Tensor, recipe: &LayerRecipe, calibrated: Option<Evidence<'_>>) -> Result<Found> {
    let (Some(options), Some(Evidence { hessian, joint: made, correction, held_out, .. })) = (recipe.joint_options(), calibrated)
    else {
        return Err(Error::Argument("cannot be solved jointly: no calibration input reached it".into()));
    };
    let own;
    let factors = match made.filter(|made| made.fit(options.dampening(), options.order())) {
        Some(made) => made,
        None => {
            own = JointFactors::new(hessian, options.dampening(), options.order())?;
            &own
        }
    };
    let Joint { weight: half, mask, palettized, pruned_loss, notes, target, .. } =
        joint(name, weight, hessian, factors, &Beside { correction, held_out }, &options)?;
    Ok(Found { half, keep: mask, palettized, loss: pruned_loss, target, notes: notes.iter().map(ToString::to_string).collect() })
}

/// Prunes, then palettizes what is left. `original` is the weight in fp32 on the CPU.
fn one_after_the_other(name: &str, original: &Tensor, recipe: &LayerRecipe, calibrated: Option<Evidence<'_>>) -> Result<Found> {
    let mut notes = Vec::new();
    let mut loss = None;

    let (half, keep) = match &recipe.prune {
        None => (halves(original)?, None),
        Some(options) if recipe.method == PruneMethod::Magnitude => {
            let masked = magnitude_prune(original, options.sparsity)?;
            let keep: Vec<bool> = Vec::try_from(&masked.mask.f_flatten(0, -1)?)?;
            (halves(&masked.weight)?, Some(keep))
        }
        Some(options) => {
            let Some(Evidence { hessian, pruned, factors, .. }) = calibrated else {
                return Err(Error::Argument("cannot be pruned: no calibration input reached it".into()));
            };
            let own;
            let pruned = match (pruned, factors) {
                (Some(pruned), _) => pruned,
                (None, Some((dampening, factors))) if dampening == options.dampening => {
                    own = prune_with(original, hessian, factors, options)?;
                    &own
                }
                (None, _) => {
                    own = prune(original, hessian, options)?;
                    &own
                }
            };
            notes.extend(pruned.notes.iter().map(ToString::to_string));
            loss = Some(pruned.loss);
            let keep: Vec<bool> = Vec::try_from(&pruned.mask.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?;
            (halves(&pruned.weight.f_to_device(Device::Cpu)?)?, Some(keep))
        }
    };
    let shape: Vec<usize> = original.size().iter().map(|n| *n as usize).collect();
    let palettized = match &recipe.palettize {
        None => None,
        Some(options) => match palettize(name, &half, &shape, keep.as_deref(), options)? {
            Outcome::Palettized(found) => {
                notes.extend(found.misfit.clone());
                Some(found)
            }
            Outcome::LeftDense { reason } => {
                notes.push(format!("left without a palette: {reason}"));
                None
            }
        },
    };
    Ok(Found { half, keep, palettized, loss, target: None, notes })
}

/// A weight in fp16, row by row.
fn halves(weight: &Tensor) -> Result<Vec<f16>> {
    Ok(Vec::try_from(&weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?.f_contiguous()?)?)
}
