//! The upper triangle of a symmetric or triangular matrix, in half the memory.

use std::ops::Range;

use squeeze_base::error::Result;
use squeeze_numerics::product::add_product;
use tch::{Device, Kind, Tensor};

use super::matrix::{block, copy, panels};

/// The upper triangle of a [d, d] fp32 matrix in panels of neighbouring rows, each from its own
/// diagonal block to the last column.
///
/// A panel's diagonal block is a full square; entries below it are not stored. SDXL's largest
/// Hessian, d = 23,040, takes 1.0 GiB instead of 2.0 GiB. Products with panels are as fast as
/// products with whole matrices, and symmetric products take half the work.
#[derive(Debug)]
pub(super) struct Triangle {
    dimension: i64,
    /// Rows of all panels but the last.
    height: i64,
    panels: Vec<Tensor>,
}

/// The number of rows of a panel of a [d, d] matrix: large enough for fast products, and small
/// enough that the diagonal blocks take little extra memory. It is a multiple of `unit`, the number
/// of taps of a convolution's kernel, so that a panel holds whole channels.
pub(super) fn panel_height(dimension: i64, unit: i64) -> i64 {
    let height = if dimension <= 768 {
        128
    } else if dimension <= 2560 {
        256
    } else {
        512
    };
    if unit <= height { height / unit * unit } else { unit }
}

impl Triangle {
    /// A triangle of zeros.
    pub(crate) fn zeros(dimension: i64, unit: i64, device: Device) -> Result<Self> {
        let height = panel_height(dimension, unit);
        let panels = panels(dimension, height)
            .map(|rows| Ok(Tensor::f_zeros([rows.end - rows.start, dimension - rows.start], (Kind::Float, device))?))
            .collect::<Result<_>>()?;
        Ok(Triangle { dimension, height, panels })
    }

    /// Bytes that [`zeros`](Self::zeros) takes.
    pub(crate) fn bytes(dimension: i64, unit: i64) -> u64 {
        let numbers =
            panels(dimension, panel_height(dimension, unit)).map(|rows| (rows.end - rows.start) * (dimension - rows.start));
        4 * numbers.sum::<i64>().unsigned_abs()
    }

    /// The triangle on `device`. One that is already there is not copied.
    pub(crate) fn to_device(&self, device: Device) -> Result<Self> {
        let panels = self.panels.iter().map(|panel| Ok(panel.f_to_device(device)?)).collect::<Result<_>>()?;
        Ok(Triangle { panels, ..*self })
    }

    /// The triangle times `factor`, in new memory.
    pub(crate) fn scaled(&self, factor: f64) -> Result<Self> {
        let panels = self.panels.iter().map(|panel| Ok(panel.f_mul_scalar(factor)?)).collect::<Result<_>>()?;
        Ok(Triangle { panels, ..*self })
    }

    /// d.
    pub(crate) fn dimension(&self) -> i64 {
        self.dimension
    }

    /// The device of the panels.
    pub(crate) fn device(&self) -> Device {
        self.panels[0].device()
    }

    /// The number of panels.
    pub(crate) fn count(&self) -> usize {
        self.panels.len()
    }

    /// The rows of panel `index`, which are also its first columns.
    pub(crate) fn rows(&self, index: usize) -> Range<i64> {
        let start = index as i64 * self.height;
        start..self.dimension.min(start + self.height)
    }

    /// Panel `index`: [rows, d - first row].
    pub(crate) fn panel(&self, index: usize) -> &Tensor {
        &self.panels[index]
    }

    /// All panels.
    pub(crate) fn panels_mut(&mut self) -> &mut [Tensor] {
        &mut self.panels
    }

    /// The whole diagonal block of panel `index`, a view.
    pub(crate) fn corner(&self, index: usize) -> Result<Tensor> {
        Ok(self.panels[index].f_narrow(1, 0, self.panels[index].size2()?.0)?)
    }

    /// Columns `columns` of panel `index`, a view.
    pub(crate) fn part(&self, index: usize, columns: Range<i64>) -> Result<Tensor> {
        let start = self.rows(index).start;
        Ok(self.panels[index].f_narrow(1, columns.start - start, columns.end - columns.start)?)
    }

    /// The diagonals of all panels, views.
    pub(crate) fn diagonals(&self) -> Result<Vec<Tensor>> {
        self.panels.iter().map(|panel| Ok(panel.f_diagonal(0, 0, 1)?)).collect()
    }

    /// Rows `rows`, from column `rows.start` on: [b, d - start]. Entries left of the diagonal have
    /// no meaning. A view where the rows are in one panel.
    pub(crate) fn tail_of(&self, rows: Range<i64>) -> Result<Tensor> {
        let (first, last) = (rows.start / self.height, (rows.end - 1) / self.height);
        let mut parts = Vec::new();
        for index in first..=last {
            let all = self.rows(index as usize);
            let inside = rows.start.max(all.start)..rows.end.min(all.end);
            let part = self.panels[index as usize].f_narrow(0, inside.start - all.start, inside.end - inside.start)?;
            parts.push(if index == first {
                part.f_narrow(1, rows.start - all.start, self.dimension - rows.start)?
            } else {
                part.f_constant_pad_nd([all.start - rows.start, 0])?
            });
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Tensor::f_cat(&parts, 0)? })
    }

    /// Adds X^T X for X [vectors, d].
    pub(crate) fn add_products(&self, vectors: &Tensor) -> Result<()> {
        for (index, panel) in self.panels.iter().enumerate() {
            let rows = self.rows(index);
            let left = vectors.f_narrow(1, rows.start, rows.end - rows.start)?;
            let right = vectors.f_narrow(1, rows.start, self.dimension - rows.start)?;
            add_product(panel, &left.f_transpose(0, 1)?, &right)?;
        }
        Ok(())
    }

    /// Adds another triangle of the same dimension.
    pub(crate) fn add(&self, other: &Triangle) -> Result<()> {
        for (panel, other) in self.panels.iter().zip(&other.panels) {
            let _ = panel.shallow_clone().f_add_(&other.f_to_device(panel.device())?)?;
        }
        Ok(())
    }

    /// The symmetric matrix [d, d] whose upper triangle this is.
    pub(crate) fn symmetric(&self) -> Result<Tensor> {
        let matrix = self.upper()?;
        for (index, panel) in self.panels.iter().enumerate() {
            let rows = self.rows(index);
            let after = self.part(index, rows.end..self.dimension)?;
            block(&matrix, rows.end..self.dimension, rows.clone())?.f_copy_(&after.f_transpose(0, 1)?)?;
            let corner = copy(&panel.f_narrow(1, 0, rows.end - rows.start)?)?;
            let whole = corner.f_triu(0)?.f_add(&corner.f_triu(1)?.f_transpose(0, 1)?)?;
            block(&matrix, rows.clone(), rows)?.f_copy_(&whole)?;
        }
        Ok(matrix)
    }

    /// [d, d] with zeros below the diagonal.
    pub(crate) fn upper(&self) -> Result<Tensor> {
        let matrix = Tensor::f_zeros([self.dimension; 2], (Kind::Float, self.device()))?;
        for (index, panel) in self.panels.iter().enumerate() {
            let rows = self.rows(index);
            block(&matrix, rows.clone(), rows.start..self.dimension)?.f_copy_(&panel.f_triu(0)?)?;
        }
        Ok(matrix)
    }
}
