//! The vectors of a group that are clustered, with their weights.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::table::VectorTable;

/// The vectors that a thread takes at once. Sums go piece by piece, in the order of the pieces, so
/// that they do not depend on the number of threads.
pub(super) const PIECE: usize = 4096;

/// Vectors of V values and the weight of each, which is not negative.
#[derive(Debug, Clone, Default)]
pub(super) struct Points<const V: usize> {
    pub vectors: Vec<[f32; V]>,
    pub weights: Vec<f32>,
}

/// Sums over the points nearest to one entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cell<const V: usize> {
    /// The sum of weight * vector.
    pub sum: [f64; V],
    /// The sum of weights.
    pub weight: f64,
}

impl<const V: usize> Cell<V> {
    const EMPTY: Self = Cell { sum: [0.0; V], weight: 0.0 };
}

/// The points shared out to the entries of a palette.
#[derive(Debug, Clone)]
pub(super) struct Cells<const V: usize> {
    pub cells: Vec<Cell<V>>,
    /// The sum over points of weight * squared distance to the nearest entry.
    pub loss: f64,
    /// The point with the largest weight * squared distance, and that number.
    pub farthest: (usize, f64),
}

impl<const V: usize> Points<V> {
    pub(super) fn len(&self) -> usize {
        self.vectors.len()
    }

    pub(super) fn push(&mut self, vector: [f32; V], weight: f32) {
        self.vectors.push(vector);
        self.weights.push(weight);
    }

    /// At most `most` points, evenly spread over all.
    pub(super) fn thinned(&self, most: usize) -> Points<V> {
        let mut thin = Points::default();
        for at in 0..most.min(self.len()) {
            let at = (at as u128 * self.len() as u128 / most as u128) as usize;
            thin.push(self.vectors[at], self.weights[at]);
        }
        thin
    }

    /// Shares the points out to the nearest of `entries` vectors.
    pub(super) fn cells(&self, table: &VectorTable<V>, entries: usize) -> Cells<V> {
        let arch = Arch::new();
        if self.len() <= PIECE {
            return arch.dispatch(Share { vectors: &self.vectors, weights: &self.weights, table, entries });
        }
        let pieces = self.vectors.par_chunks(PIECE).zip(self.weights.par_chunks(PIECE));
        let pieces = pieces.map(|(vectors, weights)| arch.dispatch(Share { vectors, weights, table, entries }));
        let pieces: Vec<Cells<V>> = pieces.collect();
        let mut all = Cells { cells: vec![Cell::EMPTY; entries], loss: 0.0, farthest: (0, 0.0) };
        for (piece, cells) in pieces.into_iter().enumerate() {
            for (sum, cell) in all.cells.iter_mut().zip(cells.cells) {
                sum.weight += cell.weight;
                sum.sum.iter_mut().zip(cell.sum).for_each(|(sum, value)| *sum += value);
            }
            all.loss += cells.loss;
            if cells.farthest.1 > all.farthest.1 {
                all.farthest = (piece * PIECE + cells.farthest.0, cells.farthest.1);
            }
        }
        all
    }
}

/// A piece of points that is shared out.
struct Share<'a, const V: usize> {
    vectors: &'a [[f32; V]],
    weights: &'a [f32],
    table: &'a VectorTable<V>,
    entries: usize,
}

impl<const V: usize> WithSimd for Share<'_, V> {
    type Output = Cells<V>;

    // Inlined with the search, so that its loops are compiled for the SIMD instructions that
    // `dispatch` selects.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Cells<V> {
        let mut cells = Cells { cells: vec![Cell::EMPTY; self.entries], loss: 0.0, farthest: (0, 0.0) };
        for at in 0..self.vectors.len() {
            let (vector, weight) = (self.vectors[at], f64::from(self.weights[at]));
            let index = self.table.nearest(vector);
            let entry = self.table.vector(index);
            let cell = &mut cells.cells[usize::from(index)];
            let mut distance = 0.0;
            for member in 0..V {
                let value = f64::from(vector[member]);
                let off = value - f64::from(entry[member]);
                distance += off * off;
                cell.sum[member] += weight * value;
            }
            cell.weight += weight;
            cells.loss += weight * distance;
            if weight * distance > cells.farthest.1 {
                cells.farthest = (at, weight * distance);
            }
        }
        cells
    }
}
