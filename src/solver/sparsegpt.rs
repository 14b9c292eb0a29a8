//! SparseGPT: prune, and let the weights that stay make up for those that went.

use tch::{Device, Kind, Tensor};

use super::matrix::{block, copy, flat_for, panels, to_vec};
use super::sparsity::{Quota, mark_smallest};
use super::sweep::{Block, scores, sweep};
use super::{Hessian, InverseFactor, Note, Sparsity, device_sweep};
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
/// row, at every m-th column. U is the [`InverseFactor`]. A convolution of several groups has its rows pruned group by group,
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
    let factors = if options.sparsity == Sparsity::Unstructured(0.0) {
        Vec::new()
    } else {
        InverseFactor::all(hessian, options.dampening)?
    };
    prune_with(weight, hessian, &factors, options)
}

/// [`prune`] with the factors that it would make ([`InverseFactor::all`]), for layers that share a Hessian.
///
/// # Errors
/// As [`prune`]; [`Error::Argument`] if there is not a factor for each group.
pub fn prune_with(weight: &Tensor, hessian: &Hessian, factors: &[InverseFactor], options: &PruneOptions) -> Result<Pruned> {
    options.sparsity.check()?;
    if options.block == 0 {
        return Err(Error::Argument("a processing group of no columns".into()));
    }
    let original = flat_for(weight, hessian)?;
    let (o, d) = original.size2()?;
    let new = copy(&original)?;
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
            let swept = prune_rows(&new, &part(&pruned)?, factor, options, &mut quota)?;
            // What the sweep sums is the loss by the dampened Hessian. Dead columns are no part of either.
            loss += swept - factor.added * squared_change(&original, &new, &factor.dead)?;
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

/// ‖new - original‖² without the `dead` columns, some rows at a time to spare memory.
fn squared_change(original: &Tensor, new: &Tensor, dead: &Tensor) -> Result<f64> {
    const ROWS: i64 = 64;
    let mut sum = 0.0;
    for rows in panels(new.size2()?.0, ROWS) {
        let part = |tensor: &Tensor| tensor.f_narrow(0, rows.start, rows.end - rows.start);
        let change = part(new)?.f_sub(&part(original)?)?.f_masked_fill_(dead, 0.0)?;
        sum += squares(&change)?;
    }
    Ok(sum)
}

/// What the Hessian and its factors leave to be said.
fn find_notes(hessian: &Hessian, factors: &[InverseFactor], options: &PruneOptions, notes: &mut Vec<Note>) {
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

/// Prunes rows that share a factor, `weight` and `pruned` [o, d] in place; gives the sum of the squared errors that were passed on,
/// which is the loss by the dampened Hessian.
fn prune_rows(
    weight: &Tensor,
    pruned: &Tensor,
    factor: &InverseFactor,
    options: &PruneOptions,
    quota: &mut Quota,
) -> Result<f64> {
    let (o, d) = weight.size2()?;
    let _ = weight.shallow_clone().f_masked_fill_(&factor.dead, 0.0)?;
    let (ratio, columns) = match options.sparsity {
        Sparsity::Unstructured(_) => (None, options.block),
        Sparsity::NM { n, m } => (Some((n, m)), (options.block / m).max(1).saturating_mul(m)),
    };
    if weight.device() != Device::Cpu {
        return prune_on_device(weight, pruned, factor, (ratio, columns), quota);
    }
    let mut loss = 0.0;
    for panel in panels(d, i64::try_from(columns).unwrap_or(d)) {
        let size = [o, panel.end - panel.start];
        let rows = factor.triangle.tail_of(panel.clone())?;
        let mut place = block(weight, 0..o, panel.clone())?;
        let mut values = to_vec(&place)?;
        let upper = to_vec(&rows.f_narrow(1, 0, size[1])?)?;
        let mut error = vec![0.0; values.len()];
        let mut marks = vec![false; values.len()];
        let columns = size[1] as usize;
        if ratio.is_none() {
            let diagonal: Vec<f32> = upper.iter().step_by(columns + 1).copied().collect();
            mark_smallest(&scores(&values, &diagonal), quota.next(values.len()), &mut marks);
        }
        loss += sweep(Block { weight: &mut values, error: &mut error, pruned: &mut marks, upper: &upper, columns }, ratio);

        place.f_copy_(&Tensor::f_from_slice(&values)?.f_reshape(size)?)?;
        block(pruned, 0..o, panel.clone())?.f_copy_(&Tensor::f_from_slice(&marks)?.f_reshape(size)?)?;
        if panel.end < d {
            let error = Tensor::f_from_slice(&error)?.f_reshape(size)?.f_to_device(weight.device())?;
            let after = rows.f_narrow(1, size[1], d - panel.end)?;
            add_product(&block(weight, 0..o, panel.end..d)?, &error, &after)?;
        }
    }
    Ok(loss)
}

/// The same by tensor operations, without a way to the host: for weights on a GPU. `ratio` and the columns of a block in one.
fn prune_on_device(
    weight: &Tensor,
    pruned: &Tensor,
    factor: &InverseFactor,
    (ratio, columns): (Option<(usize, usize)>, usize),
    quota: &mut Quota,
) -> Result<f64> {
    let (o, d) = weight.size2()?;
    let mut loss = Tensor::f_zeros([], (Kind::Double, weight.device()))?;
    for panel in panels(d, i64::try_from(columns).unwrap_or(d)) {
        let width = panel.end - panel.start;
        let rows = factor.triangle.tail_of(panel.clone())?;
        let upper = rows.f_narrow(1, 0, width)?;
        let (own, mut marks) = (block(weight, 0..o, panel.clone())?, block(pruned, 0..o, panel.clone())?);
        if ratio.is_none() {
            marks.f_copy_(&device_sweep::smallest(&own, &upper, quota.next((o * width) as usize))?)?;
        }
        let error = device_sweep::sweep(&own, &upper, &marks, ratio)?;
        let _ = loss.f_add_(&error.f_square()?.f_sum(Kind::Double)?)?;
        if panel.end < d {
            add_product(&block(weight, 0..o, panel.end..d)?, &error, &rows.f_narrow(1, width, d - panel.end)?)?;
        }
    }
    Ok(loss.f_double_value(&[])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_sweep_equals_the_hosts() {
        tch::manual_seed(5);
        let cpu = (Kind::Float, Device::Cpu);
        let inputs = Tensor::randn([900, 300], cpu).matmul(&Tensor::randn([300, 300], cpu));
        let mut hessian = Hessian::new(300, Device::Cpu).unwrap();
        hessian.add(&inputs).unwrap();
        let factor = InverseFactor::new(&hessian, 0, 0.01).unwrap();
        let original = Tensor::randn([70, 300], cpu);
        for (ratio, columns) in [(None, 128), (None, 37), (Some((2, 4)), 128), (Some((1, 3)), 126)] {
            let sparsity = ratio.map_or(Sparsity::Unstructured(0.4), |(n, m)| Sparsity::NM { n, m });
            let options = PruneOptions { sparsity, block: columns, ..PruneOptions::default() };
            let run = |on_device: bool| {
                let (weight, pruned) = (original.copy(), Tensor::zeros([70, 300], (Kind::Bool, Device::Cpu)));
                let mut quota = Quota::new(0.4, true);
                let loss = if on_device {
                    prune_on_device(&weight, &pruned, &factor, (ratio, columns), &mut quota)
                } else {
                    prune_rows(&weight, &pruned, &factor, &options, &mut quota)
                };
                (weight, pruned, loss.unwrap())
            };
            let (device, host) = (run(true), run(false));
            assert_eq!(device.1, host.1, "{ratio:?} {columns}: another mask");
            let off = ((&device.0 - &host.0).norm() / host.0.norm()).double_value(&[]);
            assert!(off < 1e-5 && (device.2 / host.2 - 1.0).abs() < 1e-5, "{ratio:?} {columns}: {off:.1e}");
        }
    }
}
