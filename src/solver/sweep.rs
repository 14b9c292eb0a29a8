//! The part of SparseGPT that goes column by column: prune, and let the columns after it make up for it.

use rayon::prelude::*;

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// One block of b columns of a weight, row-major [o, b] each.
pub(super) struct Block<'a> {
    /// The weights, which become the pruned ones.
    pub weight: &'a mut [f32],
    /// What each element's pruning leaves to the columns after the block: -w / U_jj, or zero where it was kept.
    pub error: &'a mut [f32],
    /// Which elements are pruned; filled here for n:m, given otherwise.
    pub pruned: &'a mut [bool],
    /// U [b, b] of these columns.
    pub upper: &'a [f32],
    /// b.
    pub columns: usize,
}

/// Sweeps over the columns of a block, all rows at once: rows do not see each other.
///
/// With `ratio` (n, m) the mask is chosen on the way, at every m-th column from the weights as they are by then (smallest
/// w^2 / U_jj^2, the first of equals); m must divide the block but for a rest, which stays dense.
///
/// Gives the sum of the squared errors.
pub(super) fn sweep(block: Block<'_>, ratio: Option<(usize, usize)>) -> f64 {
    let Block { weight, error, pruned, upper, columns } = block;
    let diagonal: Vec<f32> = upper.iter().step_by(columns + 1).copied().collect();
    let rows = weight.par_chunks_mut(columns).zip(error.par_chunks_mut(columns)).zip(pruned.par_chunks_mut(columns));
    let row = |order: &mut Vec<(f32, usize)>, ((weight, error), pruned): ((&mut [f32], &mut [f32]), &mut [bool])| {
        let mut squares = 0.0;
        for column in 0..columns {
            if let Some((n, m)) = ratio
                && column.is_multiple_of(m)
                && column + m <= columns
            {
                let group = column..column + m;
                pick(n, &weight[group.clone()], &diagonal[group.clone()], &mut pruned[group], order);
            }
            if pruned[column] {
                let (done, rest) = weight.split_at_mut(column + 1);
                let scaled = done[column] / diagonal[column];
                done[column] = 0.0;
                error[column] = -scaled;
                squares += f64::from(scaled) * f64::from(scaled);
                for (weight, upper) in rest.iter_mut().zip(&upper[column * columns + column + 1..]) {
                    *weight -= scaled * upper;
                }
            } else {
                error[column] = 0.0;
            }
        }
        squares
    };
    // Row by row, then in order: the same sum on any number of threads.
    let squares: Vec<f64> = rows.with_min_len(ROWS).map_init(Vec::new, row).collect();
    squares.iter().sum()
}

/// Marks the n of a group with the smallest w^2 / U_jj^2.
fn pick(n: usize, weight: &[f32], diagonal: &[f32], pruned: &mut [bool], order: &mut Vec<(f32, usize)>) {
    order.clear();
    order.extend(weight.iter().zip(diagonal).enumerate().map(|(column, (weight, upper))| (score(*weight, *upper), column)));
    order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    pruned.fill(false);
    for (_, column) in order.iter().take(n) {
        pruned[*column] = true;
    }
}

/// What pruning each weight of a block [o, b] costs, but for a factor.
pub(super) fn scores(weight: &[f32], diagonal: &[f32]) -> Vec<f32> {
    let rows = weight.par_chunks(diagonal.len()).with_min_len(ROWS);
    rows.flat_map_iter(|row| row.iter().zip(diagonal).map(|(weight, upper)| score(*weight, *upper))).collect()
}

/// What pruning a weight costs, but for a factor: w^2 / U_jj^2.
fn score(weight: f32, upper: f32) -> f32 {
    weight * weight / (upper * upper)
}
