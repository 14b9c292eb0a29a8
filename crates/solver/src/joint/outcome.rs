//! The evidence for the joint solver, its result, and the steps that are the same on all devices.

use half::f16;
use squeeze_base::error::Result;
use squeeze_codebook::{PruneOptions, Sparsity};
use tch::Tensor;

use super::factors::JointFactors;
use super::options::JointOptions;
use crate::palette::Palettized;
use crate::{Hessian, Note, OutputMetric, OutputResidual, Pruned, prune_with};

/// The least share by which a step of conjugate gradients must lower the objective for another step
/// to follow.
pub(super) const LEAST_STEP_GAIN: f64 = 0.001;

/// The evidence about a layer besides its Hessian.
#[derive(Debug, Clone, Copy, Default)]
pub struct LayerEvidence<'a> {
    /// The residual D of the layer's outputs, for which the weight compensates: W0 is then W + D
    /// H^-1.
    pub residual: Option<&'a OutputResidual>,
    /// Vectors of the layer's input that are not in the Hessian: [n, groups d], fp32.
    pub held_out: Option<&'a Tensor>,
    /// The metric of the layer's outputs, by which indices are polished and solutions compared.
    /// Only for weights with one Hessian.
    pub metric: Option<&'a OutputMetric>,
}

/// The result of [`joint`](super::joint()).
#[derive(Debug)]
pub struct Joint {
    /// The weight [o, d], fp16 numbers, row-major; zero where pruned.
    pub weight: Vec<f16>,
    /// The kept elements; `None` if the options have no pruning.
    pub mask: Option<Vec<bool>>,
    /// Palettes and indices, if the options have palettes.
    pub palettized: Option<Palettized>,
    /// tr((W - W0) H (W - W0)^T) of the pruned weight before it was palettized, if it was pruned.
    pub pruned_loss: Option<f64>,
    /// tr((W - W0) H (W - W0)^T) of the weight as stored.
    pub loss: f64,
    /// tr((W - W0) H (W - W0)^T) of the sequential solution: pruned, then palettized.
    pub sequential_loss: f64,
    /// W0 = W + D H^-1, fp32, of the weight's shape, on any device; `None` if W0 is the weight
    /// itself.
    pub target: Option<Tensor>,
    /// Notes for the user.
    pub notes: Vec<Note>,
}

/// The notes that are there before anything is solved.
pub(super) fn first_notes(factors: &JointFactors, evidence: &LayerEvidence<'_>, options: &JointOptions) -> Vec<Note> {
    let asks_for_metric = options.effort.output_probes > 0 && options.palettize.is_some() && !options.trial;
    let note = (asks_for_metric && evidence.metric.is_none()).then_some(Note::NoMetric);
    factors.notes().iter().copied().chain(note).collect()
}

/// SparseGPT's mask and weights; `None` if the options prune nothing.
pub(super) fn first_mask(
    flat: &Tensor,
    hessian: &Hessian,
    factors: &JointFactors,
    options: &JointOptions,
    notes: &mut Vec<Note>,
) -> Result<Option<Pruned>> {
    match &options.prune {
        Some(prune) if prune.sparsity != Sparsity::Unstructured(0.0) => {
            let options = PruneOptions { dampening: factors.dampening(), ..*prune };
            let pruned = prune_with(flat, hessian, &factors.factors, &options)?;
            notes.extend(pruned.notes.iter().copied());
            Ok(Some(pruned))
        }
        Some(_) | None => {
            let dimension = hessian.dimension().unsigned_abs();
            if hessian.vectors() < dimension {
                notes.push(Note::FewVectors { vectors: hessian.vectors(), dimension });
            }
            Ok(None)
        }
    }
}

/// Whether the sequential solution is better than the joint one, given their losses and the ratio
/// of their errors on held-out vectors, and a note that says so.
pub(super) fn best_of(joint: f64, sequential: f64, held_out: impl FnOnce() -> Result<f64>) -> Result<(bool, Option<Note>)> {
    if joint > sequential {
        // A weight that the sequential solution stores without any error needs no note.
        return Ok((true, (sequential > 0.0).then_some(Note::JointNoBetter { ratio: joint / sequential })));
    }
    let ratio = held_out()?;
    Ok((ratio > 1.0, (ratio > 1.0).then_some(Note::HeldOutNoBetter { ratio })))
}
