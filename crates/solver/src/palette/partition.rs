//! Cutting a sorted line of weighted points into k clusters with the least sum of squares.
//!
//! Cluster [a, b) costs its sum of squared distances to its mean, and these costs have the Monge
//! property: for a <= b <= c <= d, cost(a, c) + cost(b, d) <= cost(a, d) + cost(b, c). So the least
//! cost with k clusters, F(k), is convex in k, and the best k clusters can be found by giving each
//! cluster a price: the cheapest cut at a price is one shortest path, and the price is adjusted
//! until that path has k clusters (Aggarwal, Schieber, Tokuyama, "Finding a minimum-weight k-link
//! path in graphs with the concave Monge property and applications", 1994).
//!
//! A path takes O(n log n) steps at worst, and about n in practice, for any k. The price is first
//! found on a line with fewer points, of which each stands for a run of neighbours: the path there
//! has few steps, and its price is nearly always right for the whole line too, where a path is then
//! made once. The textbook dynamic program over the number of clusters (as in kmeans1d, with SMAWK)
//! takes k n steps and, to be traced back, k n memory. Here memory is a few numbers a point.
//!
//! Where F is straight over several k, no price may lead to k itself. Then a path with fewer
//! clusters and one with more are both cheapest at the same price, and they cross so that they can
//! be spliced to one with exactly k, which is as cheap.
//!
//! Everything is exact but for the rounding of f64.

use super::path::{Scratch, Sums};

/// A line of weighted points.
///
/// Sums over the points start at zero's place on the line, so that one huge value at an end does
/// not cost the digits of all others.
#[derive(Debug)]
pub(super) struct Line {
    /// The value and the weight of each point, `[n]`.
    points: Vec<(f64, f64)>,
    sums: Sums,
}

/// A partition into clusters, given by the boundaries between them, from 0 to n.
#[derive(Debug, Clone, PartialEq)]
struct Cuts {
    ends: Vec<usize>,
}

impl Cuts {
    fn clusters(&self) -> usize {
        self.ends.len() - 1
    }

    /// The sum of squared distances to the means.
    fn cost(&self, line: &Line) -> f64 {
        self.ends.windows(2).map(|pair| cost(&line.points[pair[0]..pair[1]])).sum()
    }
}

/// The number of guesses of the price before a binary search.
const GUESSES: usize = 6;

impl Line {
    /// The line of points (value, weight), with strictly ascending values and positive weights.
    pub(super) fn new(points: Vec<(f64, f64)>) -> Line {
        let zero = points.partition_point(|&(value, _)| value < 0.0);
        let (left, right) = points.split_at(zero);
        let below = left.iter().map(|(value, weight)| weight * value * value).sum();
        let sums = Sums {
            weights: running_sums([left, right], |&(_, weight)| weight),
            values: running_sums([left, right], |&(value, weight)| weight * value),
            below,
        };
        Line { points, sums }
    }

    /// The number of points on the line.
    fn len(&self) -> usize {
        self.points.len()
    }

    /// The ends of the best `clusters` clusters: `clusters + 1` numbers from 0 to n.
    ///
    /// `price` is a first guess at F(k) - F(k + 1). Any positive number gives the right result, a
    /// good guess gives it faster. There must be at least as many points as clusters, and at least
    /// one cluster.
    pub(super) fn best(&self, clusters: usize, price: f64) -> Vec<usize> {
        let n = self.len();
        if clusters >= n {
            return (0..=n).collect();
        }
        if clusters <= 1 {
            return vec![0, n];
        }
        let mut scratch = Scratch::default();
        let mut guess = self.price_of_thinned(clusters, price, &mut scratch).unwrap_or(price);
        // Paths with fewer and with more clusters than the result.
        let (mut few, mut many) = (Cuts { ends: vec![0, n] }, Cuts { ends: (0..=n).collect() });
        let (mut high, mut low) = (f64::INFINITY, 0.0);
        let mut round = 0;
        loop {
            let inside = low < guess && guess < high;
            let is_chord = if round < GUESSES { !inside } else { round % 2 == 0 || !inside };
            let price = if is_chord { self.chord(&few, &many) } else { guess };
            let ends = self.sums.cheapest(price, &mut scratch);
            let count = ends.len() - 1;
            if count == clusters {
                return ends;
            }
            // By rounding, the cheapest path may be one of these two: then, too, there is no path
            // below the chord.
            if is_chord && !(few.clusters() < count && count < many.clusters()) {
                return splice(&few, &many, clusters);
            }
            if count < clusters {
                high = price;
                if count > few.clusters() {
                    few = Cuts { ends };
                }
            } else {
                low = price;
                if count < many.clusters() {
                    many = Cuts { ends };
                }
            }
            let next = next_price(price, count, clusters);
            round += 1;
            // After some guesses, the range is halved instead.
            guess = if round < GUESSES { next } else { (low * high).sqrt() };
        }
    }

    /// The slope of F between two paths: a price at which both cost the same. If no path between
    /// them is cheaper at this price, F is straight there.
    fn chord(&self, few: &Cuts, many: &Cuts) -> f64 {
        (few.cost(self) - many.cost(self)) / (many.clusters() - few.clusters()) as f64
    }

    /// A price near the middle of those that lead to `clusters` clusters where cuts are only
    /// allowed at every few points; `None` if no price was found, or all points are needed.
    fn price_of_thinned(&self, clusters: usize, price: f64, scratch: &mut Scratch) -> Option<f64> {
        let step = self.thinning(clusters)?;
        let thinned = self.sums.thinned(step);
        let mut count_at = |price: f64| thinned.cheapest(price, scratch).len() - 1;
        let mut price = price;
        let mut tries = 0;
        loop {
            let count = count_at(price);
            if count == clusters {
                break;
            }
            price = next_price(price, count, clusters);
            tries += 1;
            if tries == GUESSES || !price.is_finite() {
                return None;
            }
        }
        // Prices fall as 1 / k^3, so those for k clusters reach over about 3 / k of their value.
        let aside = 1.0 / clusters as f64;
        let [up, down] = [1.0 + aside, 1.0 - aside].map(|factor| count_at(price * factor) == clusters);
        let shift = match (up, down) {
            (true, false) => 0.5 * aside,
            (false, true) => -0.5 * aside,
            (true, true) | (false, false) => 0.0,
        };
        Some(price * (1.0 + shift))
    }

    /// Of how many points one is left on a thinned line; `None` if there are too few points to do
    /// without any.
    fn thinning(&self, clusters: usize) -> Option<usize> {
        /// Points a cluster on a thinned line, which make its price exact enough.
        const ENOUGH: usize = 24;
        /// With fewer points a cluster, its price is no better than the first guess.
        const FEWEST: usize = 6;
        let n = self.len();
        let step = (n / clusters / ENOUGH).max(2);
        (n / clusters / step >= FEWEST).then_some(step)
    }
}

/// The sums of `of` over points from the place between `left` and `right` on to each point.
fn running_sums([left, right]: [&[(f64, f64)]; 2], of: impl Fn(&(f64, f64)) -> f64) -> Vec<f64> {
    let mut sums = vec![0.0; left.len() + 1 + right.len()];
    let (below, above) = sums.split_at_mut(left.len());
    let mut sum = 0.0;
    for (to, point) in below.iter_mut().zip(left).rev() {
        sum += of(point);
        *to = -sum;
    }
    sum = 0.0;
    for (to, point) in above[1..].iter_mut().zip(right) {
        sum += of(point);
        *to = sum;
    }
    sums
}

/// The next guess of the price that leads to `wanted` clusters, after `price` has led to `count`.
/// F falls about as 1 / k^2, so prices fall as 1 / k^3.
fn next_price(price: f64, count: usize, wanted: usize) -> f64 {
    price * (count as f64 / wanted as f64).powi(3)
}

/// The sum of squared distances to the mean.
fn cost(points: &[(f64, f64)]) -> f64 {
    let weight: f64 = points.iter().map(|point| point.1).sum();
    let mean = points.iter().map(|(value, weight)| value * weight).sum::<f64>() / weight;
    points.iter().map(|(value, weight)| weight * (value - mean).powi(2)).sum()
}

/// One path of `clusters` clusters out of one with fewer and one with more that are both cheapest
/// at one price.
///
/// With d the clusters that `few` lacks, there is an i where cluster i + d of `many` lies within
/// cluster i of `few`. The path that goes along `many` to that place and along `few` after it has
/// `clusters` clusters. The path that does the opposite has the remaining ones, and by the Monge
/// property the two together cost no more than `few` and `many`: so each of them is cheapest.
fn splice(few: &Cuts, many: &Cuts, clusters: usize) -> Vec<usize> {
    let lacking = clusters - few.clusters();
    let later = (1..few.ends.len()).find(|&at| many.ends[at + lacking] <= few.ends[at]);
    let later = later.expect("the last end of both paths is n");
    let (head, tail) = (&many.ends[..later + lacking], &few.ends[later..]);
    [head, tail].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(points: &[(f64, f64)], ends: &[usize]) -> f64 {
        ends.windows(2).map(|pair| cost(&points[pair[0]..pair[1]])).sum()
    }

    /// F(k) for k up to `clusters`, by the dynamic program over all beginnings.
    fn least(points: &[(f64, f64)], clusters: usize) -> Vec<f64> {
        let n = points.len();
        let costs: Vec<Vec<f64>> =
            (0..=n).map(|begin| (0..=n).map(|end| if begin < end { cost(&points[begin..end]) } else { 0.0 }).collect()).collect();
        let mut best: Vec<f64> = (0..=n).map(|end| costs[0][end]).collect();
        let mut all = vec![f64::NAN, best[n]];
        for _ in 2..=clusters {
            best = (0..=n).map(|end| (0..=end).map(|cut| best[cut] + costs[cut][end]).fold(f64::INFINITY, f64::min)).collect();
            all.push(best[n]);
        }
        all
    }

    fn check(points: &[(f64, f64)], price: f64) {
        let line = Line::new(points.to_vec());
        let scale: f64 = points.iter().map(|(value, weight)| weight * value * value).sum();
        for (clusters, least) in least(points, points.len()).into_iter().enumerate().skip(1) {
            let ends = line.best(clusters, price);
            assert_eq!(ends.len(), clusters + 1);
            assert_eq!((ends[0], ends[clusters]), (0, points.len()));
            assert!(ends.is_sorted_by(|a, b| a < b), "{ends:?}");
            let ours = total(points, &ends);
            assert!(ours <= least * (1.0 + 1e-9) + scale * 1e-13, "{clusters} clusters: {ours:e}, not {least:e}");
        }
    }

    #[test]
    fn evenly_spaced_points_are_shared_out_evenly_though_no_price_leads_to_most_numbers() {
        for n in [2, 3, 7, 48, 61] {
            check(&(0..n).map(|at| (f64::from(at) - 20.0, 1.0)).collect::<Vec<_>>(), 1.0);
        }
    }

    #[test]
    fn a_huge_value_costs_the_others_no_digits() {
        for huge in [-65504.0, 65504.0] {
            let mut points: Vec<_> = (0..40).map(|at| (f64::from(at * at) * 1e-5 - 0.004, 1.0)).collect();
            let rest = points.clone();
            points.push((huge, 1e6));
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let shift = usize::from(huge < 0.0);
            let ours: Vec<_> = Line::new(points.to_vec()).best(9, 1e-9);
            let alone = Line::new(rest).best(8, 1e-9);
            assert_eq!(&ours[shift..][..9], alone.iter().map(|end| end + shift).collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn equals_the_dynamic_program(
            points in prop::collection::btree_map(-300_i32..300, 1_u32..50, 1..60),
            price in prop::sample::select(vec![1e-12, 1e-3, 1.0, 1e3, 1e12]),
        ) {
            check(&points.into_iter().map(|(value, weight)| (f64::from(value), f64::from(weight))).collect::<Vec<_>>(), price);
        }

        #[test]
        fn equals_the_dynamic_program_where_weights_differ_widely(
            points in prop::collection::btree_map(-30_000_i32..30_000, -20_i32..20, 2..50),
        ) {
            let points: Vec<_> = points.into_iter().map(|(value, power)| (f64::from(value) * 1e-4, f64::from(power).exp2())).collect();
            check(&points, 1e-3);
        }
    }
}
