//! Weights with so few distinct values that their palettes represent them exactly.

use squeeze_base::error::Result;
use squeeze_codebook::Grouping;
use tch::Tensor;

use super::options::{JointOptions, finds_jointly};
use crate::matrix::to_vec;

/// The values of a weight [o, d], row by row, if palettes represent them exactly; `None` if some
/// group has more distinct values than its palette has entries, or the weight is pruned. Not for
/// vectors.
///
/// For ordinary weights only a few elements are read, because the first elements of a group already
/// have too many distinct values.
pub(super) fn palettes_can_hold(weight: &Tensor, options: &JointOptions) -> Result<Option<Vec<f32>>> {
    let (None, Some(palette)) = (&options.prune, &options.palettize) else { return Ok(None) };
    if !finds_jointly(palette) || palette.vector_length > 1 {
        return Ok(None);
    }
    let (rows, columns) = weight.size2()?;
    let group_rows = match palette.grouping {
        Grouping::PerTensor => rows as usize,
        Grouping::PerGroupedChannel { group_size } => group_size,
    };
    let values = to_vec(weight)?;
    let fits = values.chunks(group_rows * columns as usize).all(|group| has_at_most(group, palette.bits.entries()));
    Ok(fits.then_some(values))
}

/// Whether there are at most `most` distinct numbers.
fn has_at_most(numbers: &[f32], most: usize) -> bool {
    let mut seen: Vec<f32> = Vec::new();
    numbers.iter().all(|number| {
        if !seen.contains(number) {
            seen.push(*number);
        }
        seen.len() <= most
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_numbers_are_counted() {
        assert!(has_at_most(&[], 1) && has_at_most(&[0.0, -0.0, 0.0], 1) && has_at_most(&[1.0, 2.0, 1.0], 2));
        assert!(!has_at_most(&[1.0, 2.0, 1.0, 3.0], 2));
    }
}
