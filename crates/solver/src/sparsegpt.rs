//! SparseGPT: prunes weights, and adjusts the kept ones to compensate.

use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{NmRatio, PruneOptions, Sparsity};
use squeeze_numerics::product::add_product;
use squeeze_numerics::sum::{self, sum_kind};
use tch::{Device, Kind, Tensor};

use super::factor::inverse;
use super::kernels::{self, Kernels};
use super::matrix::{block, copy, numbers_mut, panels, to_vec};
use super::sparsity::{Quota, mark_smallest};
use super::sweep::{Block, LANES, score, sweep};
use super::weight::flat_for;
use super::{Factor, Hessian, Note, device_sweep};

/// A weight pruned by [`prune`].
#[derive(Debug)]
pub struct Pruned {
    /// [o, d] fp32 on the weight's device, exactly zero where pruned.
    pub weight: Tensor,
    /// [o, d] bool on the weight's device, true where kept.
    pub mask: Tensor,
    /// The share of elements that the mask prunes.
    pub sparsity: f64,
    /// tr((W - W0) H (W - W0)^T), which is [`output_energy`](super::output_energy) of the change.
    /// It is a by-product of the sweep.
    pub loss: f64,
    /// Notes for the user.
    pub notes: Vec<Note>,
}

/// Prunes `weight` [o, ...], flattened to [o, d], as coremltools 9.0 does with
/// `weight_dtype="float32"` (`SparseGPT._compress_impl` in
/// `optimize/torch/layerwise_compression/algorithms.py`).
///
/// Columns are processed in blocks. In a block, the elements with the smallest w^2 / U_jj^2 are
/// masked, over all rows at once. Each masked element becomes zero, and its error is fed back to
/// the columns after it: e U_j with e = w / U_jj. For n:m sparsity the mask is chosen row by row,
/// at every m-th column. Rows that are pruned together have one mask, chosen by the sum of their
/// scores. U is the inverse of the [`Factor`] R, of which only blocks on the diagonal
/// are computed. Updates are lazy: with D the change of all earlier columns, a block starts at w +
/// (D R) U. The rows of a convolution of several groups are pruned group by group, each with its
/// own H; the sparsity is met over all groups.
///
/// It differs from coremltools only where coremltools gives a wrong result or fails: a target of
/// zero prunes nothing (coremltools prunes one element per block); many equal scores are not all
/// pruned at once; m need not divide the block or the columns (the remaining columns stay dense,
/// with a note); a Hessian without a Cholesky factor gets more dampening.
///
/// On a CPU the result does not depend on the number of rayon threads. If the Hessian is on a GPU,
/// the whole computation is done there.
///
/// # Errors
/// [`Error::Argument`] for options out of range, a weight that does not fit the Hessian, or a
/// Hessian without inputs; [`Error::NotFinite`] for NaN; [`Error::NotPositiveDefinite`] if no
/// dampening helps.
pub fn prune(weight: &Tensor, hessian: &Hessian, options: &PruneOptions) -> Result<Pruned> {
    options.sparsity.check()?;
    let factors =
        if options.sparsity == Sparsity::Unstructured(0.0) { Vec::new() } else { Factor::all(hessian, options.dampening)? };
    prune_with(weight, hessian, &factors, options)
}

/// [`prune`] with factors already computed by [`Factor::all`], for layers that share a Hessian.
///
/// # Errors
/// As [`prune`]; [`Error::Shape`] if the number of factors is not that of the groups.
pub fn prune_with(weight: &Tensor, hessian: &Hessian, factors: &[Factor], options: &PruneOptions) -> Result<Pruned> {
    let _span = tracing::debug_span!("prune").entered();
    options.sparsity.check()?;
    if options.block == 0 {
        return Err(Error::range("the number of columns in a processing group", 0, "at least 1"));
    }
    let original = flat_for(weight, hessian)?;
    let (o, d) = original.size2()?;
    check_rows_together(o / hessian.groups(), options.rows_together)?;
    // Without pruning the new weight is a copy; otherwise it is filled block by block.
    let new = if options.sparsity == Sparsity::Unstructured(0.0) { copy(&original)? } else { original.f_zeros_like()? };
    let pruned = Tensor::f_zeros([o, d], (Kind::Bool, original.device()))?;
    let mut notes = Vec::new();
    let mut loss = 0.0;
    if options.sparsity != Sparsity::Unstructured(0.0) {
        if factors.len() as i64 != hessian.groups() {
            return Err(Error::shape(
                "the list of factors",
                [factors.len() as i64],
                format!("[{}], one for each group,", hessian.groups()),
            ));
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

    Pruned::new(weight, &new, &pruned, loss, notes, options)
}

/// [`prune_with`] for layers of one shape [o, ...], each with its own Hessian of one group and its
/// factor. The layers are pruned one after the other, so that the result does not depend on the
/// number of layers. Only on a GPU without kernels they are swept in one batch, in which each
/// launched operation has more work.
///
/// # Errors
/// As [`prune_with`]; [`Error::State`] if shapes differ.
pub fn prune_many(layers: &[(&Tensor, &Hessian, &Factor)], options: &PruneOptions) -> Result<Vec<Pruned>> {
    let needs_batches =
        layers.iter().all(|(_, hessian, _)| hessian.device() != Device::Cpu && Kernels::of(hessian.device()).is_none());
    if !needs_batches || options.sparsity == Sparsity::Unstructured(0.0) {
        let one = |(weight, hessian, factor): &(&Tensor, &Hessian, &Factor)| {
            prune_with(weight, hessian, std::slice::from_ref(factor), options)
        };
        return layers.iter().map(one).collect();
    }
    prune_batch(layers, options)
}

/// [`prune_many`] by tensor operations.
fn prune_batch(layers: &[(&Tensor, &Hessian, &Factor)], options: &PruneOptions) -> Result<Vec<Pruned>> {
    let _span = tracing::debug_span!("prune").entered();
    options.sparsity.check()?;
    let originals = layers.iter().map(|(weight, hessian, _)| flat_for(weight, hessian)).collect::<Result<Vec<_>>>()?;
    for original in &originals {
        check_rows_together(original.size2()?.0, options.rows_together)?;
    }
    if options.block == 0 || layers.iter().any(|(_, hessian, _)| hessian.groups() != 1) {
        return Err(Error::Argument("a batch takes layers of one group, and blocks of at least one column".into()));
    }
    if originals.windows(2).any(|pair| pair[0].size() != pair[1].size()) {
        return Err(Error::State("a batch takes layers of one shape".into()));
    }
    if originals.is_empty() {
        return Ok(Vec::new());
    }
    let originals = Tensor::f_stack(&originals, 0)?;
    let (new, pruned) = (originals.f_zeros_like()?, originals.f_zeros_like()?.f_to_kind(Kind::Bool)?);
    let factors: Vec<&Factor> = layers.iter().map(|(_, _, factor)| *factor).collect();
    let mut quota = Quota::new(options.sparsity.share(originals.size3()?.2 as usize), true);
    let losses = prune_on_device((&originals, &new, &pruned), &factors, Blocks::of(options), &mut quota)?;
    let losses = sum::numbers(&losses)?;
    let mut all = Vec::with_capacity(layers.len());
    for (index, (loss, (weight, hessian, factor))) in (0..).zip(losses.into_iter().zip(layers)) {
        let mut notes = Vec::new();
        find_notes(hessian, std::slice::from_ref(*factor), options, &mut notes);
        all.push(Pruned::new(weight, &new.f_get(index)?, &pruned.f_get(index)?, loss, notes, options)?);
    }
    Ok(all)
}

impl Pruned {
    /// The result for `weight`, from its new values and the pruned elements, [o, d] each.
    fn new(
        weight: &Tensor,
        new: &Tensor,
        gone: &Tensor,
        loss: f64,
        mut notes: Vec<Note>,
        options: &PruneOptions,
    ) -> Result<Self> {
        let (o, d) = new.size2()?;
        let reached = gone.f_sum(Kind::Int64)?.f_int64_value(&[])? as f64 / (o * d) as f64;
        let asked = options.sparsity.share(d as usize);
        if (reached - asked).abs() > 0.001 {
            notes.push(Note::SparsityOff { asked, reached });
        }
        Ok(Pruned {
            loss: loss.max(0.0),
            weight: new.f_to_device(weight.device())?,
            mask: gone.f_logical_not()?.f_to_device(weight.device())?,
            sparsity: reached,
            notes,
        })
    }
}

/// Checks that the rows of a group can be pruned so many at a time: a tile of the sweep has whole
/// vectors.
fn check_rows_together(rows: i64, rows_together: usize) -> Result<()> {
    if rows_together == 0 || !LANES.is_multiple_of(rows_together) {
        return Err(Error::range("the number of rows that are pruned together", rows_together, "1, 2, 4, 8 or 16"));
    }
    if rows % rows_together as i64 != 0 {
        return Err(Error::Argument(format!("{rows} output channels cannot be pruned {rows_together} at a time")));
    }
    Ok(())
}

/// Collects the notes about the Hessian, its factors and the pattern of zeros.
fn find_notes(hessian: &Hessian, factors: &[Factor], options: &PruneOptions, notes: &mut Vec<Note>) {
    notes.extend(notes_about(hessian, factors, options.dampening));
    let d = hessian.dimension();
    if let Sparsity::NOfM(NmRatio { m, .. }) = options.sparsity
        && !(d as usize).is_multiple_of(m)
    {
        notes.push(Note::IncompleteGroup { columns: (d as usize % m) as u64, m: m as u64 });
    }
}

/// The notes about a Hessian and its factors, for which this dampening was asked.
pub(super) fn notes_about(hessian: &Hessian, factors: &[Factor], dampening: f64) -> Vec<Note> {
    let mut notes = Vec::new();
    let d = hessian.dimension();
    let dead: u64 = factors.iter().map(|factor| factor.dead_columns).sum();
    let used = factors.iter().map(|factor| factor.dampening).fold(dampening, f64::max);
    if hessian.vectors() < d.unsigned_abs() {
        notes.push(Note::FewVectors { vectors: hessian.vectors(), dimension: d.unsigned_abs() });
    }
    if dead > 0 {
        notes.push(Note::DeadColumns { count: dead, of: (hessian.groups() * d).unsigned_abs() });
    }
    if used > dampening {
        notes.push(Note::MoreDampening { asked: dampening, used });
    }
    notes
}

/// How a mask is chosen.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    /// n and m of n:m sparsity, if requested.
    ratio: Option<(usize, usize)>,
    /// The number of columns of a block.
    columns: usize,
    /// The number of rows that are pruned together.
    rows_together: usize,
}

impl Blocks {
    fn of(options: &PruneOptions) -> Self {
        let (ratio, columns) = match options.sparsity {
            Sparsity::Unstructured(_) => (None, options.block),
            Sparsity::NOfM(NmRatio { n, m }) => (Some((n, m)), (options.block / m).max(1).saturating_mul(m)),
        };
        Blocks { ratio, columns, rows_together: options.rows_together }
    }
}

/// Prunes rows that share a factor: `original` [o, d] into `new`, which is zeros, and `pruned`.
/// Returns the loss, without that of dead columns.
fn prune_rows(
    original: &Tensor,
    new: &Tensor,
    pruned: &Tensor,
    factor: &Factor,
    options: &PruneOptions,
    quota: &mut Quota,
) -> Result<f64> {
    if original.device() == Device::Cpu {
        return prune_on_host((original, new, pruned), factor, Blocks::of(options), quota);
    }
    let one = |tensor: &Tensor| tensor.f_unsqueeze(0);
    let matrices = (&one(original)?, &one(new)?, &one(pruned)?);
    Ok(prune_on_device(matrices, &[factor], Blocks::of(options), quota)?.f_double_value(&[0])?)
}

/// [`prune_rows`] on the CPU, with rows in SIMD lanes.
fn prune_on_host(
    (original, new, pruned): (&Tensor, &Tensor, &Tensor),
    factor: &Factor,
    blocks: Blocks,
    quota: &mut Quota,
) -> Result<f64> {
    let Blocks { ratio, columns, rows_together } = blocks;
    let (o, d) = original.size2()?;
    let mut loss = 0.0;
    for panel in panels(d, columns.min(d as usize) as i64) {
        let width = panel.end - panel.start;
        let rows = factor.triangle.tail_of(panel.clone())?;
        let upper = inverse(&rows.f_narrow(1, 0, width)?)?;
        // A block of `new` that is not yet processed holds D R of the blocks before.
        let mut place = block(new, 0..o, panel.clone())?;
        let mut before = block(original, 0..o, panel.clone())?;
        if factor.dead_columns > 0 {
            before = before.f_masked_fill(&factor.dead.f_narrow(0, panel.start, width)?, 0.0)?;
        }
        let mut weight = copy(&before)?;
        add_product(&weight, &place, &upper)?;
        let count = ratio.is_none().then(|| quota.next((o * width) as usize / rows_together));
        let (marks, squares) = host_block(&mut weight, &upper, blocks, count)?;
        place.f_copy_(&weight)?;
        let change = before.f_sub(&weight)?;
        // The sweep returns the loss under the damped Hessian: the dampening's part is subtracted.
        loss += squares - factor.added * sum::squares(&change)?;
        block(pruned, 0..o, panel.clone())?.f_copy_(&marks)?;
        if panel.end < d {
            add_product(&block(new, 0..o, panel.end..d)?, &change, &rows.f_narrow(1, width, d - panel.end)?)?;
        }
    }
    Ok(loss)
}

/// Sweeps a block [o, b] in place, with U [b, b] of its columns. `count` is the number of elements
/// to prune, or of vectors of rows that are pruned together; `None` for n:m. Returns the mask of
/// pruned elements and the sum of the squared errors.
fn host_block(weight: &mut Tensor, upper: &Tensor, blocks: Blocks, count: Option<usize>) -> Result<(Tensor, f64)> {
    let Blocks { ratio, rows_together, .. } = blocks;
    let size = weight.size();
    let upper = to_vec(upper)?;
    let values = numbers_mut(weight)?;
    let columns = upper.len().isqrt();
    let mut marks = vec![false; values.len()];
    if let Some(count) = count {
        let diagonal: Vec<f32> = upper.iter().step_by(columns + 1).copied().collect();
        let mut scores = vec![0.0; values.len() / rows_together];
        let rows = scores.par_chunks_mut(columns).zip(values.par_chunks(rows_together * columns)).with_min_len(64);
        rows.for_each(|(scores, values)| {
            for values in values.chunks(columns) {
                let pairs = values.iter().zip(&diagonal);
                scores.iter_mut().zip(pairs).for_each(|(cost, (weight, upper))| *cost += score(*weight, *upper));
            }
        });
        let mut of_vectors = vec![false; scores.len()];
        mark_smallest(&scores, count, &mut of_vectors);
        let rows = marks.chunks_mut(rows_together * columns).zip(of_vectors.chunks(columns));
        rows.for_each(|(marks, of_vectors)| marks.chunks_mut(columns).for_each(|marks| marks.copy_from_slice(of_vectors)));
    }
    let squares = sweep(Block { weight: values, pruned: &mut marks, upper: &upper, columns, rows_together }, ratio);
    Ok((Tensor::f_from_slice(&marks)?.f_view(size.as_slice())?, squares))
}

/// [`prune_on_host`] by tensor operations, for weights on a GPU: for several layers at once, [l, o,
/// d], and without transfers to the host. Returns the loss of each layer, on the device.
fn prune_on_device(
    (original, new, pruned): (&Tensor, &Tensor, &Tensor),
    factors: &[&Factor],
    blocks: Blocks,
    quota: &mut Quota,
) -> Result<Tensor> {
    let Blocks { ratio, columns, rows_together } = blocks;
    let (layers, o, d) = original.size3()?;
    let device = original.device();
    let of_each = |part: &dyn Fn(&Factor) -> Result<Tensor>| -> Result<Tensor> {
        Ok(Tensor::f_stack(&factors.iter().map(|factor| part(factor)).collect::<Result<Vec<_>>>()?, 0)?)
    };
    let dead = of_each(&|factor| Ok(factor.dead.shallow_clone()))?.f_unsqueeze(1)?;
    let added: Vec<f64> = factors.iter().map(|factor| factor.added).collect();
    let sums = sum_kind(device);
    let added = Tensor::f_from_slice(&added)?.f_to_kind(sums)?.f_to_device(device)?;
    // The kernels choose n:m within 32 neighbouring columns, for each row alone.
    let is_taken = ratio.is_none_or(|(_, m)| kernels::takes_groups_of(m) && rows_together == 1);
    let kernels = Kernels::of(device).filter(|_| is_taken);
    let mut loss = Tensor::f_zeros([layers], (sums, device))?;
    let energies = |tensor: &Tensor| tensor.f_square()?.f_sum_dim_intlist([1_i64, 2].as_slice(), false, sums);
    for panel in panels(d, columns.min(d as usize) as i64) {
        let (width, rest) = (panel.end - panel.start, d - panel.end);
        let rows = of_each(&|factor| factor.triangle.tail_of(panel.clone()))?;
        let unit = Tensor::f_eye(width, (Kind::Float, device))?.f_expand([layers, width, width], false)?;
        let upper = rows.f_narrow(2, 0, width)?.f_linalg_solve_triangular(&unit, true, true, false)?;
        let mut place = new.f_narrow(2, panel.start, width)?;
        let before = original.f_narrow(2, panel.start, width)?.f_masked_fill(&dead.f_narrow(2, panel.start, width)?, 0.0)?;
        let weight = before.f_baddbmm(&place, &upper, 1, 1)?;
        let marks = match ratio {
            Some(_) => weight.f_zeros_like()?.f_to_kind(Kind::Bool)?,
            None => device_sweep::smallest(&weight, &upper, quota.next((o * width) as usize / rows_together), rows_together)?,
        };
        let squares = match kernels.as_deref().filter(|_| width <= kernels::MOST_COLUMNS) {
            Some(kernels) => device_sweep::sweep_by_kernel(kernels, &weight, &upper, &marks, ratio)?,
            None => energies(&device_sweep::sweep(&weight, &upper, &marks, ratio, rows_together)?)?,
        };
        place.f_copy_(&weight)?;
        let change = before.f_sub(&weight)?;
        let _ = loss.f_add_(&squares)?.f_sub_(&energies(&change)?.f_mul(&added)?)?;
        pruned.f_narrow(2, panel.start, width)?.f_copy_(&marks)?;
        if rest > 0 {
            let _ = new.f_narrow(2, panel.end, rest)?.f_baddbmm_(&change, &rows.f_narrow(2, width, rest)?)?;
        }
    }
    Ok(loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: [i64; 2], seed: u64) -> Tensor {
        squeeze_numerics::random::noise(&size, seed, Kind::Float).unwrap()
    }

    /// The batched solver of GPUs, run on the CPU, equals the solver of single layers.
    #[test]
    fn the_device_sweep_equals_the_hosts() {
        let inputs: Vec<Tensor> = (0..3).map(|at| random([900, 300], at).matmul(&random([300, 300], at + 10))).collect();
        // One of them has inputs that are always zero.
        let _ = inputs[1].narrow(1, 7, 2).zero_();
        let hessians = inputs.iter().map(|inputs| {
            let mut hessian = Hessian::new(300, Device::Cpu).unwrap();
            hessian.add(inputs).unwrap();
            hessian
        });
        let hessians: Vec<Hessian> = hessians.collect();
        let factors: Vec<Factor> = hessians.iter().map(|hessian| Factor::new(hessian, 0, 0.01).unwrap()).collect();
        let weights: Vec<Tensor> = (0..3).map(|at| random([70, 300], at + 20)).collect();
        let layers: Vec<_> = (0..3).map(|at| (&weights[at], &hessians[at], &factors[at])).collect();
        for (ratio, block, rows_together) in [
            (None, 128, 1),
            (None, 37, 1),
            (None, 128, 2),
            (Some((2, 4)), 128, 1),
            (Some((1, 3)), 126, 1),
            (Some((2, 4)), 128, 2),
        ] {
            let sparsity = ratio.map_or(Sparsity::Unstructured(0.4), |(n, m)| Sparsity::NOfM(NmRatio { n, m }));
            let options = PruneOptions { sparsity, block, rows_together, ..PruneOptions::default() };
            let batch = prune_batch(&layers, &options).unwrap();
            for (device, host) in batch.iter().zip(prune_many(&layers, &options).unwrap()) {
                assert_eq!(device.mask, host.mask, "{ratio:?} {block}: another mask");
                assert_eq!((device.sparsity, &device.notes), (host.sparsity, &host.notes));
                let off = ((&device.weight - &host.weight).norm() / host.weight.norm()).double_value(&[]);
                assert!(off < 1e-5 && (device.loss / host.loss - 1.0).abs() < 1e-5, "{ratio:?} {block}: {off:.1e}");
                let vectors = host.mask.reshape([-1, rows_together as i64, 300]);
                assert_eq!(vectors, vectors.narrow(1, 0, 1).expand_as(&vectors), "a part of a vector is pruned");
                assert!((host.sparsity - sparsity.share(300)).abs() < 0.02);
            }
        }
        let (other, wide) = (random([71, 300], 30), random([70, 301], 31));
        for weight in [&other, &wide] {
            assert!(prune_batch(&[layers[0], (weight, &hessians[1], &factors[1])], &half()).is_err());
        }
        assert!(prune_batch(&[], &half()).unwrap().is_empty());
    }

    fn half() -> PruneOptions {
        PruneOptions::default()
    }
}
