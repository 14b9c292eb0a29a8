//! The size of a compressed weight in the container.

use squeeze_codebook::{Grouping, NmRatio, PaletteOptions, PruneMethod, Sparsity};

use crate::recipe::LayerRecipe;

/// Elements of a weight [o, d] that `recipe` keeps. With palettes of vectors, whole vectors of
/// output channels are pruned.
///
/// SparseGPT prunes one element more than the share in each block of columns, as coremltools does:
/// see [`squeeze_solver::prune`].
#[must_use]
pub fn kept(o: u64, d: u64, recipe: &LayerRecipe) -> u64 {
    let length = vector_length(recipe);
    length * kept_vectors(o / length, d, recipe)
}

/// The output channels that share an index and a bit of the mask.
fn vector_length(recipe: &LayerRecipe) -> u64 {
    recipe.palettize.map_or(1, |options| options.vector_length.max(1)) as u64
}

/// Of [o, d] elements or vectors, those that `recipe` keeps.
fn kept_vectors(o: u64, d: u64, recipe: &LayerRecipe) -> u64 {
    let Some(options) = &recipe.prune else { return o * d };
    match options.sparsity {
        Sparsity::Unstructured(share) if recipe.method == PruneMethod::Magnitude => o * d - ((o * d) as f64 * share) as u64,
        Sparsity::Unstructured(share) if share > 0.0 => {
            let block = (options.block as u64).clamp(1, d);
            let pruned = |columns: u64| if columns == 0 { 0 } else { ((o * columns) as f64 * share) as u64 + 1 };
            o * d - d / block * pruned(block) - pruned(d % block)
        }
        Sparsity::Unstructured(_) => o * d,
        Sparsity::NOfM(NmRatio { n, m }) => o * (d - d / m as u64 * n as u64),
    }
}

/// Bytes of a weight [o, d] in the container: mask, indices, palettes and scales, or the kept
/// values.
///
/// `design`: one mask bit an element, n bits a kept element, 2^n fp16 entries a palette. With
/// vectors, one mask bit and n bits each, and entries of as many values.
#[must_use]
pub fn stored_bytes(shape: &[i64], recipe: &LayerRecipe) -> u64 {
    let o = shape.first().copied().unwrap_or(0).unsigned_abs();
    let d = shape.iter().skip(1).product::<i64>().unsigned_abs();
    let length = vector_length(recipe);
    let mask = if recipe.prune.is_some() { (o / length * d).div_ceil(8) } else { 0 };
    let kept = kept(o, d, recipe);
    let values = match &recipe.palettize {
        None => 2 * kept,
        Some(PaletteOptions { bits, grouping, axis, per_channel_scale, vector_length: _ }) => {
            let palettes = match grouping {
                Grouping::PerTensor => 1,
                Grouping::PerGroupedChannel { group_size } => {
                    shape.get(*axis).copied().unwrap_or(1).unsigned_abs() / (*group_size).max(1) as u64
                }
            };
            let indices = (kept / length * u64::from(bits.bits())).div_ceil(8);
            indices + palettes * 2 * length * bits.entries() as u64 + if *per_channel_scale { 2 * o } else { 0 }
        }
    };
    mask + values
}
