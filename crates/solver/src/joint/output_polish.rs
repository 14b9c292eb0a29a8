//! Coordinate descent over the indices by the effect of errors on the network's output.
//!
//! [`polish`](super::polish) lowers tr(D H D^T), in which errors of different output channels count
//! alike and apart from each other. Here the objective is tr(M D H D^T), with the metric M of the
//! layer's outputs: errors are moved to where the network does not notice them.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use squeeze_base::error::Result;
use tch::Tensor;

use super::super::matrix::to_vec;
use super::polish::{Columns, PASSES, Piece, block_by_block};
use super::problem::{Data, Problem, ROWS, dots};
use super::sorted_codebook::{Entries, SortedCodebook, Tables};
use crate::OutputMetric;

/// Rounds over the weight, at most.
pub(super) const TURNS: usize = 3;

// Rows that are multiplied with H at once are whole blocks of the metric.
const _: () = assert!(ROWS.is_multiple_of(OutputMetric::BLOCK));

/// tr(M D H D^T) of the change D = W - W0, by the damped H.
pub(super) fn loss(problem: &Problem<'_>, metric: &OutputMetric, weight: impl Fn(usize) -> f32 + Sync) -> Result<f64> {
    let columns = problem.data.columns;
    let mut loss = 0.0;
    for (part, rows) in problem.chunks() {
        let change = problem.data.change(&rows, &weight);
        let product = Tensor::f_from_slice(&problem.part(part).times(&change)?)?.f_reshape([-1, columns as i64])?;
        let product = to_vec(&metric.times(&rows, &product)?)?;
        loss += dots(&change, &product, columns).iter().sum::<f64>();
    }
    Ok(loss)
}

/// Coordinate descent over the indices of all kept weights, palettes fixed. With G = M (Q - W0) H,
/// the objective is a parabola in each weight, of slope 2 G_rj and curvature 2 M_rr H_jj; so no
/// change raises it.
///
/// It costs about two products with H. Returns the number of weights that changed.
pub(super) fn polish_outputs(problem: &Problem<'_>, sorted: &mut SortedCodebook, metric: &OutputMetric) -> Result<usize> {
    block_by_block(problem, sorted, |sorted, piece| {
        let Piece { rows, columns, gradient } = piece;
        let gradient = to_vec(&metric.times(&rows, &gradient)?)?;
        Ok(polish_columns(problem, sorted, metric, &rows, columns, gradient))
    })
}

/// Polishes some columns of `rows`. Returns the change of each weight, and the number of weights
/// that changed.
fn polish_columns(
    problem: &Problem<'_>,
    sorted: &mut SortedCodebook,
    metric: &OutputMetric,
    rows: &Range<usize>,
    columns: Columns<'_>,
    mut gradient: Vec<f32>,
) -> (Vec<f32>, usize) {
    let mut moved = vec![0.0; gradient.len()];
    let mut indices = std::mem::take(&mut sorted.indices);
    let of_rows = &mut indices[rows.start / sorted.vector_length * problem.data.columns..];
    let matrices = Matrices { gradient: &mut gradient, moved: &mut moved, indices: of_rows };
    let place = Place { data: &problem.data, metric, first_row: rows.start, columns, group_rows: sorted.group_rows };
    let number = match sorted.tables() {
        Tables::Scalars(tables) => matrices.polish(&place, &tables),
        Tables::Pairs(tables) => matrices.polish(&place, tables),
        Tables::Fours(tables) => matrices.polish(&place, tables),
    };
    sorted.indices = indices;
    (moved, number)
}

/// Where rows are polished.
struct Place<'a> {
    data: &'a Data,
    metric: &'a OutputMetric,
    first_row: usize,
    columns: Columns<'a>,
    /// Rows that share a palette.
    group_rows: usize,
}

/// What changes in r rows at b columns.
struct Matrices<'a> {
    /// M (W - W0) H [r, b], updated with the indices.
    gradient: &'a mut [f32],
    /// The change of each weight [r, b], which is added.
    moved: &'a mut [f32],
    /// The indices [r / V, d].
    indices: &'a mut [u8],
}

impl Matrices<'_> {
    /// Polishes the rows by the palettes of all groups. Blocks of the metric do not affect each
    /// other, so threads share them. Returns the number of weights that changed.
    fn polish<const V: usize, T: Entries<V> + Sync>(self, place: &Place<'_>, tables: &[T]) -> usize {
        const BLOCK: usize = OutputMetric::BLOCK;
        let (width, d) = (place.columns.diagonal.len(), place.data.columns);
        let values = self.gradient.par_chunks_mut(width * BLOCK).zip(self.moved.par_chunks_mut(width * BLOCK));
        let blocks = values.zip(self.indices.par_chunks_mut(d * BLOCK / V)).enumerate();
        let numbers = blocks.map(|(block, ((gradient, moved), indices))| {
            let of_block = Matrices { gradient, moved, indices };
            let metric = place.metric.block(place.first_row / BLOCK + block);
            let first = place.first_row + block * BLOCK;
            Arch::new().dispatch(Descent::<V, T> { of_block, metric, first, place, tables })
        });
        numbers.sum()
    }
}

/// Coordinate descent in one block of the metric, in SIMD.
struct Descent<'a, const V: usize, T> {
    of_block: Matrices<'a>,
    /// M of the rows, [r, r].
    metric: &'a [f32],
    /// The number of the first row.
    first: usize,
    place: &'a Place<'a>,
    tables: &'a [T],
}

impl<const V: usize, T: Entries<V>> WithSimd for Descent<'_, V, T> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> usize {
        let Columns { diagonal, first, .. } = self.place.columns;
        let data = self.place.data;
        let rows = self.of_block.gradient.len() / diagonal.len();
        let mut number = 0;
        for _ in 0..PASSES {
            let before = number;
            for (column, h) in diagonal.iter().enumerate().filter(|(_, h)| **h > 0.0) {
                for vector in 0..rows / V {
                    if data.kept((self.first + vector * V) * data.columns + first + column) {
                        number += V * usize::from(self.turn(vector, column, *h));
                    }
                }
            }
            if number == before {
                break;
            }
        }
        number
    }
}

impl<const V: usize, T: Entries<V>> Descent<'_, V, T> {
    /// Moves a vector of weights in a column with the diagonal element `h` to its best entry.
    /// Returns whether that is another one.
    #[inline(always)]
    fn turn(&mut self, vector: usize, column: usize, h: f32) -> bool {
        let Descent { of_block: Matrices { gradient, moved, indices }, metric, first, place, tables } = self;
        let width = place.columns.diagonal.len();
        let (rows, row) = (gradient.len() / width, vector * V);
        let index = &mut indices[vector * place.data.columns + place.columns.first + column];
        let table = &tables[(*first + row) / place.group_rows];
        let now = table.entry(*index);
        let slope: [f32; V] = std::array::from_fn(|a| gradient[(row + a) * width + column]);
        let curvature: [[f32; V]; V] = std::array::from_fn(|a| std::array::from_fn(|b| h * metric[(row + a) * rows + row + b]));
        // The objective changes by 2 s slope + s A s with the step s = c - now and the curvature A:
        // up to a constant, by c A c + 2 c (slope - A now).
        let mut linear = slope;
        for a in 0..V {
            for b in 0..V {
                linear[a] -= curvature[a][b] * now[b];
            }
        }
        let best = table.least(&curvature, &linear);
        let entry = table.entry(best);
        let step: [f32; V] = std::array::from_fn(|member| entry[member] - now[member]);
        let (mut gain, mut least) = (0.0, 0.0);
        for a in 0..V {
            let mut bent = 2.0 * slope[a];
            for b in 0..V {
                bent += curvature[a][b] * step[b];
            }
            gain -= step[a] * bent;
            // Gains below the precision of fp32 are ignored.
            least += 1e-5 * step[a] * step[a] * curvature[a][a];
        }
        if gain <= least {
            return false;
        }
        *index = best;
        for member in 0..V {
            moved[(row + member) * width + column] += step[member];
        }
        let corner = &place.columns.corner[column * width..(column + 1) * width];
        for other in 0..rows {
            let mut share = 0.0;
            for member in 0..V {
                share += metric[other * rows + row + member] * step[member];
            }
            // A loop, because closures are not compiled for the SIMD instructions of `dispatch`.
            for (gradient, h) in gradient[other * width..(other + 1) * width].iter_mut().zip(corner) {
                *gradient += share * h;
            }
        }
        true
    }
}
