//! Which calls a step learns from.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::lesson::Lesson;

/// The share of draws that fall on all calls alike, so that none is out of reach.
const EVEN: f64 = 0.1;

/// The chance of each call to be drawn, and what its loss is divided by so that the expected
/// gradient is that of the whole error.
///
/// Calls whose weighted error is large are drawn more often, which lowers the variance of the
/// gradient (importance sampling).
#[derive(Debug)]
pub(super) struct Chances {
    /// Sums of the chances up to each call.
    sums: Vec<f64>,
    /// The factor of each call's squared error in the loss.
    factors: Vec<f64>,
}

impl Chances {
    /// The chances of `lessons`.
    pub(super) fn new(lessons: &[Lesson]) -> Self {
        let expected = |lesson: &Lesson| lesson.weight * lesson.expected;
        let total: f64 = lessons.iter().map(expected).sum();
        let even = 1.0 / lessons.len().max(1) as f64;
        let (mut sums, mut factors, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for lesson in lessons {
            let chance = if total > 0.0 { EVEN * even + (1.0 - EVEN) * expected(lesson) / total } else { even };
            sum += chance;
            sums.push(sum);
            factors.push(if total > 0.0 { lesson.weight / (total * chance) } else { 0.0 });
        }
        Chances { sums, factors }
    }

    /// The calls of step number `step`.
    pub(super) fn draw(&self, seed: u64, step: usize, count: usize) -> Vec<usize> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        // Each step has a stream of its own, so that a continued run draws what a whole one does.
        generator.set_stream(step as u64);
        let total = self.sums.last().copied().unwrap_or(0.0);
        let last = self.sums.len().saturating_sub(1);
        let mut drawn: Vec<usize> = (0..count)
            .map(|_| {
                let at = generator.random::<f64>() * total;
                self.sums.partition_point(|sum| *sum <= at).min(last)
            })
            .collect();
        drawn.sort_unstable();
        drawn
    }

    /// The factor of a call's squared error in the loss, which is about 1 in the mean at the start.
    pub(super) fn factor(&self, call: usize) -> f64 {
        self.factors[call]
    }
}
