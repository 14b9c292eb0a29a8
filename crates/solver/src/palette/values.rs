//! The best palette for a set of weighted fp16 values.

use half::f16;
use squeeze_base::error::{Error, Result};

use super::partition::Line;

/// A distinct value with its weight: the number of model weights that have the value, or the sum of
/// their importances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    /// The value, finite.
    pub value: f16,
    /// The weight, positive.
    pub weight: f64,
}

/// The largest sum of weights for which the square of a sum of weighted fp16 values cannot
/// overflow.
const LARGEST_SUM: f64 = 1e140;

/// The best palette of at most `entries` values for `buckets`, which must be strictly ascending:
/// weighted k-means in one dimension, solved to the optimum, without seeds or iterations.
///
/// With at most `entries` buckets the palette is their values. Else it has `entries` values,
/// strictly ascending. No other `entries` real numbers have a smaller sum of weight * (value -
/// nearest entry)^2, up to the rounding of f64. Each entry, the mean of its cluster, is then
/// rounded to fp16, which adds at most weight * (half a unit in its last place)^2 for each bucket.
/// So it need not be the best of all palettes with fp16 entries, but none can be better by more
/// than that.
///
/// Time is about n log n for n buckets, whatever the number of entries; memory some 100 bytes a
/// bucket (6 MB for all of fp16).
///
/// # Errors
/// [`Error::Argument`] if values are not ascending or not finite, if a weight is not positive, if
/// the sum of the weights is above 1e140, or if `entries` is 0.
pub fn optimal_palette(buckets: &[Bucket], entries: usize) -> Result<Vec<f16>> {
    check(buckets, entries)?;
    Ok(palette_of_checked(buckets, entries))
}

/// As [`optimal_palette`], for buckets that are known to be such.
pub(super) fn palette_of_checked(buckets: &[Bucket], entries: usize) -> Vec<f16> {
    if buckets.len() <= entries {
        return buckets.iter().map(|bucket| rounded(bucket.value.to_f64())).collect();
    }
    let line = Line::new(buckets.iter().map(|bucket| (bucket.value.to_f64(), bucket.weight)).collect());
    let ends = line.best(entries, expected_price(buckets, entries));
    let clusters = ends.windows(2).map(|ends| &buckets[ends[0]..ends[1]]);
    // Means lie between the smallest and the largest value of their clusters, which are fp16: so
    // rounding keeps them apart.
    clusters.map(|cluster| rounded(mean(cluster))).collect()
}

/// The value rounded to fp16; a zero has no sign.
fn rounded(value: f64) -> f16 {
    let value = f16::from_f64(value);
    if value == f16::ZERO { f16::ZERO } else { value }
}

fn check(buckets: &[Bucket], entries: usize) -> Result<()> {
    let refuse = |problem: &str| Err(Error::Argument(format!("a palette cannot be made: {problem}")));
    if entries == 0 {
        return refuse("it has no entries");
    }
    if !buckets.is_sorted_by(|a, b| a.value < b.value) || buckets.iter().any(|bucket| !bucket.value.is_finite()) {
        return refuse("the values are not finite or not in ascending order");
    }
    let positive = buckets.iter().all(|bucket| bucket.weight > 0.0);
    if !positive || buckets.iter().map(|bucket| bucket.weight).sum::<f64>() > LARGEST_SUM {
        return refuse(&format!("the weights of the values are not positive, or their sum is above {LARGEST_SUM:e}"));
    }
    Ok(())
}

fn mean(cluster: &[Bucket]) -> f64 {
    let (weight, sum) = cluster
        .iter()
        .fold((0.0, 0.0), |(weight, sum), bucket| (weight + bucket.weight, sum + bucket.weight * bucket.value.to_f64()));
    // Rounding must not move the mean out of its cluster, which has at least one value.
    let (first, last) = (cluster[0].value.to_f64(), cluster[cluster.len() - 1].value.to_f64());
    (sum / weight).max(first).min(last)
}

/// The approximate decrease of the error by one more entry, from the error of a fine quantizer for
/// the density p of the values, (integral of p^(1/3))^3 / (12 k^2) (Panter and Dite, "Quantization
/// distortion in pulse-count modulation", 1951). Its accuracy affects the running time only.
fn expected_price(buckets: &[Bucket], entries: usize) -> f64 {
    let step = (buckets.len() / (16 * entries)).clamp(1, 64);
    let begins = buckets.iter().step_by(step);
    let ends = buckets.iter().skip(step).step_by(step);
    let integral: f64 = begins
        .zip(ends)
        .zip(buckets.chunks(step))
        .map(|((begin, end), bin)| {
            let width = end.value.to_f64() - begin.value.to_f64();
            let weight: f64 = bin.iter().map(|bucket| bucket.weight).sum();
            (weight * width * width).cbrt()
        })
        .sum();
    (integral / entries as f64).powi(3) / 6.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn buckets(points: &[(f64, f64)]) -> Vec<Bucket> {
        points.iter().map(|&(value, weight)| Bucket { value: f16::from_f64(value), weight }).collect()
    }

    fn error(buckets: &[Bucket], palette: &[f16]) -> f64 {
        let nearest = |value: f64| palette.iter().map(|entry| (entry.to_f64() - value).powi(2)).fold(f64::INFINITY, f64::min);
        buckets.iter().map(|bucket| bucket.weight * nearest(bucket.value.to_f64())).sum()
    }

    /// The least error with real entries, by trying every way to cut the line.
    fn brute_force(buckets: &[Bucket], entries: usize) -> f64 {
        let one = |cluster: &[Bucket]| -> f64 {
            let weight: f64 = cluster.iter().map(|bucket| bucket.weight).sum();
            let mean = cluster.iter().map(|bucket| bucket.weight * bucket.value.to_f64()).sum::<f64>() / weight;
            cluster.iter().map(|bucket| bucket.weight * (bucket.value.to_f64() - mean).powi(2)).sum()
        };
        let cuts = buckets.len() - 1;
        let ways = (0_u32..1 << cuts).filter(|way| way.count_ones() as usize == entries - 1);
        ways.map(|way| {
            let mut begin = 0;
            let mut sum = 0.0;
            for at in (0..cuts).filter(|at| way >> at & 1 == 1) {
                sum += one(&buckets[begin..=at]);
                begin = at + 1;
            }
            sum + one(&buckets[begin..])
        })
        .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn no_partition_is_better(
            points in prop::collection::btree_map(-2_000_i16..2_000, 0.01_f64..100.0, 4..=10),
            scale in -14_i32..6,
        ) {
            let points: Vec<_> = points.into_iter().map(|(value, weight)| (f64::from(value) * f64::from(scale).exp2(), weight)).collect();
            let buckets = buckets(&points);
            for entries in 1..=3 {
                let palette = optimal_palette(&buckets, entries).unwrap();
                prop_assert_eq!(palette.len(), entries);
                prop_assert!(palette.is_sorted_by(|a, b| a < b));
                let largest = palette.iter().map(|entry| entry.to_f64().abs()).fold(0.0, f64::max);
                let weight: f64 = points.iter().map(|point| point.1).sum();
                let rounding = weight * (largest * 2_f64.powi(-11)).max(2_f64.powi(-25)).powi(2);
                let (ours, least) = (error(&buckets, &palette), brute_force(&buckets, entries));
                prop_assert!(ours <= least * (1.0 + 1e-9) + rounding, "{} entries: {:e}, not {:e}", entries, ours, least);
            }
        }
    }

    #[test]
    fn few_values_are_kept_as_they_are() {
        let few = buckets(&[(-1.5, 1.0), (0.0, 9.0), (0.25, 2.0)]);
        assert_eq!(optimal_palette(&few, 3).unwrap(), few.iter().map(|bucket| bucket.value).collect::<Vec<_>>());
        assert_eq!(optimal_palette(&few, 16).unwrap().len(), 3);
        assert_eq!(optimal_palette(&[], 4).unwrap(), []);
    }

    #[test]
    fn all_of_fp16_can_be_palettized() {
        let mut all: Vec<_> = (0..=u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()).collect();
        all.sort_by(f16::total_cmp);
        all.dedup();
        let all: Vec<_> = all.into_iter().map(|value| Bucket { value, weight: 1.0 }).collect();
        assert_eq!(all.len(), 63_487);
        for entries in [2, 16, 256] {
            let palette = optimal_palette(&all, entries).unwrap();
            assert!(palette.len() == entries && palette.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn bad_buckets_are_refused() {
        let refused = |points: &[(f64, f64)], entries| optimal_palette(&buckets(points), entries).unwrap_err().is_bad_input();
        assert!(refused(&[(1.0, 1.0)], 0));
        assert!(refused(&[(1.0, 1.0), (1.0, 1.0)], 1));
        assert!(refused(&[(1.0, 1.0), (0.0, 1.0)], 1));
        assert!(refused(&[(f64::NAN, 1.0)], 1));
        assert!(refused(&[(f64::INFINITY, 1.0)], 1));
        assert!(refused(&[(0.0, 1.0), (1.0, 0.0)], 1));
        assert!(refused(&[(0.0, 1.0), (1.0, -1.0)], 1));
        assert!(refused(&[(0.0, 1.0), (1.0, f64::NAN)], 1));
        assert!(refused(&[(0.0, 1.0), (1.0, 1e141)], 1));
        assert!(refused(&[(0.0, 1.0), (1.0, f64::INFINITY)], 1));
    }
}
