//! The part of SparseGPT that goes column by column: prunes a column, and feeds its errors back to
//! the columns after it.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// The number of rows that are swept together, one in each SIMD lane. Rows are independent.
pub(super) const LANES: usize = 16;

/// The number of columns whose errors are fed back together, while the columns after them are in
/// registers.
const STRIP: usize = 8;

/// One element of each row of a tile.
type Lanes = [f32; LANES];

/// One block of b columns of a weight, row-major [o, b] each.
pub(super) struct Block<'a> {
    /// The weights, which become the pruned ones.
    pub weight: &'a mut [f32],
    /// Which elements are pruned; filled here for n:m, given otherwise.
    pub pruned: &'a mut [bool],
    /// U [b, b] of these columns: the inverse of R's block.
    pub upper: &'a [f32],
    /// b.
    pub columns: usize,
    /// The number of neighbouring rows with one mask; it divides [`LANES`] and o.
    pub rows_together: usize,
}

/// Sweeps over the columns of a block: a pruned weight w_j goes to zero, and with e = w_j / U_jj
/// the columns after it become w_k - e U_jk.
///
/// With `ratio` (n, m) the mask is chosen during the sweep: at every m-th column, for the next m
/// columns, from the current weights (smallest w^2 / U_jj^2, the first of equals; summed over rows
/// with one mask). An incomplete
/// last group stays dense.
///
/// Returns the sum of the squared errors e, which does not depend on the number of threads.
pub(super) fn sweep(block: Block<'_>, ratio: Option<(usize, usize)>) -> f64 {
    let Block { weight, pruned, upper, columns, rows_together } = block;
    let ratio = ratio.map(|(n, m)| Ratio { n, m, rows_together });
    let arch = Arch::new();
    let tiles = weight.par_chunks_mut(LANES * columns).zip(pruned.par_chunks_mut(LANES * columns));
    let squares = tiles
        .map_init(|| Tile::new(columns), |tile, (weight, pruned)| arch.dispatch(Task { tile, weight, pruned, upper, ratio }));
    squares.collect::<Vec<f64>>().iter().sum()
}

/// The cost of pruning a weight, up to a factor: w^2 / U_jj^2.
pub(super) fn score(weight: f32, upper: f32) -> f32 {
    weight * weight / (upper * upper)
}

/// One tile to be swept.
struct Task<'a> {
    tile: &'a mut Tile,
    weight: &'a mut [f32],
    pruned: &'a mut [bool],
    upper: &'a [f32],
    ratio: Option<Ratio>,
}

/// n:m for rows with one mask.
#[derive(Clone, Copy)]
struct Ratio {
    n: usize,
    m: usize,
    rows_together: usize,
}

impl WithSimd for Task<'_> {
    type Output = f64;

    // Inlined with all functions that it calls, so that they are compiled for the SIMD instructions
    // that `dispatch` selects.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        self.tile.sweep(simd, self.weight, self.pruned, self.upper, self.ratio)
    }
}

/// A thread's working memory.
struct Tile {
    /// The weights, column by column.
    weight: Vec<Lanes>,
    /// 1 where pruned, else 0.
    pruned: Vec<Lanes>,
    /// The error vectors of the current strip.
    errors: Vec<Lanes>,
    /// The columns of an n:m group, sorted by the cost of pruning.
    order: Vec<(f32, usize)>,
}

impl Tile {
    fn new(columns: usize) -> Self {
        let zeros = vec![[0.0; LANES]; columns];
        Tile { weight: zeros.clone(), pruned: zeros, errors: Vec::new(), order: Vec::new() }
    }

    /// Up to [`LANES`] rows of a block.
    #[inline(always)]
    fn sweep<S: Simd>(&mut self, simd: S, weight: &mut [f32], pruned: &mut [bool], upper: &[f32], ratio: Option<Ratio>) -> f64 {
        let columns = self.weight.len();
        let rows = weight.len() / columns;
        for (row, (weight, pruned)) in weight.chunks(columns).zip(pruned.chunks(columns)).enumerate() {
            self.weight.iter_mut().zip(weight).for_each(|(lanes, weight)| lanes[row] = *weight);
            self.pruned.iter_mut().zip(pruned).for_each(|(lanes, pruned)| lanes[row] = f32::from(u8::from(*pruned)));
        }
        // In a tile of fewer rows the other lanes prune nothing.
        self.pruned.iter_mut().for_each(|pruned| pruned[rows..].fill(0.0));
        let strip = ratio.map_or(STRIP, |Ratio { m, .. }| m * STRIP.div_ceil(m));
        let mut squares = [0.0; LANES];
        for start in (0..columns).step_by(strip) {
            let end = columns.min(start + strip);
            self.errors.clear();
            for column in start..end {
                if let Some(ratio) = ratio
                    && column.is_multiple_of(ratio.m)
                    && column + ratio.m <= columns
                {
                    self.choose(ratio, column, rows, upper);
                }
                self.prune(simd, column, end, &upper[column * columns..][..columns], &mut squares);
            }
            pass_on(simd, &self.errors, &mut self.weight[end..], &upper[start * columns..end * columns]);
        }
        for (row, (weight, pruned)) in weight.chunks_mut(columns).zip(pruned.chunks_mut(columns)).enumerate() {
            self.weight.iter().zip(weight).for_each(|(lanes, weight)| *weight = lanes[row]);
            if ratio.is_some() {
                self.pruned.iter().zip(pruned).for_each(|(lanes, pruned)| *pruned = lanes[row] > 0.0);
            }
        }
        squares.iter().sum()
    }

    /// Prunes one column, and updates the columns before `end`. `upper` is the column's row of U.
    #[inline(always)]
    fn prune<S: Simd>(&mut self, simd: S, column: usize, end: usize, upper: &[f32], squares: &mut [f64; LANES]) {
        let weight = &mut self.weight[column];
        let mut error = [0.0; LANES];
        for (lane, pruned) in self.pruned[column].iter().enumerate() {
            error[lane] = -pruned * weight[lane] / upper[column];
            weight[lane] = if *pruned > 0.0 { 0.0 } else { weight[lane] };
            squares[lane] += f64::from(error[lane]) * f64::from(error[lane]);
        }
        pass_on(simd, &[error], &mut self.weight[column + 1..end], &upper[..end]);
        self.errors.push(error);
    }

    /// Marks the n of the group from `column` on with the smallest w^2 / U_jj^2, in each of the
    /// first `rows` lanes.
    fn choose(&mut self, ratio: Ratio, column: usize, rows: usize, upper: &[f32]) {
        let Ratio { n, m, rows_together } = ratio;
        let columns = self.weight.len();
        for lane in (0..rows).step_by(rows_together) {
            let lanes = lane..lane + rows_together;
            let score = |column: usize| {
                let scores =
                    self.weight[column][lanes.clone()].iter().map(|weight| score(*weight, upper[column * (columns + 1)]));
                (scores.sum::<f32>(), column)
            };
            self.order.clear();
            self.order.extend((column..column + m).map(score));
            self.order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for (rank, (_, column)) in self.order.iter().enumerate() {
                self.pruned[*column][lanes.clone()].fill(if rank < n { 1.0 } else { 0.0 });
            }
        }
    }
}

/// Adds the `errors` of a strip of columns times their rows of U (`upper`) to the columns `after`
/// the strip, which are the last columns of these rows.
#[inline(always)]
fn pass_on<S: Simd>(simd: S, errors: &[Lanes], after: &mut [Lanes], upper: &[f32]) {
    let columns = upper.len() / errors.len().max(1);
    let first = columns - after.len();
    let (fours, rest) = after.as_chunks_mut::<4>();
    let ones = first + 4 * fours.len();
    for (at, four) in fours.iter_mut().enumerate() {
        add(simd, errors, four, upper, columns, first + 4 * at);
    }
    for (at, one) in rest.iter_mut().enumerate() {
        add(simd, errors, std::array::from_mut(one), upper, columns, ones + at);
    }
}

/// [`pass_on`] to N columns, from `column` on, in registers.
#[inline(always)]
fn add<S: Simd, const N: usize>(simd: S, errors: &[Lanes], after: &mut [Lanes; N], upper: &[f32], columns: usize, column: usize) {
    for part in 0..LANES / S::F32_LANES {
        let mut sums = [simd.splat_f32s(0.0); N];
        for (sum, after) in sums.iter_mut().zip(&*after) {
            *sum = S::as_simd_f32s(after).0[part];
        }
        for (error, upper) in errors.iter().zip(upper.chunks_exact(columns)) {
            let error = S::as_simd_f32s(error).0[part];
            for (sum, upper) in sums.iter_mut().zip(&upper[column..column + N]) {
                *sum = simd.mul_add_e_f32s(error, simd.splat_f32s(*upper), *sum);
            }
        }
        for (sum, after) in sums.iter().zip(&mut *after) {
            S::as_mut_simd_f32s(after).0[part] = *sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number from -1 to 1 for each seed.
    fn number(seed: usize) -> f32 {
        (seed.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 32768.0 - 1.0
    }

    /// Vectors of any width give the bits of the definition, one row at a time with fused
    /// multiply-adds: so AVX2, AVX-512 and NEON prune alike.
    #[test]
    fn the_lanes_give_the_bits_of_single_rows() {
        // Without FMA pulp multiplies and adds in two steps.
        if matches!(Arch::new(), Arch::Scalar) {
            return;
        }
        #[cfg(target_arch = "aarch64")]
        assert!(matches!(Arch::new(), Arch::Neon(_)));
        // A full tile and a part of one; strips of 8 columns and a rest.
        let (rows, columns) = (LANES + 3, 29);
        let upper: Vec<f32> =
            (0..columns * columns).map(|at| if at % (columns + 1) == 0 { 1.5 + number(at) } else { number(at + 7) }).collect();
        let original: Vec<f32> = (0..rows * columns).map(|at| number(at + 1000)).collect();
        let mut pruned: Vec<bool> = (0..rows * columns).map(|at| number(3 * at) > 0.1).collect();

        let mut expected = original.clone();
        let mut squares = 0.0;
        for (row, pruned) in expected.chunks_mut(columns).zip(pruned.chunks(columns)) {
            for column in 0..columns {
                let upper = &upper[column * columns..][..columns];
                let error = if pruned[column] { -row[column] / upper[column] } else { 0.0 };
                row[column] = if pruned[column] { 0.0 } else { row[column] };
                for after in column + 1..columns {
                    row[after] = error.mul_add(upper[after], row[after]);
                }
                squares += f64::from(error) * f64::from(error);
            }
        }

        let mut weight = original.clone();
        let block = Block { weight: &mut weight, pruned: &mut pruned, upper: &upper, columns, rows_together: 1 };
        let found = sweep(block, None);
        assert!(weight.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert!((found / squares - 1.0).abs() < 1e-12 && weight != original);
    }
}
