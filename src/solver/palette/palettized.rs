//! A weight as palettes and indices.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::layout::{Layout, sizes};
use crate::error::{Error, Result};

/// A weight [o, i, ...] as indices into palettes. With [`decode`](Self::decode) it is a weight again.
#[derive(Debug, Clone, PartialEq)]
pub struct Palettized {
    /// The layer's name, for errors.
    pub name: String,
    /// The weight's shape, [o, i, ...].
    pub shape: Vec<usize>,
    /// Bits of an index.
    pub bits: u8,
    /// The dimension that is cut into groups: 0 for output channels, 1 for input channels.
    pub axis: usize,
    /// Channels in a group. Per tensor: all output channels.
    pub group_size: usize,
    /// [groups, 2^bits], each palette ascending. One with fewer distinct values repeats its last; the repeated ones have no
    /// index. The palette of a group that is pruned whole is zeros.
    pub palettes: Vec<f16>,
    /// [o, i, ...]: the palette entry of each weight; 0 where pruned, and meaningless there.
    pub indices: Vec<u8>,
    /// `[o]`: what the palette's values are multiplied by, if each output channel has a scale.
    pub scales: Option<Vec<f16>>,
    /// The sum over kept weights of (decoded weight - weight)^2.
    pub squared_error: f64,
    /// Weights that were kept.
    pub kept: usize,
    /// Why the groups are smaller than was asked for, if they are.
    pub misfit: Option<String>,
}

impl Palettized {
    /// How many palettes there are.
    pub fn groups(&self) -> usize {
        self.palettes.len() >> self.bits.min(8)
    }

    /// The weights, [o, i, ...] row-major: the palette entry of each or, with scales, entry times scale computed in fp32 and
    /// rounded to fp16. Zero where `keep` says no.
    ///
    /// # Errors
    /// [`Error::Argument`] if `keep` has another length than the weight, or if the fields disagree: too few indices, palettes
    /// or scales for the shape, an index that no palette has.
    pub fn decode(&self, keep: Option<&[bool]>) -> Result<Vec<f16>> {
        let layout = Layout::new(&self.name, &self.shape, self.axis, self.group_size)?;
        let (count, row) = sizes(&self.name, &self.shape)?;
        let refuse = |problem: String| Err(Error::Argument(format!("`{}`: {problem}", self.name)));
        let entries = 1_usize << self.bits.min(8);
        if self.indices.len() != count || self.palettes.len() != layout.groups * entries {
            let (indices, values) = (self.indices.len(), self.palettes.len());
            return refuse(format!("{indices} indices and {values} palette values do not fit the shape {:?}", self.shape));
        }
        if let Some(scales) = self.scales.as_ref().filter(|scales| scales.len() != count / row) {
            return refuse(format!("{} scales for {} output channels", scales.len(), count / row));
        }
        check_mask(&self.name, keep, count)?;
        if let Some(index) = self.indices.iter().find(|&&index| usize::from(index) >= entries) {
            return refuse(format!("index {index} in a palette of {entries}"));
        }

        // A row at a time, for a row has one scale, and in it the group changes every `span` weights at most.
        let inner: usize = self.shape.iter().skip(2).product();
        let span = if self.axis == 0 { row } else { self.group_size * inner };
        let mut decoded = vec![f16::ZERO; count];
        decoded.par_chunks_mut(row).zip(self.indices.par_chunks(row)).enumerate().for_each(|(output, (out, indices))| {
            let first = if self.axis == 0 { output / self.group_size } else { 0 };
            let palettes = self.palettes.chunks_exact(entries).skip(first);
            for ((out, indices), palette) in out.chunks_mut(span).zip(indices.chunks(span)).zip(palettes) {
                for (out, &index) in out.iter_mut().zip(indices) {
                    *out = palette.get(usize::from(index)).copied().unwrap_or(f16::ZERO);
                }
            }
            if let Some(&scale) = self.scales.as_ref().and_then(|scales| scales.get(output)) {
                multiply(out, scale);
            }
            if let Some(keep) = keep.and_then(|keep| keep.chunks(row).nth(output)) {
                out.iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(out, _)| *out = f16::ZERO);
            }
        });
        Ok(decoded)
    }
}

/// Whether a mask is for `count` weights.
pub(super) fn check_mask(name: &str, keep: Option<&[bool]>, count: usize) -> Result<()> {
    match keep {
        Some(keep) if keep.len() != count => {
            Err(Error::Argument(format!("`{name}`: a mask of {} entries for {count} weights", keep.len())))
        }
        _ => Ok(()),
    }
}

/// Products in fp32, rounded to fp16.
fn multiply(values: &mut [f16], scale: f16) {
    let scale = scale.to_f32();
    change(values, |value| value * scale);
}

/// Changes fp16 values in fp32, a block at a time: half converts blocks much faster than single values.
pub(super) fn change(values: &mut [f16], how: impl Fn(f32) -> f32) {
    let mut wide = [0.0_f32; 512];
    for block in values.chunks_mut(wide.len()) {
        let Some(wide) = wide.get_mut(..block.len()) else { continue };
        block.convert_to_f32_slice(wide);
        wide.iter_mut().for_each(|value| *value = how(*value));
        block.convert_from_f32_slice(wide);
    }
}

/// The sum over kept weights of (decoded - weight)^2, in an order that does not depend on the number of threads.
pub(super) fn squared_error(decoded: &[f16], weight: &[f16], keep: Option<&[bool]>, row: usize) -> f64 {
    let of_row = |at: usize, decoded: &[f16], weight: &[f16]| {
        let keep = keep.and_then(|keep| keep.chunks(row).nth(at));
        let mut wide = [[0.0_f32; 512]; 2];
        let [a, b] = &mut wide;
        let mut sum = 0.0;
        for (block, (decoded, weight)) in decoded.chunks(512).zip(weight.chunks(512)).enumerate() {
            let (Some(a), Some(b)) = (a.get_mut(..decoded.len()), b.get_mut(..weight.len())) else { continue };
            decoded.convert_to_f32_slice(a);
            weight.convert_to_f32_slice(b);
            let keep = keep.and_then(|keep| keep.chunks(512).nth(block));
            let squares = a.iter().zip(b.iter()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
            sum += match keep {
                Some(keep) => squares.zip(keep).map(|(square, keep)| if *keep { square } else { 0.0 }).sum::<f64>(),
                None => squares.sum(),
            };
        }
        sum
    };
    let rows = decoded.par_chunks(row).zip(weight.par_chunks(row)).enumerate();
    let sums: Vec<f64> = rows.map(|(at, (decoded, weight))| of_row(at, decoded, weight)).collect();
    sums.iter().sum()
}
