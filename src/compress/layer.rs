//! Compresses one layer: prune, round to fp16, palettize, pack.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{PaletteOptions, PruneMethod, PruneOptions};
use squeeze_container::CompressedWeight;
use squeeze_solver::palette::{Palettized, palettize};
use squeeze_solver::{
    Factor, GPTQ_DAMPENING, Hessian, Joint, JointFactors, JointOptions, LayerEvidence, OutputMetric, OutputResidual, Pruned,
    Quantized, gptq, joint, magnitude_prune, prune, prune_with,
};
use tch::{Device, Kind, Tensor};

use crate::recipe::LayerRecipe;

/// A compressed layer: its new weight and its errors.
#[derive(Debug)]
pub struct CompressedLayer {
    /// The packed weight; `None` if the layer stays an fp16 tensor.
    pub stored: Option<CompressedWeight>,
    /// The errors of the new weight.
    pub errors: LayerErrors,
    /// Warnings and remarks.
    pub notes: Vec<String>,
}

/// The distance of a layer from its original.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerErrors {
    /// ‖W - W'‖² / ‖W‖² of the stored weight W'.
    pub weight: f64,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs X, for W' pruned but not palettized.
    pub pruned_output: Option<f64>,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs X, for W' as stored.
    pub output: Option<f64>,
}

/// Numbers that are converted to fp32 a block at a time.
trait Wide: Copy + Sync {
    fn widen(block: &[Self], to: &mut [f32]);
}

impl Wide for f32 {
    fn widen(block: &[f32], to: &mut [f32]) {
        to.copy_from_slice(block);
    }
}

impl Wide for f16 {
    fn widen(block: &[f16], to: &mut [f32]) {
        block.convert_to_f32_slice(to);
    }
}

/// ‖a - b‖² / ‖a‖², or ‖b‖² where a is zero, summed in fp64 in an order that does not depend on the
/// number of threads.
fn relative_distance<T: Wide>(original: &[T], new: &[f16]) -> f64 {
    const PIECE: usize = 1 << 16;
    let pieces = original.par_chunks(PIECE).zip(new.par_chunks(PIECE)).map(|(original, new)| squares(original, new));
    let sums: Vec<(f64, f64)> = pieces.collect();
    let (distance, scale) = sums.iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1));
    distance / if scale > 0.0 { scale } else { 1.0 }
}

/// ‖a - b‖² and ‖a‖².
fn squares<T: Wide>(a: &[T], b: &[f16]) -> (f64, f64) {
    /// Sums that run beside each other, in vector registers.
    const LANES: usize = 8;
    let mut wide = [[0.0_f32; 512]; 2];
    let mut sums = [[0.0_f64; LANES]; 2];
    for (a, b) in a.chunks(512).zip(b.chunks(512)) {
        let [wide_a, wide_b] = wide.each_mut().map(|wide| &mut wide[..a.len()]);
        T::widen(a, wide_a);
        f16::widen(b, wide_b);
        let (lanes_a, rest_a) = wide_a.as_chunks::<LANES>();
        let (lanes_b, rest_b) = wide_b.as_chunks::<LANES>();
        for (a, b) in lanes_a.iter().zip(lanes_b) {
            for lane in 0..LANES {
                let (a, b) = (f64::from(a[lane]), f64::from(b[lane]));
                sums[0][lane] += (a - b) * (a - b);
                sums[1][lane] += a * a;
            }
        }
        for (lane, (a, b)) in rest_a.iter().zip(rest_b).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            sums[0][lane] += (a - b) * (a - b);
            sums[1][lane] += a * a;
        }
    }
    let [distance, scale] = sums.map(|lanes| lanes.iter().sum());
    (distance, scale)
}

/// The sums and vectors that calibration has gathered for a layer.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// The Hessian of the layer's input.
    pub hessian: &'a Hessian,
    /// The pruned weight, if it was pruned together with other layers.
    pub pruned: Option<&'a Pruned>,
    /// Cached Cholesky factors and the dampening that was asked for.
    pub factors: Option<(f64, &'a [Factor])>,
    /// Cached factors for the joint solver.
    pub joint: Option<&'a JointFactors>,
    /// The correlation of the layer's input with its output residual, if the layer has a dense
    /// target. For the joint solver.
    pub correction: Option<&'a OutputResidual>,
    /// The metric of the layer's outputs, for the joint solver.
    pub metric: Option<&'a OutputMetric>,
    /// Vectors of the layer's input that are not in the Hessian, [n, groups d], to validate the
    /// joint solver on.
    pub held_out: Option<&'a Tensor>,
}

impl<'a> Evidence<'a> {
    /// A Hessian alone.
    #[must_use]
    pub fn of(hessian: &'a Hessian) -> Self {
        Evidence { hessian, pruned: None, factors: None, joint: None, correction: None, metric: None, held_out: None }
    }
}

/// A solved weight before it is packed.
#[derive(Debug, Default)]
pub(super) struct Solution {
    /// Its values in fp16, row by row.
    pub values: Vec<f16>,
    /// Which of them are kept, if the weight was pruned.
    keep: Option<Vec<bool>>,
    /// Palettes and indices, if the weight was palettized.
    palettized: Option<Palettized>,
    /// tr((W - W0) H (W - W0)^T) of the pruned weight W and the original W0.
    pub loss: Option<f64>,
    /// The regression target, if it differs from the original weight: fp32, of the weight's shape.
    pub target: Option<Tensor>,
    /// Warnings and remarks.
    pub notes: Vec<String>,
}

impl Solution {
    /// Packs a weight of this shape; `None` if it stays an fp16 tensor. Mask, palettes and indices
    /// are taken out.
    pub(super) fn pack(&mut self, size: &[i64]) -> Result<Option<CompressedWeight>> {
        let keep = self.keep.take();
        Ok(match (self.palettized.take(), &keep) {
            (Some(Palettized { codebook, indices, .. }), keep) => {
                // Rows that share indices have one mask.
                let row = self.values.len() / size[0].unsigned_abs() as usize;
                let first = |keep: &Vec<bool>| keep.chunks(row).step_by(codebook.vector_length).flatten().copied().collect();
                let keep: Option<Vec<bool>> = match codebook.vector_length {
                    1 => keep.clone(),
                    _ => keep.as_ref().map(first),
                };
                Some(CompressedWeight::palettized(size.to_vec(), keep.as_deref(), codebook, &indices)?)
            }
            (None, Some(keep)) => Some(CompressedWeight::sparse(size.to_vec(), keep, &self.values)?),
            (None, None) => None,
        })
    }
}

/// Compresses a weight [o, ...] on the host, as
/// [`compress_layer`](super::one_layer::compress_layer) does, without the layer's name in errors.
pub(super) fn compress_on_host(
    name: &str,
    weight: &Tensor,
    recipe: &LayerRecipe,
    evidence: Option<Evidence<'_>>,
) -> Result<CompressedLayer> {
    let size = weight.size();
    let original = weight.f_to_device(Device::Cpu)?;
    // The palettes of a weight that is not pruned are made from its fp16 values alone.
    let needs_singles = evidence.is_some() || recipe.prune.is_some() || original.kind() != Kind::Half;
    let original = if needs_singles { original.f_to_kind(Kind::Float)? } else { original };
    let mut solution = match recipe.joint {
        Some(_) => JointProblem::new(recipe, evidence)?.solution(name, weight)?,
        None => solve_sequentially(name, &original, recipe, evidence)?,
    };
    let stored = solution.pack(&size)?;
    let Solution { values, loss, target, notes, .. } = solution;
    // Values in fp16 are still the original ones.
    let solved = if needs_singles { None } else { Some(&values) };
    let new = stored.as_ref().map(CompressedWeight::decode).transpose()?;
    let distance = match solved {
        Some(original) => relative_distance(original, new.as_ref().unwrap_or(original)),
        None => relative_distance(&singles(&original)?, new.as_ref().unwrap_or(&values)),
    };
    let decoded = new.unwrap_or(values);
    let mut errors = LayerErrors { weight: distance, ..LayerErrors::default() };
    if let Some(Evidence { hessian, .. }) = evidence {
        let decoded = Tensor::f_from_slice(&decoded)?.f_view(size.as_slice())?;
        let lost = match target {
            Some(target) => target.f_to_device(Device::Cpu)?.f_sub_(&decoded)?,
            None => original.f_sub(&decoded)?,
        };
        errors.add_outputs(&original, &lost, loss, hessian)?;
    }
    Ok(CompressedLayer { stored, errors, notes })
}

/// A weight in fp32, row by row.
fn singles(weight: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::try_from(&weight.f_reshape([-1])?)?)
}

/// What the joint solver is given besides the weight.
pub(super) struct JointProblem<'a> {
    options: JointOptions,
    evidence: Evidence<'a>,
    /// The factors, if those of the evidence do not fit.
    new: Option<JointFactors>,
}

/// [`joint`] or [`joint_on_device`](squeeze_solver::joint_on_device).
type JointSolver<T> = fn(&str, &Tensor, &Hessian, &JointFactors, &LayerEvidence<'_>, &JointOptions) -> Result<T>;

impl<'a> JointProblem<'a> {
    /// The problem of a layer with this recipe. It makes the factors that are not there.
    ///
    /// # Errors
    /// If there is no evidence, or the Hessian cannot be factored.
    pub(super) fn new(recipe: &LayerRecipe, evidence: Option<Evidence<'a>>) -> Result<Self> {
        let (Some(options), Some(evidence)) = (recipe.joint_options(), evidence) else {
            return Err(Error::Argument("cannot be solved jointly: no calibration input reached it".into()));
        };
        let (dampening, order) = (options.dampening(), options.order());
        let fits = evidence.joint.is_some_and(|cached| cached.fit(dampening, order));
        let new = if fits { None } else { Some(JointFactors::new(evidence.hessian, dampening, order)?) };
        Ok(JointProblem { options, evidence, new })
    }

    /// The result of `solver` for `weight` [o, ...].
    pub(super) fn solve_with<T>(&self, name: &str, weight: &Tensor, solver: JointSolver<T>) -> Result<T> {
        let Evidence { hessian, joint: cached, correction, metric, held_out, .. } = self.evidence;
        let factors = self.new.as_ref().or(cached).expect("factors were made where there were none");
        solver(name, weight, hessian, factors, &LayerEvidence { residual: correction, held_out, metric }, &self.options)
    }

    /// Mask, weights and palettes of `weight` [o, ...], found together.
    pub(super) fn solution(&self, name: &str, weight: &Tensor) -> Result<Solution> {
        let Joint { weight: values, mask, palettized, pruned_loss, notes, target, .. } = self.solve_with(name, weight, joint)?;
        let notes = notes.iter().map(ToString::to_string).collect();
        Ok(Solution { values, keep: mask, palettized, loss: pruned_loss, target, notes })
    }
}

/// Prunes, then palettizes the kept weights; or rounds with error feedback. `original` is the
/// weight on the CPU, in fp32 if it is pruned or rounded so.
fn solve_sequentially(name: &str, original: &Tensor, recipe: &LayerRecipe, evidence: Option<Evidence<'_>>) -> Result<Solution> {
    if let Some(options) = recipe.gptq_options() {
        return quantize_by_evidence(name, original, recipe, options, evidence);
    }
    let mut solution = prune_weight(original, recipe, evidence)?;
    let shape: Vec<usize> = original.size().iter().map(|n| *n as usize).collect();
    let Some(options) = &recipe.palettize else { return Ok(solution) };
    solution.palettized = Some(palettize(name, &solution.values, &shape, solution.keep.as_deref(), options)?);
    Ok(solution)
}

/// Prunes a weight, if `recipe` says so, and rounds it to fp16.
fn prune_weight(original: &Tensor, recipe: &LayerRecipe, evidence: Option<Evidence<'_>>) -> Result<Solution> {
    let Some(options) = &recipe.prune else {
        return Ok(Solution { values: halves(original)?, ..Solution::default() });
    };
    if recipe.method == PruneMethod::Magnitude {
        let masked = magnitude_prune(original, options.sparsity, options.rows_together)?;
        let keep = Some(Vec::try_from(&masked.mask.f_flatten(0, -1)?)?);
        return Ok(Solution { values: halves(&masked.weight)?, keep, ..Solution::default() });
    }
    let new;
    let pruned = match evidence.and_then(|evidence| evidence.pruned) {
        Some(pruned) => pruned,
        None => {
            new = prune_by_evidence(original, options, evidence)?;
            &new
        }
    };
    Ok(Solution {
        values: halves(&pruned.weight.f_to_device(Device::Cpu)?)?,
        keep: Some(Vec::try_from(&pruned.mask.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?),
        loss: Some(pruned.loss),
        notes: pruned.notes.iter().map(ToString::to_string).collect(),
        ..Solution::default()
    })
}

/// Prunes a weight by SparseGPT, with cached factors if they fit.
pub(super) fn prune_by_evidence(original: &Tensor, options: &PruneOptions, evidence: Option<Evidence<'_>>) -> Result<Pruned> {
    let Some(Evidence { hessian, factors, .. }) = evidence else {
        return Err(Error::Argument("cannot be pruned: no calibration input reached it".into()));
    };
    match factors {
        Some((dampening, factors)) if dampening == options.dampening => prune_with(original, hessian, factors, options),
        _ => prune(original, hessian, options),
    }
}

/// Rounds a weight to fixed values by GPTQ, with cached factors if they fit.
fn quantize_by_evidence(
    name: &str,
    original: &Tensor,
    recipe: &LayerRecipe,
    options: &PaletteOptions,
    evidence: Option<Evidence<'_>>,
) -> Result<Solution> {
    if recipe.prune.is_some() {
        return Err(Error::Argument("is not pruned where it is rounded with error feedback".into()));
    }
    let Some(Evidence { hessian, factors, .. }) = evidence else {
        return Err(Error::Argument("cannot be rounded with error feedback: no calibration input reached it".into()));
    };
    let new;
    let factors = match factors {
        Some((dampening, factors)) if dampening == GPTQ_DAMPENING => factors,
        Some(_) | None => {
            new = Factor::all(hessian, GPTQ_DAMPENING)?;
            &new
        }
    };
    let Quantized { palettized, notes } = gptq(name, original, hessian, factors, options)?;
    let notes = notes.iter().map(ToString::to_string).collect();
    Ok(Solution { values: halves(original)?, palettized: Some(palettized), notes, ..Solution::default() })
}

/// A weight in fp16, row by row.
fn halves(weight: &Tensor) -> Result<Vec<f16>> {
    Ok(Vec::try_from(&weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?.f_contiguous()?)?)
}
