//! Compresses one layer: prune, round to fp16, palettize, pack.

use half::f16;
use tch::{Device, Kind, Tensor};

use crate::container::CompressedWeight;
use crate::error::{Error, Result};
use crate::model::Layer;
use crate::solver::palette::{Outcome, PaletteOptions, palettize};
use crate::solver::{Hessian, PruneOptions, output_energy, output_error, prune};

/// What is done to a layer; at least one of the two.
#[derive(Debug, Clone, PartialEq)]
pub struct Treatment {
    /// Which weights go.
    pub prune: Option<PruneOptions>,
    /// What the others are replaced by.
    pub palettize: Option<PaletteOptions>,
}

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

/// ‖a - b‖² / ‖a‖² in fp64; ‖b‖² where a is zero.
fn relative_distance(original: &Tensor, new: &Tensor) -> Result<f64> {
    let (original, new) = (original.f_to_kind(Kind::Double)?, new.f_to_kind(Kind::Double)?);
    let norm = |x: &Tensor| -> Result<f64> { Ok(x.f_norm()?.f_double_value(&[])?) };
    let scale = norm(&original)?;
    Ok((norm(&original.f_sub(&new)?)? / if scale > 0.0 { scale } else { 1.0 }).powi(2))
}

/// Compresses `layer` as `treatment` says. `hessian` is that of its calibration inputs; pruning needs it, palettizing does not.
///
/// # Errors
/// [`Error::Layer`]: NaN in its weight, a group that does not divide its channels, a Hessian that cannot be factored.
pub fn treat(layer: &Layer, treatment: &Treatment, hessian: Option<&Hessian>) -> Result<Treated> {
    treat_weight(layer, treatment, hessian).map_err(Error::layer(layer.name()))
}

fn treat_weight(layer: &Layer, treatment: &Treatment, hessian: Option<&Hessian>) -> Result<Treated> {
    let original = layer.weight().f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    let size = original.size();
    let mut notes = Vec::new();
    let mut errors = LayerErrors::default();

    let (half, keep) = match &treatment.prune {
        None => (halves(&original)?, None),
        Some(options) => {
            let hessian = hessian.ok_or_else(|| Error::Argument("cannot be pruned: no calibration input reached it".into()))?;
            let pruned = prune(layer.weight(), hessian, options)?;
            notes.extend(pruned.notes.iter().map(ToString::to_string));
            let energy = output_energy(layer.weight(), hessian)?;
            errors.pruned_output = Some(if pruned.loss > 0.0 { pruned.loss / energy } else { 0.0 });
            let keep: Vec<bool> = Vec::try_from(&pruned.mask.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?;
            (halves(&pruned.weight.f_to_device(Device::Cpu)?)?, Some(keep))
        }
    };
    let shape: Vec<usize> = size.iter().map(|n| *n as usize).collect();
    let palettized = match &treatment.palettize {
        None => None,
        Some(options) => match palettize(layer.name(), &half, &shape, keep.as_deref(), options)? {
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
    let keep = keep.as_deref();
    let stored = match (palettized, keep) {
        (Some(found), keep) => Some(CompressedWeight::palettized(
            size.clone(),
            keep,
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
    let values = match &stored {
        Some(stored) => stored.decode()?,
        None => half,
    };
    let decoded = Tensor::f_from_slice(&values)?.f_view(size.as_slice())?;
    errors.weight = relative_distance(&original, &decoded)?;
    errors.output = hessian
        .map(|hessian| {
            output_error(layer.weight(), &decoded.f_to_device(layer.weight().device())?.f_to_kind(Kind::Float)?, hessian)
        })
        .transpose()?;
    Ok(Treated { stored, decoded, errors, notes })
}

/// A weight in fp16, row by row.
fn halves(weight: &Tensor) -> Result<Vec<f16>> {
    Ok(Vec::try_from(&weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?.f_contiguous()?)?)
}
