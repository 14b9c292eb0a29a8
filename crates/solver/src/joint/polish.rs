//! Coordinate descent over the indices, weight by weight.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_numerics::product::{add_product, product};
use tch::{Kind, Tensor};

use super::super::matrix::to_vec;
use super::super::triangle::Triangle;
use super::problem::Problem;
use super::sorted_codebook::{Entries, Palette, SortedCodebook};
use crate::palette::VectorTable;

/// The number of columns whose gradient is computed at once.
pub(super) const BLOCK: i64 = 128;

/// The number of passes over a block of columns with the gradient that was computed for it.
pub(super) const PASSES: usize = 2;

/// Coordinate descent over the indices of all kept weights, palettes fixed. With G = (Q - W0) H the
/// best value of a weight is q_j - G_j / H_jj, and its index becomes that of the nearest entry. The
/// objective is a parabola in each weight, so no change raises it.
///
/// It costs about one product with H. Returns the number of weights that changed.
pub(super) fn polish(problem: &Problem<'_>, sorted: &mut SortedCodebook) -> Result<usize> {
    block_by_block(problem, sorted, |sorted, piece| {
        let Piece { gradient, rows, columns } = piece;
        let Columns { corner, diagonal, first } = columns;
        let block = Block { gradient: to_vec(&gradient)?, corner, row: rows.start, column: first };
        Ok(polish_block(problem, sorted, block, diagonal))
    })
}

/// Some rows of the weight at some neighbouring columns.
pub(super) struct Piece<'a> {
    pub rows: Range<usize>,
    pub columns: Columns<'a>,
    /// (W - W0) H there.
    pub gradient: Tensor,
}

/// Neighbouring columns of H.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns<'a> {
    /// The diagonal block [b, b] of H.
    pub corner: &'a [f32],
    pub diagonal: &'a [f32],
    /// The number of the first column.
    pub first: usize,
}

/// Goes over the weight, some rows and columns at a time. `polish` changes indices there, and
/// returns the change of each weight and how many changed. Returns the number of all that changed.
pub(super) fn block_by_block(
    problem: &Problem<'_>,
    sorted: &mut SortedCodebook,
    mut polish: impl FnMut(&mut SortedCodebook, Piece<'_>) -> Result<(Vec<f32>, usize)>,
) -> Result<usize> {
    let data = &problem.data;
    let d = data.columns;
    let mut changed = 0;
    for (part, rows) in problem.chunks() {
        let part = problem.part(part);
        let count = rows.len() as i64;
        let change = data.change(&rows, |at| if data.kept(at) { sorted.value(at, d) } else { 0.0 });
        let change = Tensor::f_from_slice(&change)?.f_reshape([count, d as i64])?.f_to_device(part.h.device())?;
        for panel in 0..part.h.count() {
            let of_panel = part.h.rows(panel);
            for start in (of_panel.start..of_panel.end).step_by(BLOCK as usize) {
                let end = of_panel.end.min(start + BLOCK);
                let (gradient, corner) = gradient(&part.h, &change, panel, start, end)?;
                let (corner, diagonal) = (to_vec(&corner)?, &part.diagonal[start as usize..end as usize]);
                let columns = Columns { corner: &corner, diagonal, first: start as usize };
                let (moved, number) = polish(sorted, Piece { rows: rows.clone(), columns, gradient })?;
                if number > 0 {
                    changed += number;
                    let moved = Tensor::f_from_slice(&moved)?.f_reshape([count, end - start])?.f_to_device(part.h.device())?;
                    let _ = change.f_narrow(1, start, end - start)?.f_add_(&moved)?;
                }
            }
        }
    }
    Ok(changed)
}

/// D H at columns `start..end`, which lie in one panel, and the diagonal block of H there.
pub(super) fn gradient(h: &Triangle, change: &Tensor, panel: usize, start: i64, end: i64) -> Result<(Tensor, Tensor)> {
    let (rows, width) = (h.rows(panel), end - start);
    let block = h.panel(panel).f_narrow(0, start - rows.start, width)?;
    let gradient = product(&change.f_narrow(1, rows.start, h.dimension() - rows.start)?, &block.f_transpose(0, 1)?)?;
    for above in 0..panel {
        let columns = h.rows(above);
        let before = change.f_narrow(1, columns.start, columns.end - columns.start)?;
        add_product(&gradient, &before, &h.part(above, start..end)?)?;
    }
    debug_assert_eq!(gradient.kind(), Kind::Float);
    Ok((gradient, block.f_narrow(1, start - rows.start, width)?))
}

/// The gradient [rows, b] of some columns, the diagonal block [b, b] of H, and the row and column
/// of the first element.
struct Block<'a> {
    gradient: Vec<f32>,
    corner: &'a [f32],
    row: usize,
    column: usize,
}

/// Polishes a block. Returns the change of each weight, and the number of weights that changed.
fn polish_block(problem: &Problem<'_>, sorted: &mut SortedCodebook, block: Block<'_>, diagonal: &[f32]) -> (Vec<f32>, usize) {
    let data = &problem.data;
    let Block { mut gradient, corner, row, column } = block;
    let (width, length) = (diagonal.len(), sorted.vector_length);
    let mut moved = vec![0.0; gradient.len()];
    let mut indices = std::mem::take(&mut sorted.indices);
    let of_rows = &mut indices[row / length * data.columns..];
    let values = gradient.par_chunks_mut(width * length).zip(moved.par_chunks_mut(width * length));
    let numbers = values.zip(of_rows.par_chunks_mut(data.columns)).enumerate().map(|(vector, ((gradient, moved), indices))| {
        let row = row + vector * length;
        let start = row * data.columns + column;
        let rows = PolishedRows { gradient, moved, indices: &mut indices[column..column + width] };
        length * rows.polish(corner, diagonal, sorted.of_row(row), |j| data.kept(start + j))
    });
    let number = numbers.sum();
    sorted.indices = indices;
    (moved, number)
}

/// The V rows of a block of b columns that share indices.
pub(super) struct PolishedRows<'a> {
    /// (W - W0) H [V, b], updated with the indices.
    pub gradient: &'a mut [f32],
    /// The change of each weight [V, b], which is added.
    pub moved: &'a mut [f32],
    /// The palette entries `[b]`.
    pub indices: &'a mut [u8],
}

impl PolishedRows<'_> {
    /// Polishes the rows, given the diagonal block [b, b] of H and its diagonal. Returns the number
    /// of indices that changed.
    pub(super) fn polish(self, corner: &[f32], diagonal: &[f32], palette: Palette<'_>, kept: impl Fn(usize) -> bool) -> usize {
        match palette {
            Palette::Scalars(palette) => self.descend(corner, diagonal, &palette, kept),
            Palette::Pairs(palette) => Arch::new().dispatch(Vectors { rows: self, corner, diagonal, palette, kept }),
            Palette::Fours(palette) => Arch::new().dispatch(Vectors { rows: self, corner, diagonal, palette, kept }),
        }
    }

    /// With the gradient g of a vector of weights and the step s, the objective changes by
    /// `H_jj ‖s + g / H_jj‖²`, up to a constant, since the rows have the same H: the nearest entry
    /// is the best.
    #[inline(always)]
    fn descend<const V: usize>(
        self,
        corner: &[f32],
        diagonal: &[f32],
        palette: &impl Entries<V>,
        kept: impl Fn(usize) -> bool,
    ) -> usize {
        let PolishedRows { gradient, moved, indices } = self;
        let width = diagonal.len();
        let mut number = 0;
        for _ in 0..PASSES {
            let before = number;
            for j in 0..width {
                if !kept(j) || diagonal[j] <= 0.0 {
                    continue;
                }
                let now = palette.entry(indices[j]);
                let slope: [f32; V] = std::array::from_fn(|member| gradient[member * width + j]);
                let entry = palette.nearest(std::array::from_fn(|member| now[member] - slope[member] / diagonal[j]));
                let best = palette.entry(entry);
                let step: [f32; V] = std::array::from_fn(|member| best[member] - now[member]);
                let (mut gain, mut least) = (0.0, 0.0);
                for member in 0..V {
                    gain += -step[member] * (2.0 * slope[member] + step[member] * diagonal[j]);
                    // Gains below the precision of fp32 are ignored.
                    least += 1e-5 * step[member] * step[member] * diagonal[j];
                }
                if gain > least {
                    indices[j] = entry;
                    number += 1;
                    for member in 0..V {
                        moved[member * width + j] += step[member];
                        let gradient = &mut gradient[member * width..(member + 1) * width];
                        // A loop, because closures are not compiled for the SIMD instructions of
                        // `dispatch`.
                        for (gradient, h) in gradient.iter_mut().zip(&corner[j * width..]) {
                            *gradient += step[member] * h;
                        }
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

/// [`PolishedRows::descend`] in SIMD, for palettes whose search takes longer than the rest.
struct Vectors<'a, const V: usize, F> {
    rows: PolishedRows<'a>,
    corner: &'a [f32],
    diagonal: &'a [f32],
    palette: &'a VectorTable<V>,
    kept: F,
}

impl<const V: usize, F: Fn(usize) -> bool> WithSimd for Vectors<'_, V, F> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        self.rows.descend(self.corner, self.diagonal, self.palette, self.kept)
    }
}
