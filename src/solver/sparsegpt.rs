//! SparseGPT: prune, and let the weights that stay make up for those that went.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::factor::inverse;
use super::matrix::{block, copy, flat_for, numbers_mut, panels, to_vec};
use super::sparsity::{Quota, mark_smallest};
use super::sweep::{Block, score, sweep};
use super::{Factor, Hessian, Note, Sparsity, device_sweep};
use crate::error::{Error, Result};
use crate::product::add_product;
use crate::sum::squares;

/// How [`prune`] prunes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PruneOptions {
    /// How much becomes zero.
    pub sparsity: Sparsity,
    /// Share of H's mean diagonal that is added to the diagonal (coremltools' `hessian_dampening`).
    pub dampening: f64,
    /// Columns whose mask is chosen together (coremltools' `processing_group_size`). For n:m the next smaller multiple of m.
    pub block: usize,
}

impl Default for PruneOptions {
    /// coremltools' defaults: half of the elements, a dampening of 0.01, blocks of 128 columns.
    fn default() -> Self {
        PruneOptions { sparsity: Sparsity::Unstructured(0.5), dampening: 0.01, block: 128 }
    }
}

/// A weight pruned by [`prune`].
#[derive(Debug)]
pub struct Pruned {
    /// [o, d] fp32 on the weight's device, exactly zero where pruned.
    pub weight: Tensor,
    /// [o, d] bool on the weight's device, true where kept.
    pub mask: Tensor,
    /// The share of elements that the mask prunes.
    pub sparsity: f64,
    /// tr((W - W0) H (W - W0)^T), which is [`output_energy`](super::output_energy) of the change. It falls out of the sweep.
    pub loss: f64,
    /// What the user should know.
    pub notes: Vec<Note>,
}

/// Prunes `weight` [o, ...], flattened to [o, d], as coremltools 9.0 does with `weight_dtype="float32"`
/// (`SparseGPT._compress_impl` in `optimize/torch/layerwise_compression/algorithms.py`).
///
/// Block by block of columns: the elements with the smallest w^2 / U_jj^2 are masked, over all rows at once; each masked element
/// goes to zero and the columns after it take up its error, e U_j with e = w / U_jj. For n:m sparsity the mask is chosen row by
/// row, at every m-th column. U is the inverse of the [`Factor`] R, of which only blocks on the diagonal are made: what all blocks before
/// leave to a block is D R, for D their change, and its weights become w + (D R) U. A convolution of several groups has its rows pruned group by group,
/// each with its own H, and a sparsity that is met over all of them.
///
/// It differs from coremltools only where that goes wrong: a target of zero prunes nothing (there, one element a block);
/// many equal scores do not all go at once; m need not divide the block, nor the columns (the rest stays dense, and a note says
/// so); a Hessian without a Cholesky factor gets more dampening.
///
/// On a CPU the sweep runs in any number of rayon threads with the same result. Where the Hessian is on a GPU everything stays there.
///
/// # Errors
/// [`Error::Argument`] for options out of range, a weight that does not fit the Hessian, or one that has seen no input;
/// [`Error::NotFinite`] for NaN; [`Error::NotPositiveDefinite`] if no dampening helps.
pub fn prune(weight: &Tensor, hessian: &Hessian, options: &PruneOptions) -> Result<Pruned> {
    options.sparsity.check()?;
    let factors =
        if options.sparsity == Sparsity::Unstructured(0.0) { Vec::new() } else { Factor::all(hessian, options.dampening)? };
    prune_with(weight, hessian, &factors, options)
}

/// [`prune`] with the factors that it would make ([`Factor::all`]), for layers that share a Hessian.
///
/// # Errors
/// As [`prune`]; [`Error::Argument`] if there is not a factor for each group.
pub fn prune_with(weight: &Tensor, hessian: &Hessian, factors: &[Factor], options: &PruneOptions) -> Result<Pruned> {
    options.sparsity.check()?;
    if options.block == 0 {
        return Err(Error::Argument("a processing group of no columns".into()));
    }
    let original = flat_for(weight, hessian)?;
    let (o, d) = original.size2()?;
    // Without pruning it stays what it is; else it is filled block by block.
    let new = if options.sparsity == Sparsity::Unstructured(0.0) { copy(&original)? } else { original.f_zeros_like()? };
    let pruned = Tensor::f_zeros([o, d], (Kind::Bool, original.device()))?;
    let mut notes = Vec::new();
    let mut loss = 0.0;
    if options.sparsity != Sparsity::Unstructured(0.0) {
        if factors.len() as i64 != hessian.groups() {
            return Err(Error::Argument(format!("{} factors for a layer of {} groups", factors.len(), hessian.groups())));
        }
        let rows = o / hessian.groups();
        let share = options.sparsity.share(d as usize);
        let mut quota = Quota::new(share, hessian.groups() == 1);
        for (group, factor) in (0..).zip(factors) {
            let part = |tensor: &Tensor| tensor.f_narrow(0, group * rows, rows);
            let (original, new) = (part(&original)?, part(&new)?);
            loss += prune_rows(&original, &new, &part(&pruned)?, factor, options, &mut quota)?;
        }
        find_notes(hessian, factors, options, &mut notes);
    }

    let reached = pruned.f_sum(Kind::Int64)?.f_int64_value(&[])? as f64 / (o * d) as f64;
    let asked = options.sparsity.share(d as usize);
    if (reached - asked).abs() > 0.001 {
        notes.push(Note::SparsityOff { asked, reached });
    }
    Ok(Pruned {
        loss: loss.max(0.0),
        weight: new.f_to_device(weight.device())?,
        mask: pruned.f_logical_not()?.f_to_device(weight.device())?,
        sparsity: reached,
        notes,
    })
}

/// What the Hessian and its factors leave to be said.
fn find_notes(hessian: &Hessian, factors: &[Factor], options: &PruneOptions, notes: &mut Vec<Note>) {
    let d = hessian.dimension();
    let dead: u64 = factors.iter().map(|factor| factor.dead_columns).sum();
    let used = factors.iter().map(|factor| factor.dampening).fold(options.dampening, f64::max);
    if hessian.vectors() < d.unsigned_abs() {
        notes.push(Note::FewVectors { vectors: hessian.vectors(), dimension: d.unsigned_abs() });
    }
    if dead > 0 {
        notes.push(Note::DeadColumns { count: dead, of: (hessian.groups() * d).unsigned_abs() });
    }
    if used > options.dampening {
        notes.push(Note::MoreDampening { asked: options.dampening, used });
    }
    if let Sparsity::NM { m, .. } = options.sparsity
        && !(d as usize).is_multiple_of(m)
    {
        notes.push(Note::IncompleteGroup { columns: (d as usize % m) as u64, m: m as u64 });
    }
}

/// Prunes rows that share a factor: `original` [o, d] into `new`, which is zeros, and `pruned`. Gives the loss,
/// of which dead columns are no part.
fn prune_rows(
    original: &Tensor,
    new: &Tensor,
    pruned: &Tensor,
    factor: &Factor,
    options: &PruneOptions,
    quota: &mut Quota,
) -> Result<f64> {
    let (ratio, columns) = match options.sparsity {
        Sparsity::Unstructured(_) => (None, options.block),
        Sparsity::NM { n, m } => (Some((n, m)), (options.block / m).max(1).saturating_mul(m)),
    };
    let sweep = if original.device() == Device::Cpu { host_block } else { device_block };
    prune_blocks((original, new, pruned), factor, (ratio, columns), quota, &sweep)
}

/// What a block's sweep does: weights [o, b] with what the blocks before left to them, in place, U [b, b] of its columns, n:m or the
/// number of elements to prune. Gives which were pruned, and the sum of the squared errors in fp64.
type SweepBlock = dyn Fn(&mut Tensor, &Tensor, Choice) -> Result<(Tensor, Tensor)>;

/// What is pruned in a block.
#[derive(Debug, Clone, Copy)]
enum Choice {
    Smallest(usize),
    Ratio(usize, usize),
}

fn prune_blocks(
    (original, new, pruned): (&Tensor, &Tensor, &Tensor),
    factor: &Factor,
    (ratio, columns): (Option<(usize, usize)>, usize),
    quota: &mut Quota,
    sweep: &SweepBlock,
) -> Result<f64> {
    let (o, d) = original.size2()?;
    let mut loss = Tensor::f_zeros([], (Kind::Double, original.device()))?;
    for panel in panels(d, i64::try_from(columns).unwrap_or(d)) {
        let width = panel.end - panel.start;
        let rows = factor.triangle.tail_of(panel.clone())?;
        let upper = inverse(&rows.f_narrow(1, 0, width)?)?;
        // Until its turn comes, a block of `new` holds D R of the blocks before.
        let mut place = block(new, 0..o, panel.clone())?;
        let mut before = block(original, 0..o, panel.clone())?;
        if factor.dead_columns > 0 {
            before = before.f_masked_fill(&factor.dead.f_narrow(0, panel.start, width)?, 0.0)?;
        }
        let mut weight = copy(&before)?;
        add_product(&weight, &place, &upper)?;
        let choice = match ratio {
            Some((n, m)) => Choice::Ratio(n, m),
            None => Choice::Smallest(quota.next((o * width) as usize)),
        };
        let (marks, squares) = sweep(&mut weight, &upper, choice)?;
        place.f_copy_(&weight)?;
        let change = before.f_sub(&weight)?;
        // What the sweep sums is the loss by the dampened Hessian.
        let _ = loss.f_add_(&squares)?.f_sub_(&energy(&change)?.f_mul_scalar(factor.added)?)?;
        block(pruned, 0..o, panel.clone())?.f_copy_(&marks)?;
        if panel.end < d {
            add_product(&block(new, 0..o, panel.end..d)?, &change, &rows.f_narrow(1, width, d - panel.end)?)?;
        }
    }
    Ok(loss.f_double_value(&[])?)
}

/// ‖change‖², fp64. On a GPU it stays there.
fn energy(change: &Tensor) -> Result<Tensor> {
    if change.device() == Device::Cpu {
        return Ok(Tensor::from(squares(change)?));
    }
    Ok(change.f_square()?.f_sum(Kind::Double)?)
}

/// On the CPU, rows in SIMD lanes.
fn host_block(weight: &mut Tensor, upper: &Tensor, choice: Choice) -> Result<(Tensor, Tensor)> {
    let (o, columns) = weight.size2()?;
    let upper = to_vec(upper)?;
    let values = numbers_mut(weight)?;
    let columns = columns as usize;
    let mut marks = vec![false; values.len()];
    let ratio = match choice {
        Choice::Ratio(n, m) => Some((n, m)),
        Choice::Smallest(count) => {
            let diagonal: Vec<f32> = upper.iter().step_by(columns + 1).copied().collect();
            let mut scores = vec![0.0; values.len()];
            let rows = scores.par_chunks_mut(columns).zip(values.par_chunks(columns)).with_min_len(64);
            rows.for_each(|(scores, values)| {
                let pairs = values.iter().zip(&diagonal);
                scores.iter_mut().zip(pairs).for_each(|(own, (weight, upper))| *own = score(*weight, *upper));
            });
            mark_smallest(&scores, count, &mut marks);
            None
        }
    };
    let squares = sweep(Block { weight: values, pruned: &mut marks, upper: &upper, columns }, ratio);
    Ok((Tensor::f_from_slice(&marks)?.f_view([o, columns as i64])?, Tensor::from(squares)))
}

/// The same by tensor operations, without a way to the host: for weights on a GPU.
fn device_block(weight: &mut Tensor, upper: &Tensor, choice: Choice) -> Result<(Tensor, Tensor)> {
    let (marks, ratio) = match choice {
        Choice::Ratio(n, m) => (weight.f_zeros_like()?.f_to_kind(Kind::Bool)?, Some((n, m))),
        Choice::Smallest(count) => (device_sweep::smallest(weight, upper, count)?, None),
    };
    let error = device_sweep::sweep(weight, upper, &marks, ratio)?;
    Ok((marks, error.f_square()?.f_sum(Kind::Double)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_sweep_equals_the_hosts() {
        let random = |size: [i64; 2], seed| crate::pipeline::noise(&size, seed, Kind::Float).unwrap();
        let inputs = random([900, 300], 5).matmul(&random([300, 300], 6));
        let mut hessian = Hessian::new(300, Device::Cpu).unwrap();
        hessian.add(&inputs).unwrap();
        let factor = Factor::new(&hessian, 0, 0.01).unwrap();
        let original = random([70, 300], 7);
        for (ratio, columns) in [(None, 128), (None, 37), (Some((2, 4)), 128), (Some((1, 3)), 126)] {
            let run = |sweep: &SweepBlock| {
                let (new, pruned) = (original.zeros_like(), original.zeros_like().to_kind(Kind::Bool));
                let mut quota = Quota::new(0.4, true);
                let loss = prune_blocks((&original, &new, &pruned), &factor, (ratio, columns), &mut quota, sweep);
                (new, pruned, loss.unwrap())
            };
            let (device, host) = (run(&device_block), run(&host_block));
            assert_eq!(device.1, host.1, "{ratio:?} {columns}: another mask");
            let off = ((&device.0 - &host.0).norm() / host.0.norm()).double_value(&[]);
            assert!(off < 1e-5 && (device.2 / host.2 - 1.0).abs() < 1e-5, "{ratio:?} {columns}: {off:.1e}");
        }
    }
}
