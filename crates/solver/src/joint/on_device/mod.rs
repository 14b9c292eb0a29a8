//! The joint solver by tensor operations, for weights on a GPU.
//!
//! Its steps are those of the solver for CPUs. Every step works on all rows at once, on the
//! Hessian's device. Steps that go column by column are [kernels](crate::kernels). The host makes
//! the exact palettes, and otherwise only waits for the numbers that decide whether a descent goes
//! on.

mod blocks;
mod host;
mod least_squares;
mod polish;
mod problem;
mod solution;
mod swap;
mod sweep;
#[cfg(test)]
mod tests;

use squeeze_base::error::{Error, Result};
use squeeze_codebook::{NmRatio, PaletteOptions, Sparsity};
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::product::product;
use squeeze_numerics::sum::squares;
use tch::{Device, Kind, Tensor};

use super::super::palette::Palettized;
use super::exact;
use super::factors::JointFactors;
use super::options::{JointOptions, finds_jointly};
use super::outcome::{Joint, LEAST_STEP_GAIN, LayerEvidence, best_of, first_mask, first_notes};
use crate::{Hessian, Note};
use host::{bools, on_host};
use least_squares::MaskedLeastSquares;
use problem::Problem;
use solution::Solution;
use swap::{Swaps, swap};

/// Whether this solver can take the layer: it has one group, its Hessian is on a GPU, and its
/// palettes are of single values along output channels, without scales and without a refit.
pub(super) fn serves(hessian: &Hessian, options: &JointOptions) -> bool {
    hessian.device() != Device::Cpu && takes(hessian, options)
}

fn takes(hessian: &Hessian, options: &JointOptions) -> bool {
    let palettes = options.palettize.as_ref();
    let is_plain = |palette: &PaletteOptions| finds_jointly(palette) && palette.vector_length == 1;
    let are_plain = palettes.is_none_or(is_plain);
    hessian.groups() == 1 && are_plain && options.effort.palette_steps == 0
}

/// The result of [`joint_on_device`](super::joint_on_device): that of [`joint`](super::joint()),
/// with matrices on the weight's device.
#[derive(Debug)]
pub struct DeviceJoint {
    /// The weight [o, d], fp16; zero where pruned.
    pub weight: Tensor,
    /// The kept elements [o, d], bool; `None` if the options have no pruning.
    pub mask: Option<Tensor>,
    /// Palettes without indices, and the indices [o, d], u8, if the options have palettes.
    pub palettized: Option<(Palettized, Tensor)>,
    /// As in [`Joint`].
    pub pruned_loss: Option<f64>,
    /// As in [`Joint`].
    pub loss: f64,
    /// As in [`Joint`].
    pub sequential_loss: f64,
    /// As in [`Joint`].
    pub target: Option<Tensor>,
    /// As in [`Joint`].
    pub notes: Vec<Note>,
}

impl DeviceJoint {
    /// The result on the host.
    pub(super) fn into_joint(self) -> Result<Joint> {
        let DeviceJoint { weight, mask, palettized, pruned_loss, loss, sequential_loss, target, notes } = self;
        let palettized = match palettized {
            None => None,
            Some((palettized, indices)) => Some(Palettized { indices: Vec::try_from(&on_host(&indices)?)?, ..palettized }),
        };
        Ok(Joint {
            weight: Vec::try_from(&on_host(&weight)?)?,
            mask: mask.as_ref().map(bools).transpose()?,
            palettized,
            pruned_loss,
            loss,
            sequential_loss,
            target,
            notes,
        })
    }
}

/// [`joint`](super::joint()) of the flat weight [o, d], which is on the Hessian's device, of a
/// layer with a weight of `shape`.
pub(super) fn solve(
    name: &str,
    (mut flat, shape): (Tensor, &[i64]),
    hessian: &Hessian,
    factors: &JointFactors,
    evidence: &LayerEvidence<'_>,
    options: &JointOptions,
) -> Result<DeviceJoint> {
    let mut notes = first_notes(factors, evidence, options);
    let mut problem = Problem::new(factors, &flat)?;
    let mut target = None;
    let mut uncompressed = None;
    if let Some(residual) = evidence.residual {
        uncompressed = exact::palettes_can_hold(&flat, options)?.map(|_| flat.shallow_clone());
        let residual = problem.sorted(&residual.matrix()?.f_to_device(flat.device())?)?;
        if !is_finite(&residual)? {
            return Err(Error::NotFinite("the residual of the layer's outputs has NaN or infinite values in it".into()));
        }
        flat = problem.natural(&factors.factors[0].solve(&residual)?)?.f_add_(&flat)?;
        target = Some(flat.f_reshape(shape)?);
    }
    let pruned = first_mask(&flat, hessian, factors, options, &mut notes)?;
    problem.set(&flat)?;
    let first_keep = match (&pruned, options.prune) {
        (Some(pruned), _) => Some(pruned.mask.shallow_clone()),
        (None, Some(_)) => Some(flat.f_ones_like()?.f_to_kind(Kind::Bool)?),
        (None, None) => None,
    };
    problem.keep = first_keep.as_ref().map(Tensor::shallow_clone);
    // A layer whose columns are in another order is not pruned.
    let mut best = match &pruned {
        Some(pruned) => pruned.weight.shallow_clone(),
        None => problem.original.shallow_clone(),
    };
    drop(pruned);
    let sequential = Solution::plain(name, &problem, &best, options)?;
    let mut pruned_loss = None;
    if let Some(keep) = &first_keep {
        let mut solve = MaskedLeastSquares::new(&problem, &best, keep)?;
        refit(&mut solve, options)?;
        pruned_loss = Some(problem.loss_of(&solve.change()?, &solve.gradient)?.bare);
        let kept = solve.mask.f_gt(0.0)?;
        best = solve.weight.shallow_clone();
        drop(solve);
        problem.keep = Some(kept);
    }
    let solution = match &options.palettize {
        None => Solution::plain(name, &problem, &best, options)?,
        Some(palette) => Solution::joint(name, &problem, &best, (palette, &options.effort))?,
    };
    drop(best);
    let sequential_loss = sequential.loss.bare;
    let held_out = |solution: &Solution, reference: &Solution| {
        evidence.held_out.map_or(Ok(0.0), |vectors| held_out_ratio(&problem, vectors, solution, reference))
    };
    let (worse, note) = best_of(solution.loss.bare, sequential_loss, || held_out(&solution, &sequential))?;
    notes.extend(note);
    let mut solution = if worse { sequential } else { solution };
    if let Some(uncompressed) = uncompressed {
        let uncompressed = problem.sorted(&uncompressed)?;
        let exact = Solution::plain(name, &problem, &uncompressed, options)?;
        let is_exact = exact.weight.f_to_kind(Kind::Float)?.f_equal(&uncompressed)?;
        if is_exact && (exact.loss.bare <= solution.loss.bare || held_out(&solution, &exact)? > 1.0) {
            solution = exact;
        }
    }
    let keep =
        if worse && options.effort.exchange_turns > 0 { first_keep } else { problem.keep.as_ref().map(Tensor::shallow_clone) };
    let Solution { weight, palettized, loss } = solution;
    let palettized = palettized.map(|(palettized, indices)| Ok::<_, Error>((palettized, problem.natural(&indices)?)));
    Ok(DeviceJoint {
        weight: problem.natural(&weight)?,
        mask: keep,
        palettized: palettized.transpose()?,
        pruned_loss,
        loss: loss.bare,
        sequential_loss,
        target,
        notes,
    })
}

/// Refits the weights on their mask and swaps pruned and kept weights.
fn refit(solve: &mut MaskedLeastSquares<'_>, options: &JointOptions) -> Result<()> {
    let effort = &options.effort;
    let group = match options.prune.map(|prune| prune.sparsity) {
        Some(Sparsity::NOfM(NmRatio { m, .. })) => Some(m as i64),
        Some(Sparsity::Unstructured(_)) | None => None,
    };
    solve.descend(effort.refit_steps, LEAST_STEP_GAIN)?;
    swap(solve, Swaps { rounds: effort.exchange_turns, steps: effort.exchange_steps, least_gain: LEAST_STEP_GAIN, group })?;
    if effort.exchange_turns > 0 {
        solve.descend(effort.refit_steps, LEAST_STEP_GAIN)?;
    }
    Ok(())
}

/// The error of `solution` on vectors [n, d] as a multiple of the error of `reference`; 0 if it is
/// not larger.
fn held_out_ratio(problem: &Problem<'_>, vectors: &Tensor, solution: &Solution, reference: &Solution) -> Result<f64> {
    let _span = tracing::debug_span!("held out").entered();
    let error = |solution: &Solution| -> Result<f64> {
        let change = problem.natural(&solution.weight.f_to_kind(Kind::Float)?.f_sub(&problem.original)?)?;
        squares(&product(&vectors.f_to_device(change.device())?, &change.f_transpose(0, 1)?)?)
    };
    let (of_solution, of_reference) = (error(solution)?, error(reference)?);
    Ok(if of_solution > of_reference { of_solution / of_reference } else { 0.0 })
}
