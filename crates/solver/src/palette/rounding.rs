//! Fixed values with a scale for each block of columns: scales, and the nearest value.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Codebook, Grouping, PaletteOptions, Quantizer, Scales};

use super::layout::sizes;
use super::palettized::{Palettized, squared_error};

/// The fixed values of a weight, and how they are scaled.
#[derive(Debug, Clone)]
pub(crate) struct Rounding {
    /// The values before they are scaled, ascending.
    entries: Vec<f16>,
    /// The number that the largest magnitude of a block is scaled to.
    reach: f32,
}

impl Rounding {
    /// The rounding that `options` ask for, and its quantizer.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the layer: no quantizer, a width that it has not, empty blocks,
    /// or options of fitted palettes beside it.
    pub(crate) fn new(name: &str, options: &PaletteOptions) -> Result<(Self, Quantizer)> {
        let refuse = |problem: &str| Error::Argument(format!("`{name}`: {problem}"));
        let PaletteOptions { bits, grouping, axis: _, per_channel_scale, vector_length, quantizer } = options;
        let quantizer = quantizer.ok_or_else(|| refuse("no fixed values are asked for"))?;
        if *grouping != Grouping::PerTensor || *per_channel_scale || *vector_length != 1 {
            return Err(refuse("fixed values have no groups of channels, scales of channels or vectors"));
        }
        if quantizer.block_size == 0 {
            return Err(refuse("blocks of 0 columns"));
        }
        let entries = quantizer.grid.entries(*bits).map_err(|problem| refuse(&problem))?;
        Ok((Rounding { entries, reach: quantizer.grid.reach(*bits) }, quantizer))
    }

    /// The scale of a block with this largest magnitude. It is never zero: what is too small for a
    /// scale in fp16 becomes zero in any case.
    pub(crate) fn scale(&self, largest: f32) -> f16 {
        let scale = f16::from_f32(largest / self.reach).min(f16::MAX);
        if scale > f16::ZERO { scale } else { f16::ONE }
    }

    /// Writes the values that a block with this scale can have, as they are decoded, ascending.
    /// Values beyond fp16 are infinite.
    pub(crate) fn levels(&self, scale: f16, levels: &mut Vec<f32>) {
        levels.clear();
        let scale = scale.to_f32();
        levels.extend(self.entries.iter().map(|entry| f16::from_f32(entry.to_f32() * scale).to_f32()));
    }

    /// The codebook of a weight [o, d] with these scales, [o, blocks].
    pub(crate) fn codebook(&self, options: &PaletteOptions, [rows, columns]: [usize; 2], scales: Vec<f16>) -> Codebook {
        let block = options.quantizer.map(|quantizer| quantizer.block_size).filter(|block| *block < columns);
        Codebook {
            bits: options.bits,
            axis: 0,
            group_size: rows,
            vector_length: 1,
            palettes: self.entries.clone(),
            scales: Some(Scales { values: scales, block }),
        }
    }
}

/// The index of the level that is nearest to `value`, the lower one of two. Infinite levels are
/// nearest to no number.
pub(crate) fn nearest(levels: &[f32], value: f32) -> u8 {
    let above = levels.partition_point(|level| *level < value).min(levels.len() - 1);
    let below = above.saturating_sub(1);
    let index = if (value - levels[below]).abs() <= (levels[above] - value).abs() { below } else { above };
    u8::try_from(index).expect("there are at most 256 levels")
}

/// The largest magnitude.
pub(crate) fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| value.abs().max(largest))
}

/// Gives every weight the nearest of the fixed values (round to nearest), with scales by the
/// largest kept magnitude of each block. The lengths have been checked, and weights are finite.
pub(super) fn round(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    options: &PaletteOptions,
) -> Result<Palettized> {
    let (rounding, quantizer) = Rounding::new(name, options)?;
    if quantizer.feedback {
        return Err(Error::Argument(format!("`{name}`: error feedback needs the Hessian of the layer's inputs")));
    }
    let (count, columns) = sizes(name, shape)?;
    let block = quantizer.block_size.min(columns);
    let in_row = columns.div_ceil(block);
    let (mut indices, mut scales) = (vec![0_u8; count], vec![f16::ONE; count / columns * in_row]);
    let rows = indices.par_chunks_mut(columns).zip(scales.par_chunks_mut(in_row)).zip(weight.par_chunks(columns));
    rows.enumerate().for_each_init(
        || (vec![0.0; columns], Vec::new()),
        |(wide, levels), (row, ((indices, scales), weight))| {
            weight.convert_to_f32_slice(wide);
            let keep = keep.map(|keep| &keep[row * columns..(row + 1) * columns]);
            if let Some(keep) = keep {
                wide.iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(value, _)| *value = 0.0);
            }
            for (scale, (indices, values)) in scales.iter_mut().zip(indices.chunks_mut(block).zip(wide.chunks(block))) {
                *scale = rounding.scale(largest(values));
                rounding.levels(*scale, levels);
                indices.iter_mut().zip(values).for_each(|(index, value)| *index = nearest(levels, *value));
            }
            if let Some(keep) = keep {
                indices.iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(index, _)| *index = 0);
            }
        },
    );
    let codebook = rounding.codebook(options, [count / columns, columns], scales);
    let kept = keep.map_or(count, |keep| keep.iter().filter(|keep| **keep).count());
    let mut palettized =
        Palettized { name: name.to_owned(), shape: shape.to_owned(), codebook, indices, squared_error: 0.0, kept };
    palettized.squared_error = squared_error(&palettized.decode(keep)?, weight, keep, columns);
    Ok(palettized)
}

#[cfg(test)]
mod tests {
    use squeeze_codebook::{BitWidth, Grid};

    use super::*;

    fn options(bits: BitWidth, grid: Grid, block_size: usize) -> PaletteOptions {
        PaletteOptions { bits, quantizer: Some(Quantizer { grid, block_size, feedback: false }), ..PaletteOptions::default() }
    }

    fn numbers(count: usize) -> Vec<f16> {
        (0..count).map(|at| f16::from_f32(((at * 7919 + at / 3) % 1009) as f32 / 504.0 - 1.0)).collect()
    }

    /// Every value that the block allows is tried.
    #[test]
    fn every_weight_gets_the_nearest_value_of_its_block() {
        let shape = [3, 5, 3, 3];
        let weight = numbers(135);
        let keep: Vec<bool> = (0..135).map(|at| at % 4 > 0).collect();
        for (bits, grid) in [(BitWidth::Four, Grid::Int), (BitWidth::Eight, Grid::Int), (BitWidth::Four, Grid::Nf4)] {
            for (block, in_row) in [(1, 45), (16, 3), (44, 2), (45, 1), (64, 1)] {
                for keep in [None, Some(keep.as_slice())] {
                    let rounded = round("a", &weight, &shape, keep, &options(bits, grid, block)).unwrap();
                    let decoded = rounded.decode(keep).unwrap();
                    let scales = rounded.codebook.scales.as_ref().unwrap();
                    assert_eq!((scales.values.len(), scales.block), (3 * in_row, (block < 45).then_some(block)));
                    let entries = grid.entries(bits).unwrap();
                    let mut squares = 0.0;
                    for (at, value) in weight.iter().enumerate().filter(|(at, _)| keep.is_none_or(|keep| keep[*at])) {
                        let (row, column) = (at / 45, at % 45);
                        let start = row * 45 + column / block * block;
                        let of_block = (start..(start + block).min(row * 45 + 45)).filter(|at| keep.is_none_or(|keep| keep[*at]));
                        let most = of_block.map(|at| weight[at].to_f32().abs()).fold(0.0, f32::max);
                        let scale = f16::from_f32(most / grid.reach(bits));
                        assert_eq!(scales.at(row, column, 45), scale);
                        let error = |to: f16| (to.to_f32() - value.to_f32()).abs();
                        let values = entries.iter().map(|entry| f16::from_f32(entry.to_f32() * scale.to_f32()));
                        let least = values.map(error).fold(f32::INFINITY, f32::min);
                        assert_eq!(error(decoded[at]), least, "{grid:?} {bits} {block} {at}");
                        squares += f64::from(least).powi(2);
                    }
                    assert!((rounded.squared_error - squares).abs() <= 1e-9 * squares);
                }
            }
        }
    }

    #[test]
    fn blocks_at_the_limits_of_fp16_stay_finite() {
        let tiny = f16::from_bits(1);
        let weight = [f16::MIN, f16::MAX, f16::ZERO, tiny, f16::ZERO, f16::NEG_ZERO];
        for (bits, grid) in [(BitWidth::Four, Grid::Int), (BitWidth::Eight, Grid::Int), (BitWidth::Four, Grid::Nf4)] {
            let rounded = round("a", &weight, &[1, 6], None, &options(bits, grid, 2)).unwrap();
            let decoded = rounded.decode(None).unwrap();
            assert!(decoded.iter().all(|value| value.is_finite()), "{decoded:?}");
            assert!(decoded[0] < f16::from_f32(-5e4) && decoded[1] > f16::from_f32(5e4));
            assert!(decoded[2..].iter().all(|value| value.to_f32().abs() <= tiny.to_f32()), "{decoded:?}");
        }
    }

    #[test]
    fn what_fixed_values_cannot_have_is_refused() {
        let int = options(BitWidth::Four, Grid::Int, 2);
        let with = |block_size, feedback| Some(Quantizer { grid: Grid::Int, block_size, feedback });
        let refused = |options: PaletteOptions| round("a", &numbers(4), &[2, 2], None, &options).unwrap_err().to_string();
        let groups = Grouping::PerGroupedChannel { group_size: 1 };
        assert!(refused(PaletteOptions { grouping: groups, ..int }).contains("`a`: fixed values have no groups"));
        assert!(
            refused(PaletteOptions { vector_length: 2, ..int }).contains("no groups of channels, scales of channels or vectors")
        );
        assert!(refused(PaletteOptions { per_channel_scale: true, ..int }).contains("fixed values"));
        assert!(refused(PaletteOptions { bits: BitWidth::Six, ..int }).contains("4 or 8 bits, not 6"));
        assert!(refused(PaletteOptions { quantizer: with(0, false), ..int }).contains("blocks of 0 columns"));
        assert!(refused(PaletteOptions { quantizer: with(2, true), ..int }).contains("needs the Hessian"));
    }
}
