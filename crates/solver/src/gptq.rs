//! GPTQ: rounds weights to fixed values, and lets the columns that are still to come make up for
//! the errors of a column.

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::PaletteOptions;
use squeeze_numerics::product::add_product;
use tch::{Device, Tensor};

use super::factor::inverse;
use super::matrix::{block, copy, numbers, numbers_mut, panels, to_vec};
use super::palette::{Palettized, Rounding, largest, nearest};
use super::sparsegpt::notes_about;
use super::weight::flat_for;
use super::{Factor, Hessian, Note};

/// A weight rounded by [`gptq`].
#[derive(Debug)]
pub struct Quantized {
    /// Values, scales and indices.
    pub palettized: Palettized,
    /// Notes for the user.
    pub notes: Vec<Note>,
}

/// The dampening of the published GPTQ (`percdamp`).
pub const GPTQ_DAMPENING: f64 = 0.01;

/// The columns whose errors are fed back at once, if blocks of scales divide them: the published
/// GPTQ's `blocksize`.
const PANEL: usize = 128;

/// Rounds `weight` [o, ...], flattened to [o, d], to the fixed values that `options` ask for,
/// column by column (Frantar et al. 2023, GPTQ, arXiv:2210.17323; `GPTQ.fasterquant` in
/// IST-DASLab/gptq).
///
/// The error of a column, e = (w - q) / U_jj, is fed back to the columns after it as e U_j, where U
/// is the inverse of the [`Factor`] R. A block's scale is taken when the sweep reaches the block,
/// from the weights as they are then, with all errors before it fed back. So does the published
/// code with its default `static_groups=False`, but for columns of its `blocksize` that have more
/// than one group: there the later groups' scales do not see the errors since the block's first
/// column. Columns stay in their order (`act_order=False`). Columns whose inputs were always zero
/// become zero. Scales are rounded to fp16 before they are used, since they are stored so.
///
/// The computation is done on the CPU; the result does not depend on the number of rayon threads.
///
/// # Errors
/// [`Error::Argument`] for options that fixed values cannot have, or a weight that does not fit the
/// Hessian; [`Error::Shape`] if the number of factors is not that of the groups;
/// [`Error::NotFinite`] for NaN.
pub fn gptq(name: &str, weight: &Tensor, hessian: &Hessian, factors: &[Factor], options: &PaletteOptions) -> Result<Quantized> {
    let _span = tracing::debug_span!("gptq").entered();
    let (rounding, quantizer) = Rounding::new(name, options)?;
    let original = flat_for(weight, hessian)?.f_to_device(Device::Cpu)?.f_contiguous()?;
    if factors.len() as i64 != hessian.groups() {
        let expected = format!("[{}], one for each group,", hessian.groups());
        return Err(Error::shape("the list of factors", [factors.len() as i64], expected));
    }
    let (o, d) = original.size2()?;
    let (rows, columns) = (o as usize, d as usize);
    let block_size = quantizer.block_size.min(columns);
    let in_row = columns.div_ceil(block_size);
    let (mut indices, mut scales) = (vec![0; rows * columns], vec![f16::ONE; rows * in_row]);
    let of_group = rows / factors.len();
    for (group, factor) in factors.iter().enumerate() {
        let part = Part {
            original: original.f_narrow(0, (group * of_group) as i64, of_group as i64)?,
            indices: &mut indices[group * of_group * columns..(group + 1) * of_group * columns],
            scales: &mut scales[group * of_group * in_row..(group + 1) * of_group * in_row],
            block_size,
        };
        part.sweep(&rounding, &factor.to_device(Device::Cpu)?)?;
    }
    let codebook = rounding.codebook(options, [rows, columns], scales);
    let shape = weight.size().iter().map(|size| *size as usize).collect();
    let mut palettized = Palettized { name: name.to_owned(), shape, codebook, indices, squared_error: 0.0, kept: rows * columns };
    let decoded = palettized.decode(None)?;
    if !decoded.par_iter().all(|value| value.is_finite()) {
        return Err(Error::NotFinite(format!("`{name}`: the errors that are fed back leave the range of fp16")));
    }
    let of_rows = decoded.par_chunks(columns).zip(numbers(&original)?.par_chunks(columns));
    let square = |(new, old): (&f16, &f32)| f64::from(new.to_f32() - old).powi(2);
    let sums: Vec<f64> = of_rows.map(|(new, old)| new.iter().zip(old).map(square).sum()).collect();
    palettized.squared_error = sums.iter().sum();
    Ok(Quantized { palettized, notes: notes_about(hessian, factors, GPTQ_DAMPENING) })
}

/// Rows that share a factor.
struct Part<'a> {
    /// [o, d].
    original: Tensor,
    /// [o, d].
    indices: &'a mut [u8],
    /// [o, blocks].
    scales: &'a mut [f16],
    /// At most d.
    block_size: usize,
}

/// What the columns of a panel have in common, for all rows.
struct Panel<'a> {
    rounding: &'a Rounding,
    /// The first column.
    start: usize,
    /// The number of columns.
    width: usize,
    block_size: usize,
    /// U of these columns, [width, width].
    upper: &'a [f32],
}

impl Part<'_> {
    fn sweep(self, rounding: &Rounding, factor: &Factor) -> Result<()> {
        let Part { original, indices, scales, block_size } = self;
        let (o, d) = original.size2()?;
        let columns = d as usize;
        let in_row = columns.div_ceil(block_size);
        let original = if factor.dead_columns > 0 { original.f_masked_fill(&factor.dead, 0.0)? } else { copy(&original)? };
        if in_row == 1 {
            // The block is the row, which no error has reached yet.
            let rows = scales.par_iter_mut().zip(numbers(&original)?.par_chunks(columns));
            rows.for_each(|(scale, row)| *scale = rounding.scale(largest(row)));
        }
        // Whole blocks, so that their scales see all errors that are fed back to them.
        let width = match block_size {
            _ if in_row == 1 => PANEL,
            1..PANEL => block_size * (PANEL / block_size),
            _ => block_size,
        };
        // D R of the change D of the columns before, for the columns that are still to come.
        let fed_back = original.f_zeros_like()?;
        for panel in panels(d, width as i64) {
            let width = panel.end - panel.start;
            let rows = factor.triangle.tail_of(panel.clone())?;
            let upper = inverse(&rows.f_narrow(1, 0, width)?)?;
            let before = block(&original, 0..o, panel.clone())?;
            let mut weight = copy(&before)?;
            add_product(&weight, &block(&fed_back, 0..o, panel.clone())?, &upper)?;
            let (start, width) = (panel.start as usize, width as usize);
            let panel_of = Panel { rounding, start, width, block_size, upper: &to_vec(&upper)? };
            let values = numbers_mut(&mut weight)?.par_chunks_mut(width);
            let stored = indices.par_chunks_mut(columns).zip(scales.par_chunks_mut(in_row));
            values.zip(stored).for_each_init(Vec::new, |levels, (values, (indices, scales))| {
                panel_of.sweep(values, &mut indices[start..start + width], scales, levels);
            });
            if panel.end < d {
                let after = block(&fed_back, 0..o, panel.end..d)?;
                let width = width as i64;
                add_product(&after, &before.f_sub(&weight)?, &rows.f_narrow(1, width, d - panel.end)?)?;
            }
        }
        Ok(())
    }
}

impl Panel<'_> {
    /// Rounds a row of the panel in place, and notes its indices and the scales of its blocks.
    fn sweep(&self, values: &mut [f32], indices: &mut [u8], scales: &mut [f16], levels: &mut Vec<f32>) {
        let Panel { rounding, start, width, block_size, upper } = *self;
        let is_row = scales.len() == 1;
        for at in 0..width {
            let column = start + at;
            let block = column / block_size;
            if column.is_multiple_of(block_size) && !is_row {
                scales[block] = rounding.scale(largest(&values[at..width.min(at + block_size)]));
            }
            if at == 0 || column.is_multiple_of(block_size) {
                rounding.levels(scales[block], levels);
            }
            let index = nearest(levels, values[at]);
            let (value, level) = (values[at], levels[usize::from(index)]);
            (indices[at], values[at]) = (index, level);
            let row = &upper[at * width..(at + 1) * width];
            let error = (value - level) / row[at];
            values[at + 1..].iter_mut().zip(&row[at + 1..]).for_each(|(value, upper)| *value -= error * upper);
        }
    }
}
