//! The size of a compressed weight in the container.

use squeeze_codebook::{Grouping, NmRatio, PaletteOptions, PruneMethod, Sparsity};

use super::layer::LayerRecipe;

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
/// vectors, one mask bit and n bits each, and entries of as many values. With fixed values, an fp16
/// scale for each block of columns.
#[must_use]
pub fn stored_bytes(shape: &[i64], recipe: &LayerRecipe) -> u64 {
    let o = shape.first().copied().unwrap_or(0).unsigned_abs();
    let d = shape.iter().skip(1).product::<i64>().unsigned_abs();
    let length = vector_length(recipe);
    let mask = if recipe.prune.is_some() { (o / length * d).div_ceil(8) } else { 0 };
    let kept = kept(o, d, recipe);
    let values = match &recipe.palettize {
        None => 2 * kept,
        Some(PaletteOptions { bits, grouping, axis, per_channel_scale, vector_length: _, quantizer }) => {
            let palettes = match grouping {
                Grouping::PerTensor => 1,
                Grouping::PerGroupedChannel { group_size } => {
                    shape.get(*axis).copied().unwrap_or(1).unsigned_abs() / (*group_size).max(1) as u64
                }
            };
            let indices = (kept / length * u64::from(bits.bits())).div_ceil(8);
            let scales = match quantizer {
                Some(quantizer) => o * d.div_ceil(quantizer.block_size.max(1) as u64),
                None if *per_channel_scale => o,
                None => 0,
            };
            indices + palettes * 2 * length * bits.entries() as u64 + 2 * scales
        }
    };
    mask + values
}

#[cfg(test)]
mod tests {
    use half::f16;
    use squeeze_codebook::{BitWidth, Codebook, PruneOptions};
    use squeeze_container::CompressedWeight;

    use super::*;

    fn recipe(method: PruneMethod, sparsity: Option<Sparsity>, palettize: PaletteOptions) -> LayerRecipe {
        let prune = sparsity.map(|sparsity| PruneOptions { sparsity, block: 16, ..PruneOptions::default() });
        LayerRecipe { method, prune, palettize: Some(palettize), joint: None }
    }

    /// A weight [24, 40] of which as many vectors are kept as the plan says.
    #[test]
    fn planned_bytes_are_those_of_a_weight_that_keeps_as_many_vectors() {
        let grouped = Grouping::PerGroupedChannel { group_size: 12 };
        for (bits, grouping, vector_length) in [
            (BitWidth::Six, grouped, 1),
            (BitWidth::Six, grouped, 2),
            (BitWidth::Eight, Grouping::PerTensor, 4),
            (BitWidth::Three, grouped, 4),
        ] {
            let options = PaletteOptions { bits, grouping, vector_length, ..PaletteOptions::default() };
            let rows = 24 / vector_length as u64;
            // Two blocks of 16 columns and one of 8, with one vector more pruned in each.
            let share = |columns: u64| (rows * columns * 2 / 5) + 1;
            let cases = [
                (recipe(PruneMethod::SparseGpt, None, options), rows * 40),
                (
                    recipe(PruneMethod::SparseGpt, Some(Sparsity::Unstructured(0.4)), options),
                    rows * 40 - 2 * share(16) - share(8),
                ),
                (recipe(PruneMethod::Magnitude, Some(Sparsity::Unstructured(0.25)), options), rows * 30),
                (recipe(PruneMethod::SparseGpt, Some(Sparsity::NOfM(NmRatio { n: 1, m: 4 })), options), rows * 30),
            ];
            for (recipe, vectors) in cases {
                assert_eq!(kept(24, 40, &recipe), vectors * vector_length as u64, "{recipe:?}");
                let keep: Vec<bool> = (0..rows * 40).map(|vector| vector < vectors).collect();
                let group_size = grouping.group_size().unwrap_or(24);
                let palettes = vec![f16::ONE; 24 / group_size * bits.entries() * vector_length];
                let codebook = Codebook { bits, axis: 0, group_size, vector_length, palettes, scales: None };
                let keep = recipe.prune.map(|_| keep);
                let weight =
                    CompressedWeight::palettized(vec![24, 40], keep.as_deref(), codebook, &vec![0; rows as usize * 40]).unwrap();
                assert_eq!(stored_bytes(&[24, 40], &recipe), weight.stored_bytes(), "{recipe:?}");
            }
        }
    }
}
