//! Weighted k-means of vectors.

use rayon::prelude::*;

use super::points::{Cells, PIECE, Points};
use super::table::VectorTable;

/// The points for each entry on which palettes are searched for, at most; the palette that is found
/// is improved on all points.
const POINTS_AN_ENTRY: usize = 64;

/// The least number of points on which palettes are searched for, if there are as many.
const LEAST_POINTS: usize = 1 << 12;

/// The rounds of [`lloyd`]: their largest number, and the least share by which each must lower the
/// loss for another to follow.
type Rounds = (usize, f64);

/// From each start.
const SEARCH: Rounds = (60, 1e-3);

/// From the best of the results, where it was found on all points.
const REFINEMENT: Rounds = (200, 1e-4);

/// From the best of the results, where it was found on some points.
const ON_ALL: Rounds = (16, 5e-4);

/// Starts at most.
pub(crate) const STARTS: u64 = 24;

/// New starts go on while one of the last ones has lowered the loss by at least this share.
const LEAST_START_GAIN: f64 = 2e-3;

/// Starts without a gain after which there are no more: many where they are cheap, few where many
/// entries make all results alike.
fn patience(points: usize, entries: usize) -> u64 {
    const CHEAP: usize = 1 << 19;
    if points * entries <= CHEAP { 6 } else { 2 }
}

/// At most `entries` vectors that lower the sum of weight * squared distance to the nearest:
/// weighted k-means from at most `starts` seeded starts, of which the best is taken. Points with at
/// most `entries` different vectors give these.
///
/// The result does not depend on the number of threads.
pub(super) fn cluster<const V: usize>(points: &Points<V>, entries: usize, starts: u64) -> Vec<[f32; V]> {
    if let Some(vectors) = distinct(points, entries) {
        return vectors;
    }
    let most = (POINTS_AN_ENTRY * entries).max(LEAST_POINTS);
    let is_thin = points.len() > most;
    let thin = if is_thin { points.thinned(most) } else { Points::default() };
    let searched = if is_thin { &thin } else { points };
    let mut best: Option<(f64, Vec<[f32; V]>)> = None;
    let (mut last_gain, patience) = (0, patience(searched.len(), entries));
    for start in 0..starts.max(1) {
        let (loss, vectors) = lloyd(searched, spread(searched, entries, start), SEARCH);
        let before = best.as_ref().map_or(f64::INFINITY, |(loss, _)| *loss);
        if loss < before * (1.0 - LEAST_START_GAIN) {
            last_gain = start;
        }
        if loss < before {
            best = Some((loss, vectors));
        }
        if start >= last_gain + patience {
            break;
        }
    }
    let (_, vectors) = best.expect("the first start has a loss that is a number");
    lloyd(points, vectors, if is_thin { ON_ALL } else { REFINEMENT }).1
}

/// The different vectors, if there are at most `most`, in ascending order.
fn distinct<const V: usize>(points: &Points<V>, most: usize) -> Option<Vec<[f32; V]>> {
    // A zero has no sign.
    let key = |vector: &[f32; V]| vector.map(|value| (value + 0.0).to_bits());
    let mut seen = std::collections::BTreeSet::new();
    for vector in &points.vectors {
        seen.insert(key(vector));
        if seen.len() > most {
            return None;
        }
    }
    Some(seen.into_iter().map(|bits| bits.map(f32::from_bits)).collect())
}

/// `entries` of the points to start from: each is drawn with a probability proportional to its
/// weight and its squared distance to those drawn before (k-means++, Arthur and Vassilvitskii
/// 2007).
fn spread<const V: usize>(points: &Points<V>, entries: usize, seed: u64) -> Vec<[f32; V]> {
    let mut random = SplitMix(seed);
    let mut costs: Vec<f32> = points.weights.clone();
    let mut vectors: Vec<[f32; V]> = Vec::with_capacity(entries);
    while vectors.len() < entries {
        let sum = |costs: &[f32]| costs.iter().map(|cost| f64::from(*cost)).sum::<f64>();
        // Few points are sooner done than shared out.
        let sums = if costs.len() <= PIECE { vec![sum(&costs)] } else { costs.par_chunks(PIECE).map(sum).collect() };
        let Some(drawn) = draw(&costs, &sums, random.share()) else { break };
        let vector = points.vectors[drawn];
        let is_first = vectors.is_empty();
        vectors.push(vector);
        let lower = |costs: &mut [f32], vectors: &[[f32; V]], weights: &[f32]| {
            for ((cost, other), weight) in costs.iter_mut().zip(vectors).zip(weights) {
                let distance: f32 = other.iter().zip(vector).map(|(a, b)| (a - b) * (a - b)).sum();
                *cost = if is_first { weight * distance } else { cost.min(weight * distance) };
            }
        };
        if costs.len() <= PIECE {
            lower(&mut costs, &points.vectors, &points.weights);
        } else {
            let vectors = points.vectors.par_chunks(PIECE).zip(points.weights.par_chunks(PIECE));
            costs.par_chunks_mut(PIECE).zip(vectors).for_each(|(costs, (vectors, weights))| lower(costs, vectors, weights));
        }
    }
    vectors
}

/// The number whose part of the sum of `costs` is at `share`; `sums` are those of its pieces.
/// `None` if all are zero.
fn draw(costs: &[f32], sums: &[f64], share: f64) -> Option<usize> {
    let mut left = share * sums.iter().sum::<f64>();
    let piece = sums.iter().position(|sum| {
        let is_here = left < *sum;
        left -= if is_here { 0.0 } else { *sum };
        is_here
    });
    // Rounding may leave a little after the last piece.
    let piece = piece.or_else(|| sums.iter().rposition(|sum| *sum > 0.0))?;
    let first = piece * PIECE;
    let costs = &costs[first..costs.len().min(first + PIECE)];
    let here = costs.iter().position(|cost| {
        left -= f64::from(*cost);
        left < 0.0
    });
    here.or_else(|| costs.iter().rposition(|cost| *cost > 0.0)).map(|at| first + at)
}

/// Moves each vector to the mean of its points, as often as `rounds` say. A vector without points
/// goes to the point of the largest error. Returns the loss of the vectors before the last round,
/// and the vectors.
fn lloyd<const V: usize>(points: &Points<V>, mut vectors: Vec<[f32; V]>, (rounds, least_gain): Rounds) -> (f64, Vec<[f32; V]>) {
    let mut before = f64::INFINITY;
    for _ in 0..rounds {
        let Cells { cells, loss, farthest } = points.cells(&VectorTable::new(&vectors), vectors.len());
        let mut is_free = loss > 0.0;
        for (vector, cell) in vectors.iter_mut().zip(&cells) {
            if cell.weight > 0.0 {
                *vector = cell.sum.map(|sum| (sum / cell.weight) as f32);
            } else if std::mem::take(&mut is_free) {
                *vector = points.vectors[farthest.0];
            }
        }
        if loss >= before * (1.0 - least_gain) {
            return (loss, vectors);
        }
        before = loss;
    }
    (before, vectors)
}

/// Random numbers: `SplitMix64` (Steele, Lea and Flood 2014).
struct SplitMix(u64);

impl SplitMix {
    /// A number from 0 to 1, 1 excluded.
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Around `centres` points of a square grid, each of them `copies` times.
    fn grid(copies: usize) -> Points<2> {
        let mut points = Points::default();
        let mut random = SplitMix(7);
        for centre in 0..16 {
            for _ in 0..copies {
                let off = || 0.02 * (random.share() as f32 - 0.5);
                let mut off = off;
                points.push([(centre % 4) as f32 + off(), (centre / 4) as f32 + off()], 1.0);
            }
        }
        points
    }

    fn loss<const V: usize>(points: &Points<V>, vectors: &[[f32; V]]) -> f64 {
        points.cells(&VectorTable::new(vectors), vectors.len()).loss
    }

    #[test]
    fn clusters_are_found_on_all_points_and_on_some() {
        for copies in [20, 2 * LEAST_POINTS / 16] {
            let points = grid(copies);
            let vectors = cluster(&points, 16, STARTS);
            let mean = loss(&points, &vectors) / points.len() as f64;
            // The variance of two numbers that are even over 0.02.
            assert!(mean < 1.01 * 2.0 * 0.02_f64.powi(2) / 12.0, "{mean:e} with {copies}");
        }
    }

    #[test]
    fn few_vectors_are_kept_as_they_are() {
        let mut points = Points::default();
        for at in 0..100 {
            points.push([(at % 3) as f32, -((at % 3) as f32)], 1.0);
        }
        assert_eq!(cluster(&points, 4, STARTS), [[0.0, 0.0], [1.0, -1.0], [2.0, -2.0]]);
        assert!(cluster(&Points::<2>::default(), 4, STARTS).is_empty());
    }

    #[test]
    fn points_of_weight_zero_do_not_count() {
        let mut points = Points::default();
        for at in 0..64 {
            let is_counted = at < 32;
            let place = if is_counted { f32::from(at as u8) / 100.0 } else { 1000.0 + f32::from(at as u8) };
            points.push([place, place], if is_counted { 1.0 } else { 0.0 });
        }
        assert!(cluster(&points, 8, STARTS).iter().flatten().all(|value| (0.0..0.32).contains(value)));
    }

    #[test]
    fn the_result_does_not_depend_on_the_threads() {
        let points = grid(3000);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| cluster(&points, 13, STARTS))
        };
        assert_eq!(with(1), with(3));
    }
}
