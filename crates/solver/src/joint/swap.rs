//! Swaps pruned and kept weights: a better mask of the same size.

use std::cmp::Ordering;

use rayon::prelude::*;
use squeeze_base::error::Result;

use super::least_squares::MaskedLeastSquares;

/// The number of columns of a row per swap of the first round.
pub(super) const COLUMNS_A_SWAP: usize = 24;

/// The settings of [`swap`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Swaps {
    /// The largest number of rounds.
    pub rounds: usize,
    /// The number of steps of [`MaskedLeastSquares::descend`] after each round.
    pub steps: usize,
    /// The least share by which such a step must lower the objective for another step to follow.
    pub least_gain: f64,
    /// m of n:m, within whose groups weights are swapped.
    pub group: Option<usize>,
    /// The number of neighbouring rows with one mask.
    pub rows_together: usize,
}

/// Swaps pruned weights of high estimated gain with kept weights of low cost, refits the row, and
/// reverts rows that did not improve. No row gets worse, and each row keeps its number of kept
/// weights. A round takes one product with H, and one more for each step of the refit.
///
/// Let v_j = 1 / [H^-1]_jj, the curvature in weight j when all others compensate. Reviving a pruned
/// weight k gains about G_k^2 / v_k; pruning a kept weight j costs about w_j^2 v_j. A revived
/// weight starts at its single-coordinate optimum -G_k / H_kk. Its joint optimum -G_k / v_k
/// overshoots where many weights of correlated inputs are revived at once. Rows with one mask are
/// swapped, refitted and reverted together, by the sums of their gains, costs and objectives.
pub(super) fn swap(solve: &mut MaskedLeastSquares<'_>, settings: Swaps) -> Result<()> {
    let (d, together) = (solve.part().diagonal.len(), settings.rows_together);
    let length = together * d;
    let of_vectors = |losses: Vec<f64>| -> Vec<f64> { losses.chunks(together).map(|rows| rows.iter().sum()).collect() };
    let mut losses = of_vectors(solve.losses());
    let mut limits = vec![(d / COLUMNS_A_SWAP).max(1); losses.len()];
    for _ in 0..settings.rounds {
        let mut tried = solve.clone();
        let mut change = vec![0.0; solve.weight.len()];
        let vectors = change.par_chunks_mut(length).zip(tried.mask.par_chunks_mut(length)).zip(&limits).enumerate();
        let (weight, gradient) = (solve.weight.as_slice(), solve.gradient.as_slice());
        let (scale, conditioner) = (solve.part().scale.as_slice(), solve.part().conditioner.as_slice());
        let counts = vectors.map(|(vector, ((change, mask), limit))| {
            let span = vector * length..(vector + 1) * length;
            let rows = Rows { change, mask, weight: &weight[span.clone()], gradient: &gradient[span], scale, conditioner };
            if *limit == 0 { 0 } else { rows.swap(*limit, settings.group) }
        });
        let counts: Vec<usize> = counts.collect();
        if counts.iter().all(|count| *count == 0) {
            break;
        }
        tried.add(&change)?;
        // Sets newly pruned weights to exact zero, because w + (-w) may leave a rounding error.
        let gone = tried.weight.par_iter_mut().zip(&tried.mask);
        gone.filter(|(_, mask)| **mask == 0.0).for_each(|(weight, _)| *weight = 0.0);
        tried.descend(settings.steps, settings.least_gain)?;
        let new = of_vectors(tried.losses());
        for (vector, count) in counts.iter().enumerate() {
            if *count > 0 && new[vector] < losses[vector] {
                (vector * together..(vector + 1) * together).for_each(|row| solve.take_row(row, &tried));
                losses[vector] = new[vector];
            } else {
                // A vector that did not improve had too many swaps at once, or no profitable one.
                limits[vector] = *count / 4;
            }
        }
    }
    Ok(())
}

/// The rows with one mask, [V, d] each, and the scale v of their columns.
struct Rows<'a> {
    change: &'a mut [f32],
    mask: &'a mut [f32],
    weight: &'a [f32],
    gradient: &'a [f32],
    scale: &'a [f32],
    conditioner: &'a [f32],
}

impl Rows<'_> {
    /// Swaps up to `limit` pairs in descending order of their gain. Returns the number of swaps.
    fn swap(self, limit: usize, group: Option<usize>) -> usize {
        let d = self.scale.len();
        let mut pairs: Vec<(f32, usize, usize)> = match group {
            None => {
                let (gains, costs) = self.ranked(0..d, limit);
                gains.iter().zip(&costs).map(|(gain, cost)| (gain.0 - cost.0, gain.1, cost.1)).collect()
            }
            Some(m) => {
                let best = (0..d / m).filter_map(|at| {
                    let (gains, costs) = self.ranked(at * m..(at + 1) * m, 1);
                    let (gain, cost) = (gains.first()?, costs.first()?);
                    Some((gain.0 - cost.0, gain.1, cost.1))
                });
                best.collect()
            }
        };
        pairs.retain(|(gain, ..)| *gain > 0.0);
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        pairs.truncate(limit);
        for row in (0..self.weight.len()).step_by(d) {
            for (_, revived, pruned) in &pairs {
                self.mask[row + revived] = 1.0;
                self.change[row + revived] = -self.gradient[row + revived] * self.conditioner[*revived];
                self.mask[row + pruned] = 0.0;
                self.change[row + pruned] = -self.weight[row + pruned];
            }
        }
        pairs.len()
    }

    /// The gains of reviving pruned columns in descending order, and the costs of pruning kept
    /// columns in ascending order, at most `count` of each. Each number has its column; equal
    /// numbers are in the order of their columns.
    #[expect(clippy::type_complexity, reason = "two lists of the same kind")]
    fn ranked(&self, columns: std::ops::Range<usize>, count: usize) -> (Vec<(f32, usize)>, Vec<(f32, usize)>) {
        let (kept, pruned): (Vec<usize>, Vec<usize>) =
            columns.filter(|at| self.scale[*at] > 0.0).partition(|at| self.mask[*at] > 0.0);
        let squares =
            |values: &[f32], at: usize| values.iter().skip(at).step_by(self.scale.len()).map(|value| value.powi(2)).sum::<f32>();
        let mut gains: Vec<_> = pruned.into_iter().map(|at| (squares(self.gradient, at) / self.scale[at], at)).collect();
        let mut costs: Vec<_> = kept.into_iter().map(|at| (squares(self.weight, at) * self.scale[at], at)).collect();
        first(&mut gains, count, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        first(&mut costs, count, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        (gains, costs)
    }
}

/// Keeps the first `count` elements in the order `order`, sorted.
fn first<T>(list: &mut Vec<T>, count: usize, order: impl Fn(&T, &T) -> Ordering) {
    if count < list.len() {
        let _ = list.select_nth_unstable_by(count, &order);
        list.truncate(count);
    }
    list.sort_unstable_by(order);
}
