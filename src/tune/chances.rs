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
/// gradient (importance sampling). The error of a call is taken to be the mean at its timestep.
#[derive(Debug)]
pub(super) struct Chances {
    /// Sums of the chances up to each call.
    sums: Vec<f64>,
    /// The factor of each call's squared error in the loss.
    factors: Vec<f64>,
}

impl Chances {
    /// The chances of `lessons`, some of which are held out and have none. `errors` are the squared
    /// errors of held-out calls before training, by the bits of their timesteps.
    pub(super) fn new(lessons: &[Lesson], errors: &[(f64, f64)]) -> Self {
        let mean = |errors: &mut dyn Iterator<Item = f64>| {
            let (count, sum) = errors.fold((0.0, 0.0), |(count, sum), error| (count + 1.0, sum + error));
            if count > 0.0 { Some(sum / count) } else { None }
        };
        let overall = mean(&mut errors.iter().map(|(_, error)| *error)).unwrap_or(1.0);
        let expected = |lesson: &Lesson| {
            let mut here = errors.iter().filter(|(timestep, _)| *timestep == lesson.call.timestep).map(|(_, error)| *error);
            lesson.weight * mean(&mut here).unwrap_or(overall)
        };
        let expected: Vec<f64> = lessons.iter().map(|lesson| if lesson.held_out { 0.0 } else { expected(lesson) }).collect();
        let total: f64 = expected.iter().sum();
        let learned = lessons.iter().filter(|lesson| !lesson.held_out).count().max(1) as f64;
        let (mut sums, mut factors, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for (lesson, expected) in lessons.iter().zip(expected) {
            let even = if lesson.held_out { 0.0 } else { 1.0 / learned };
            let chance = if total > 0.0 { EVEN * even + (1.0 - EVEN) * expected / total } else { even };
            sum += chance;
            sums.push(sum);
            factors.push(if chance > 0.0 && total > 0.0 { lesson.weight / (total * chance) } else { 0.0 });
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
