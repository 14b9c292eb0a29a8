//! Which size to solve next, and when enough sizes are solved.

use serde::Serialize;

use crate::compress::{Expected, MeanBits};

/// A size that was solved and judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub bits: MeanBits,
    /// Bytes of its container.
    pub bytes: u64,
    pub is_reached: bool,
    /// The logarithm of its error over the one that is asked for.
    pub excess: f64,
}

/// Why a search ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// A size that is smaller by at most one per cent does not reach the target.
    WithinOnePercent,
    /// No other size lies between the result and one that does not reach the target.
    NothingBetween,
    /// The smallest settings of all layers reach the target.
    Smallest,
    /// As many sizes were solved as were allowed.
    Solves,
    /// The settings of least error do not reach the target.
    Largest,
}

/// The next step of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Solve(MeanBits),
    End(Ending),
}

/// A search for the smallest size that reaches a target.
///
/// The expected error of a size is off by a factor that changes little from size to size. So the
/// next size is the one at which the expected error, times the factor that was found at the sizes
/// solved so far, is the one that is asked for. It is the secant method on the logarithm of this
/// factor; sizes that are solved on both sides bound it, as in bisection.
pub(super) struct Search<'a> {
    /// What a size is expected to be like; `None` if the bits are too few for any settings.
    pub expected: &'a dyn Fn(MeanBits) -> Option<Expected>,
    /// The fewest bits, at which `expected` is something, and the most.
    pub ends: (MeanBits, MeanBits),
    /// Bytes of a result for each thousandth of a bit.
    pub bytes_of_thousandth: f64,
    /// The expected error at which the target is reached before anything is known.
    pub first_error: f64,
    /// The most sizes to solve.
    pub solves: usize,
}

/// A size is close enough if one that is smaller by this share does not reach the target.
const CLOSE: f64 = 0.01;
/// The least share by which the next size differs from those that are solved. If it turns out to be
/// on the other side, the search is over.
const APART: f64 = 0.008;
/// The logarithm of the error over the target's that is aimed at.
const AIM: f64 = -0.02;
/// What is aimed at where only one solve is left and nothing has reached the target.
const LAST_AIM: f64 = -0.5;

impl Search<'_> {
    /// The next step after `points`.
    pub(super) fn next(&self, points: &[Point]) -> Step {
        let upper = smallest_reached(points);
        let below = |point: &&Point| !point.is_reached && upper.is_none_or(|upper| point.bits < upper.bits);
        let lower = points.iter().filter(below).max_by_key(|point| point.bits);
        let (least, most) = (self.ends.0.thousandths(), self.ends.1.thousandths());
        match (lower, upper) {
            (Some(lower), Some(upper)) if upper.bytes as f64 <= lower.bytes as f64 * (1.0 + CLOSE) => {
                return Step::End(Ending::WithinOnePercent);
            }
            (Some(lower), Some(upper)) if upper.bits.thousandths() <= lower.bits.thousandths() + 1 => {
                return Step::End(Ending::NothingBetween);
            }
            (None, Some(upper)) if upper.bits.thousandths() <= least => return Step::End(Ending::Smallest),
            (Some(lower), None) if lower.bits.thousandths() >= most => return Step::End(Ending::Largest),
            _ => {}
        }
        if points.len() >= self.solves {
            return Step::End(Ending::Solves);
        }
        let low = lower.map_or(least, |lower| lower.bits.thousandths() + 1);
        let high = upper.map_or(most, |upper| upper.bits.thousandths() - 1);
        let aim = if upper.is_none() && !points.is_empty() && points.len() + 1 == self.solves { LAST_AIM } else { AIM };
        let root = self.root((lower, upper), (low, high), aim);
        let next = self.apart(root, (lower, upper)).clamp(low, high);
        self.other_than(next, (lower, upper), (low, high))
    }

    /// The fewest bits at which the error is expected to be what is aimed at.
    fn root(&self, (lower, upper): Bracket<'_>, (low, high): (u32, u32), aim: f64) -> u32 {
        let offset = |point: &Point| {
            let error = self.error(point.bits.thousandths());
            (error > 0.0).then(|| (f64::from(point.bits.thousandths()), point.excess - error.ln()))
        };
        let offset_at = |bits: u32| match (lower.and_then(offset), upper.and_then(offset)) {
            (Some((a, at_a)), Some((b, at_b))) => at_a + (at_b - at_a) * (f64::from(bits) - a) / (b - a),
            (Some((_, offset)), None) | (None, Some((_, offset))) => offset,
            (None, None) => -self.first_error.ln(),
        };
        let is_enough = |bits: u32| {
            let error = self.error(bits);
            error <= 0.0 || error.ln() + offset_at(bits) <= aim
        };
        first(low, high, is_enough).unwrap_or(high)
    }

    /// `bits`, or the nearest that are far enough from the solved sizes.
    fn apart(&self, bits: u32, (lower, upper): Bracket<'_>) -> u32 {
        let distance = |point: &Point| ((APART * point.bytes as f64 / self.bytes_of_thousandth) as u32).max(1);
        let from_lower = lower.map(|lower| lower.bits.thousandths() + distance(lower));
        let from_upper = upper.map(|upper| upper.bits.thousandths().saturating_sub(distance(upper)));
        match (from_lower, from_upper) {
            (Some(low), Some(high)) if low >= high => u32::midpoint(low, high),
            (low, high) => bits.max(low.unwrap_or(0)).min(high.unwrap_or(u32::MAX)),
        }
    }

    /// The step to `bits`, or to the nearest with settings that neither of the solved sizes has.
    fn other_than(&self, bits: u32, (lower, upper): Bracket<'_>, (low, high): (u32, u32)) -> Step {
        let bytes = |bits: u32| self.bytes(bits);
        let of = |point: Option<&Point>| point.map(|point| bytes(point.bits.thousandths()));
        let (of_lower, of_upper) = (of(lower), of(upper));
        let is_new = |bits: u32| of_lower != Some(bytes(bits)) && of_upper != Some(bytes(bits));
        if is_new(bits) {
            return Step::Solve(MeanBits::of_thousandths(bits));
        }
        let above = || first(bits, high, |at| of_lower.is_none_or(|lower| bytes(at) > lower)).filter(|at| is_new(*at));
        let below = || {
            let at = first(low, bits, |at| of_upper.is_some_and(|upper| bytes(at) >= upper))?;
            at.checked_sub(1).filter(|at| *at >= low && is_new(*at))
        };
        match (above().or_else(below), lower, upper) {
            (Some(bits), ..) => Step::Solve(MeanBits::of_thousandths(bits)),
            (None, None, _) => Step::End(Ending::Smallest),
            (None, Some(_), Some(_)) => Step::End(Ending::NothingBetween),
            (None, Some(_), None) => Step::End(Ending::Largest),
        }
    }

    fn error(&self, bits: u32) -> f64 {
        (self.expected)(MeanBits::of_thousandths(bits)).map_or(f64::INFINITY, |expected| expected.error)
    }

    fn bytes(&self, bits: u32) -> u64 {
        (self.expected)(MeanBits::of_thousandths(bits)).map_or(0, |expected| expected.payload_bytes)
    }
}

/// The largest size that is known not to reach the target, below the smallest that does.
type Bracket<'p> = (Option<&'p Point>, Option<&'p Point>);

/// The smallest of the points that reach the target.
pub(super) fn smallest_reached(points: &[Point]) -> Option<&Point> {
    points.iter().filter(|point| point.is_reached).min_by_key(|point| (point.bytes, point.bits))
}

/// The first of `low..=high` for which `is_true` holds, which holds for all after it.
fn first(mut low: u32, high: u32, is_true: impl Fn(u32) -> bool) -> Option<u32> {
    if low > high || !is_true(high) {
        return None;
    }
    let mut high = high;
    while low < high {
        let middle = u32::midpoint(low, high);
        if is_true(middle) { high = middle } else { low = middle + 1 }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes of a made-up model for each thousandth of a bit.
    const BYTES: f64 = 1000.0;

    /// Runs a search in which sizes grow in steps of `step` thousandths, and errors are as expected
    /// but for `off`, a logarithm. Returns the points, and why it ended.
    fn searched(target: f64, step: u32, solves: usize, off: impl Fn(f64) -> f64) -> (Vec<Point>, Ending) {
        let expected = |bits: MeanBits| {
            let bits = (bits.thousandths() / step * step).max(1_500);
            let error = if bits >= 16_000 { 0.0 } else { 0.5 * f64::exp(-1.4 * f64::from(bits) / 1000.0) };
            Some(Expected { payload_bytes: (BYTES * f64::from(bits)) as u64, error })
        };
        let ends = (MeanBits::of_thousandths(1_500), MeanBits::of_thousandths(16_000));
        let search = Search { expected: &expected, ends, bytes_of_thousandth: BYTES, first_error: target, solves };
        let mut points: Vec<Point> = Vec::new();
        loop {
            match search.next(&points) {
                Step::End(ending) => return (points, ending),
                Step::Solve(bits) => {
                    assert!(points.iter().all(|point| point.bits != bits), "{bits} is solved twice: {points:?}");
                    let Expected { payload_bytes, error } = expected(bits).unwrap();
                    let error = error * off(bits.bits()).exp();
                    let excess = (error / target).ln().clamp(-20.0, 20.0);
                    points.push(Point { bits, bytes: payload_bytes, is_reached: error <= target, excess });
                }
            }
        }
    }

    #[test]
    fn five_solves_find_a_size_within_one_per_cent() {
        for (target, off) in [(0.005, 0.0), (0.005, 0.7), (0.02, -0.9), (0.001, 0.3)] {
            let (points, ending) = searched(target, 1, 6, |bits| off + 0.1 * bits);
            assert_eq!(ending, Ending::WithinOnePercent, "{points:?}");
            assert!(points.len() <= 5, "{points:?}");
        }
    }

    #[test]
    fn ends_of_the_range_and_of_the_solves() {
        // Even the smallest settings reach 60 %.
        let (points, ending) = searched(0.6, 1, 6, |_| 0.0);
        assert_eq!((points.len(), ending, points[0].bits.to_string()), (1, Ending::Smallest, "1.5".to_owned()));
        // Only the most bits have no error.
        let (points, ending) = searched(1e-9, 1, 20, |bits| if bits < 16.0 { 12.0 } else { 0.0 });
        assert!(smallest_reached(&points).is_some() && ending == Ending::WithinOnePercent, "{points:?} {ending:?}");
        let (points, ending) = searched(1e-4, 1, 1, |_| 1.0);
        assert!(smallest_reached(&points).is_none() && points.len() == 1 && ending == Ending::Solves);
        // The last solve that is left aims well below the target.
        let (points, ending) = searched(1e-3, 1, 2, |bits| 0.1 * bits);
        assert!(points[1].is_reached && ending == Ending::Solves, "{points:?}");
    }

    #[test]
    fn a_target_beyond_the_best_settings_is_known_to_be() {
        // At the most bits nothing is expected to be lost, but something is.
        let expected = |bits: MeanBits| {
            let error = if bits.thousandths() >= 16_000 { 0.0 } else { 1e-3 };
            Some(Expected { payload_bytes: u64::from(bits.thousandths()) * 1000, error })
        };
        let ends = (MeanBits::of_thousandths(1_500), MeanBits::of_thousandths(16_000));
        let search = Search { expected: &expected, ends, bytes_of_thousandth: BYTES, first_error: 1e-9, solves: 6 };
        assert_eq!(search.next(&[]), Step::Solve(ends.1));
        let missed = Point { bits: ends.1, bytes: 16_000_000, is_reached: false, excess: 3.0 };
        assert_eq!(search.next(&[missed]), Step::End(Ending::Largest));
    }

    proptest! {
        /// Whatever the factor between errors and expectations does, and in whatever steps sizes
        /// come, no size is solved twice, and a search that ends before its last solve has found
        /// what it says.
        #[test]
        fn what_a_search_says_is_so(
            target in 1e-5..0.05_f64,
            step in prop::sample::select(&[1_u32, 7, 100, 250, 500][..]),
            (offset, slope, wave) in (-2.0..2.0_f64, -0.3..0.3_f64, 0.0..0.2_f64),
        ) {
            let (points, ending) = searched(target, step, 40, |bits| offset + slope * bits + wave * (9.0 * bits).sin());
            let upper = smallest_reached(&points);
            let lower = |upper: &Point| {
                points.iter().filter(|point| !point.is_reached && point.bits < upper.bits).map(|point| point.bytes).max()
            };
            match ending {
                Ending::WithinOnePercent => {
                    let upper = upper.unwrap();
                    prop_assert!(upper.bytes as f64 <= 1.01 * lower(upper).unwrap() as f64);
                }
                Ending::NothingBetween => {
                    let upper = upper.unwrap();
                    let apart = (upper.bytes - lower(upper).unwrap()) as f64 / BYTES;
                    prop_assert!(apart <= f64::from(step), "{apart} {step} {points:?}");
                }
                Ending::Smallest => prop_assert!(upper.unwrap().bytes as f64 <= BYTES * f64::from(1_500 + step)),
                Ending::Largest | Ending::Solves => prop_assert!(false, "{ending:?} {points:?}"),
            }
        }
    }
}
