//! The joint solver: it optimises mask, values and palettes of one weight together, to minimise the
//! error of the layer's output.
//!
//! Its steps are the following. SparseGPT chooses the mask ([`prune_with`]). The kept weights are
//! refitted by least squares. Pruned and kept weights are swapped where that lowers the error.
//! Palettes are made for the kept weights. A sweep with error feedback rounds the weights to their
//! palettes. Palettes and indices are improved in alternation while this changes enough of them.
//! The stored form and its size are those of [`prune`](super::prune) followed by
//! [`palettize`](super::palette::palettize).
//!
//! Every step minimises tr((W - W0) H (W - W0)^T) with the damped H. If the metric M of the layer's
//! outputs is known, a last polish of the indices minimises tr(M (W - W0) H (W - W0)^T). Products
//! with H are matrix products; all other work goes row by row. On a GPU, [`on_device`] does the
//! same by tensor operations, without the metric.

mod entries;
mod exact;
mod factors;
mod least_squares;
mod natural;
mod on_device;
mod options;
mod outcome;
mod output_polish;
#[cfg(test)]
mod output_tests;
mod polish;
mod problem;
mod row;
mod shrinkage;
mod solution;
mod sorted_codebook;
mod swap;
mod sweep;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vector_tests;

pub use factors::{JointFactors, Order, has_whole};
use least_squares::MaskedLeastSquares;
use natural::Natural;
pub use on_device::DeviceJoint;
pub use options::{JointOptions, finds_jointly};
pub use outcome::{Joint, LayerEvidence};
use outcome::{LEAST_STEP_GAIN, best_of, first_mask, first_notes};
use problem::{Data, Loss, Problem};
use rayon::prelude::*;
use solution::Solution;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Effort, NmRatio, Sparsity};
use squeeze_numerics::product::product;
use squeeze_numerics::sum::{squares, sum as sum_of};
use swap::{Swaps, swap};
use tch::{Device, Tensor};

use super::matrix::to_vec;
use super::weight::flat_for;
use super::{Hessian, Note, OutputMetric, OutputResidual};

/// Compresses the weight [o, ...] of layer `name`, flattened to [o, d], by the steps that the
/// module lists.
///
/// Palettes along input channels, or with scales for each output channel, are not solved jointly:
/// [`palettize`] makes them for the refitted weights, and a note says so. Where the joint solution
/// has a larger error than the sequential one, on the Hessian or on held-out vectors, the
/// sequential solution is returned, with a note. A weight that its palettes
/// represent exactly is returned unchanged, unless another solution compensates for more of the
/// output residual.
///
/// The result does not depend on the number of rayon threads.
///
/// # Errors
/// As [`prune_with`] and [`palettize`]; [`Error::Argument`] for fixed values
/// ([`PaletteOptions::quantizer`](squeeze_codebook::PaletteOptions)), if the factors are not those
/// of this Hessian, dampening and order, or the output residual was made of other samples than the
/// Hessian.
///
/// [`palettize`]: super::palette::palettize
/// [`prune_with`]: super::prune_with
pub fn joint(
    name: &str,
    weight: &Tensor,
    hessian: &Hessian,
    factors: &JointFactors,
    evidence: &LayerEvidence<'_>,
    options: &JointOptions,
) -> Result<Joint> {
    if let Some(solved) = joint_on_device(name, weight, hessian, factors, evidence, options)? {
        return solved.into_joint();
    }
    let _span = tracing::debug_span!("joint").entered();
    let mut flat = checked(name, weight, hessian, factors, evidence, options)?;
    let (o, d) = flat.size2()?;
    let (rows, columns) = (o as usize, d as usize);
    let natural = Natural::new(factors, rows, columns);
    let shape: Vec<usize> = weight.size().iter().map(|size| *size as usize).collect();
    let mut target = None;
    let mut uncompressed = None;
    if let Some(residual) = evidence.residual {
        uncompressed = exact::palettes_can_hold(&flat, options)?;
        flat = corrected(&flat, residual, factors, &natural)?;
        target = Some(flat.f_to_device(Device::Cpu)?.f_reshape(weight.size())?);
    }
    let mut notes = first_notes(factors, evidence, options);
    let pruned = first_mask(&flat, hessian, factors, options, &mut notes)?;
    let bools = |mask: &Tensor| -> Result<Vec<bool>> { Ok(Vec::try_from(&mask.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?) };
    let mask = match (&pruned, options.prune) {
        (Some(pruned), _) => Some(bools(&pruned.mask)?),
        (None, Some(_)) => Some(vec![true; (o * d) as usize]),
        (None, None) => None,
    };
    let mut original = to_vec(&flat)?;
    natural.sort(&mut original);
    let mut problem = Problem { factors, data: Data { original, keep: mask, rows, columns, shape } };

    // The sequential solution, from whose pruned weights the joint solution starts.
    let mut best = match &pruned {
        Some(pruned) => to_vec(&pruned.weight)?,
        None => problem.data.original.clone(),
    };
    drop(pruned);
    let is_needed = !(options.trial && options.palettize.is_some_and(|palette| palette.vector_length > 1));
    let sequential = if is_needed { Some(Solution::plain(name, &problem, &best, options)?) } else { None };
    let mut pruned_loss = None;
    let mut first_mask = None;
    if let Some(mut keep) = problem.data.keep.take() {
        let group = match options.prune.map(|prune| prune.sparsity) {
            Some(Sparsity::NOfM(NmRatio { m, .. })) => Some(m),
            Some(Sparsity::Unstructured(_)) | None => None,
        };
        if options.effort.exchange_turns > 0 {
            first_mask = Some(keep.clone());
        }
        pruned_loss = Some(refit(&problem, &mut best, &mut keep, &options.effort, (group, options.rows_together()))?);
        problem.data.keep = Some(keep);
    }
    let solution = match &options.palettize {
        None => Solution::plain(name, &problem, &best, options)?,
        Some(palette) if finds_jointly(palette) => Solution::joint(name, &problem, &best, evidence.metric, options)?,
        Some(_) => {
            notes.push(Note::NotJoint);
            Solution::plain(name, &problem, &best, options)?
        }
    };
    let sequential_loss = sequential.as_ref().map_or(solution.loss.bare, |sequential| sequential.loss.bare);
    let held_out = |solution: &Solution, reference: &Solution| {
        let ratio = |vectors| held_out_ratio(&problem, &natural, (vectors, evidence.metric), solution, reference);
        evidence.held_out.map_or(Ok(0.0), ratio)
    };
    let cost = |solution: &Solution| solution.cost(&problem, evidence.metric);
    let (mut solution, worse) = match sequential {
        Some(sequential) => {
            let (worse, note) = best_of(cost(&solution)?, cost(&sequential)?, || held_out(&solution, &sequential))?;
            notes.extend(note);
            (if worse { sequential } else { solution }, worse)
        }
        None => (solution, false),
    };
    if let Some(mut uncompressed) = uncompressed {
        natural.sort(&mut uncompressed);
        let exact = Solution::plain(name, &problem, &uncompressed, options)?;
        let is_exact = exact.weight.iter().zip(&uncompressed).all(|(stored, value)| stored.to_f32() == *value);
        if is_exact && (cost(&exact)? <= cost(&solution)? || held_out(&solution, &exact)? > 1.0) {
            solution = exact;
        }
    }
    if worse {
        problem.data.keep = first_mask.or(problem.data.keep);
    }
    let Solution { mut weight, mut palettized, loss } = solution;
    natural.restore(&mut weight);
    if let Some(palettized) = &mut palettized {
        natural.restore_indices(&mut palettized.indices, palettized.codebook.vector_length);
    }
    Ok(Joint { weight, mask: problem.data.keep, palettized, pruned_loss, loss: loss.bare, sequential_loss, target, notes })
}

/// [`joint`] of a weight whose Hessian is on a GPU, without copies to the host. `None` where the
/// host has a part in it: for several groups, palettes along input channels or with scales,
/// palettes that are refitted, and with a metric of the outputs.
///
/// # Errors
/// As [`joint`].
pub fn joint_on_device(
    name: &str,
    weight: &Tensor,
    hessian: &Hessian,
    factors: &JointFactors,
    evidence: &LayerEvidence<'_>,
    options: &JointOptions,
) -> Result<Option<DeviceJoint>> {
    if evidence.metric.is_some() || !on_device::serves(hessian, options) {
        return Ok(None);
    }
    let _span = tracing::debug_span!("joint").entered();
    let flat = checked(name, weight, hessian, factors, evidence, options)?;
    on_device::solve(name, (flat, &weight.size()), hessian, factors, evidence, options).map(Some)
}

/// The flat weight [o, d], once the other arguments of [`joint`] are known to belong to it.
fn checked(
    name: &str,
    weight: &Tensor,
    hessian: &Hessian,
    factors: &JointFactors,
    evidence: &LayerEvidence<'_>,
    options: &JointOptions,
) -> Result<Tensor> {
    let flat = flat_for(weight, hessian)?;
    if options.palettize.is_some_and(|palette| palette.quantizer.is_some()) {
        return Err(Error::Argument(format!("`{name}`: fixed values with scales of blocks are not found jointly")));
    }
    if factors.parts.len() as i64 != hessian.groups() || !factors.fit(options.dampening(), options.order()) {
        return Err(Error::State(format!("`{name}`: factors of another Hessian, dampening or order")));
    }
    let vector_length = options.palettize.map_or(1, |palette| palette.vector_length) as i64;
    let of_part = flat.size2()?.0 / hessian.groups();
    if vector_length == 0 || of_part % vector_length != 0 {
        return Err(Error::Argument(format!("`{name}`: vectors of {vector_length} do not divide {of_part} output channels")));
    }
    if evidence.metric.is_some_and(|metric| hessian.groups() != 1 || metric.outputs() as i64 != flat.size()[0]) {
        return Err(Error::State(format!("`{name}`: the metric of other outputs, or of several groups")));
    }
    if evidence.residual.is_some_and(|residual| !residual.fits(hessian)) {
        return Err(Error::State(format!("`{name}`: the output residual and the Hessian were made of different samples")));
    }
    Ok(flat)
}

/// Refits the weights on their mask and swaps pruned and kept weights, so that the mask keeps its
/// size. `group` is m of n:m, and so many rows have one mask. Returns the loss by the undamped
/// Hessian.
fn refit(
    problem: &Problem<'_>,
    weight: &mut [f32],
    keep: &mut [bool],
    effort: &Effort,
    (group, rows_together): (Option<usize>, usize),
) -> Result<f64> {
    let Effort { refit_steps, exchange_turns, exchange_steps, .. } = *effort;
    let mut loss = Loss::default();
    for (part, rows) in problem.chunks() {
        let span = problem.data.span(&rows);
        let original = &problem.data.original[span.clone()];
        let mut solve = MaskedLeastSquares::new(problem.part(part), original, &weight[span.clone()], &keep[span.clone()])?;
        solve.descend(refit_steps, LEAST_STEP_GAIN)?;
        swap(
            &mut solve,
            Swaps { rounds: exchange_turns, steps: exchange_steps, least_gain: LEAST_STEP_GAIN, group, rows_together },
        )?;
        if exchange_turns > 0 {
            solve.descend(refit_steps, LEAST_STEP_GAIN)?;
        }
        loss.add(problem.part(part), &solve.change(), &solve.gradient);
        weight[span.clone()].copy_from_slice(&solve.weight);
        keep[span].iter_mut().zip(&solve.mask).for_each(|(keep, mask)| *keep = *mask > 0.0);
    }
    Ok(loss.bare)
}

/// The error of `solution` on vectors [n, groups d] as a multiple of the error of `reference`; 0 if
/// it is not larger. Errors are measured by the metric of the outputs, if there is one.
fn held_out_ratio(
    problem: &Problem<'_>,
    natural: &Natural<'_>,
    (vectors, metric): (&Tensor, Option<&OutputMetric>),
    solution: &Solution,
    reference: &Solution,
) -> Result<f64> {
    let Data { original, rows, columns, .. } = &problem.data;
    let parts = problem.factors.parts.len();
    let error = |solution: &Solution| -> Result<f64> {
        let mut change: Vec<f32> = solution.weight.par_iter().zip(original).map(|(new, old)| new.to_f32() - old).collect();
        natural.restore(&mut change);
        let change = Tensor::f_from_slice(&change)?.f_reshape([parts as i64, (rows / parts) as i64, *columns as i64])?;
        let change = change.f_to_device(vectors.device())?;
        let mut sum = 0.0;
        for part in 0..parts as i64 {
            let vectors = vectors.f_narrow(1, part * *columns as i64, *columns as i64)?;
            let change = change.f_get(part)?;
            sum += match metric {
                None => squares(&product(&vectors, &change.f_transpose(0, 1)?)?)?,
                Some(metric) => {
                    let error = product(&change, &vectors.f_transpose(0, 1)?)?;
                    sum_of(&metric.times(&(0..*rows), &error)?.f_mul_(&error)?)?
                }
            };
        }
        Ok(sum)
    };
    let (of_solution, of_reference) = (error(solution)?, error(reference)?);
    Ok(if of_solution > of_reference { of_solution / of_reference } else { 0.0 })
}

/// W + D (H + damping)^-1: the weights with the least error of the target outputs.
fn corrected(flat: &Tensor, residual: &OutputResidual, factors: &JointFactors, natural: &Natural<'_>) -> Result<Tensor> {
    let (o, d) = flat.size2()?;
    let mut residual = to_vec(&residual.matrix()?)?;
    natural.sort(&mut residual);
    let of_part = (o / factors.parts.len() as i64 * d) as usize;
    let mut solved = Vec::with_capacity(residual.len());
    for (residual, factor) in residual.chunks(of_part).zip(&factors.factors) {
        let residual = Tensor::f_from_slice(residual)?.f_reshape([-1, d])?.f_to_device(flat.device())?;
        solved.extend(to_vec(&factor.solve(&residual)?)?);
    }
    natural.restore(&mut solved);
    Ok(Tensor::f_from_slice(&solved)?.f_reshape([o, d])?.f_to_device(flat.device())?.f_add_(flat)?)
}
