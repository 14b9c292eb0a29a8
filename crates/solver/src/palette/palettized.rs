//! A weight as palettes and indices.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::Codebook;

/// A weight [o, i, ...] as indices into palettes. [`decode`](Self::decode) restores the weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Palettized {
    /// The layer's name, for errors.
    pub name: String,
    /// The weight's shape, [o, i, ...].
    pub shape: Vec<usize>,
    /// The palettes, each ascending (vectors by their first values, then by the next). A palette
    /// with fewer distinct values repeats the last one, and no index refers to the repetitions. The
    /// palette of a completely pruned group is zeros.
    pub codebook: Codebook,
    /// [o, i, ...]: the palette entry of each weight; 0 where pruned, and meaningless there. With
    /// vectors, [o / V, i, ...].
    pub indices: Vec<u8>,
    /// The sum over kept weights of (decoded weight - weight)^2.
    pub squared_error: f64,
    /// The number of kept weights.
    pub kept: usize,
}

impl Palettized {
    /// The weights, [o, i, ...] row-major; zero where `keep` is false: see [`Codebook::decode`].
    ///
    /// # Errors
    /// [`Error::Argument`] if `keep` has another length than the weight, or if the fields disagree:
    /// too few indices, palettes or scales for the shape, an index that no palette has.
    pub fn decode(&self, keep: Option<&[bool]>) -> Result<Vec<f16>> {
        let decoded = self.codebook.decode(&self.shape, &self.indices, keep);
        decoded.map_err(|problem| Error::Argument(format!("`{}`: {problem}", self.name)))
    }
}

/// Checks that a mask has `count` entries.
pub(super) fn check_mask(name: &str, keep: Option<&[bool]>, count: usize) -> Result<()> {
    match keep {
        Some(keep) if keep.len() != count => {
            Err(Error::shape(format!("`{name}`: the mask"), [keep.len() as i64], format!("[{count}]")))
        }
        Some(_) | None => Ok(()),
    }
}

/// Applies a function to fp16 values in fp32, block by block, because `half` converts blocks much
/// faster than single values.
pub(super) fn change(values: &mut [f16], how: impl Fn(f32) -> f32) {
    let mut wide = [0.0_f32; 512];
    for block in values.chunks_mut(wide.len()) {
        let wide = &mut wide[..block.len()];
        block.convert_to_f32_slice(wide);
        wide.iter_mut().for_each(|value| *value = how(*value));
        block.convert_from_f32_slice(wide);
    }
}

/// The sum over kept weights of (decoded - weight)^2, in an order that does not depend on the
/// number of threads.
pub(super) fn squared_error(decoded: &[f16], weight: &[f16], keep: Option<&[bool]>, row: usize) -> f64 {
    let of_row = |at: usize, decoded: &[f16], weight: &[f16]| {
        let keep = keep.and_then(|keep| keep.chunks(row).nth(at));
        let mut wide = [[0.0_f32; 512]; 2];
        let [a, b] = &mut wide;
        let mut sum = 0.0;
        for (block, (decoded, weight)) in decoded.chunks(512).zip(weight.chunks(512)).enumerate() {
            let (a, b) = (&mut a[..decoded.len()], &mut b[..weight.len()]);
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
