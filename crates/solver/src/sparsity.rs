//! The number of elements that are pruned in a block, and their choice by score.

use rayon::prelude::*;

/// The number of elements to prune in each block.
#[derive(Debug)]
pub(super) struct Quota {
    share: f64,
    as_coremltools: bool,
    seen: usize,
    pruned: usize,
}

impl Quota {
    /// With `as_coremltools`, a block gets `int(size * share) + 1`, because coremltools prunes the
    /// threshold itself. Otherwise the number brings all blocks so far nearest to the share. Blocks
    /// of a few elements need this: those of grouped convolutions, which coremltools does not
    /// support.
    pub(super) fn new(share: f64, as_coremltools: bool) -> Self {
        Quota { share, as_coremltools, seen: 0, pruned: 0 }
    }

    /// The number for the next block, of `size` elements.
    pub(super) fn next(&mut self, size: usize) -> usize {
        self.seen += size;
        let count = if self.as_coremltools {
            (size as f64 * self.share) as usize + 1
        } else {
            ((self.seen as f64 * self.share).round() as usize).saturating_sub(self.pruned)
        };
        self.pruned += count.min(size);
        count.min(size)
    }
}

/// Marks the `count` smallest of `scores` (>= 0) in `pruned`.
///
/// As in coremltools, all scores equal to the last of these are marked too, if they are zero or if
/// at most 0.1 % of the block is marked in excess of `count`. Otherwise the first of the equal
/// scores are marked, in row-major order.
pub(super) fn mark_smallest(scores: &[f32], count: usize, pruned: &mut [bool]) {
    if count == 0 || scores.is_empty() {
        pruned.fill(false);
        return;
    }
    let Ranked { threshold, below, ties } = rank(scores, count.min(scores.len()) - 1);
    let all = threshold == 0.0 || below + ties <= count + scores.len() / 1000;
    if all {
        let parts = scores.par_chunks(PIECE).zip(pruned.par_chunks_mut(PIECE));
        parts.for_each(|(scores, pruned)| {
            scores.iter().zip(pruned).for_each(|(score, pruned)| *pruned = score.total_cmp(&threshold).is_le());
        });
        return;
    }
    let mut room = count - below;
    for (score, pruned) in scores.iter().zip(pruned) {
        let order = score.total_cmp(&threshold);
        *pruned = order.is_lt() || (order.is_eq() && room > 0);
        room -= usize::from(order.is_eq() && *pruned);
    }
}

/// The number of scores that a thread processes at a time.
const PIECE: usize = 1 << 16;

/// A score with its rank among all scores.
struct Ranked {
    threshold: f32,
    /// The number of smaller scores.
    below: usize,
    /// The number of equal scores, including the score itself.
    ties: usize,
}

/// The score (>= 0) with the rank `index` in ascending order, counted from zero.
fn rank(scores: &[f32], index: usize) -> Ranked {
    // Non-negative numbers are ordered as their bits. The scores are counted by their highest bits,
    // and only the scores in the bin of the result are then compared with each other.
    const BINS: usize = 1 << 12;
    let bin = |score: &f32| (score.to_bits() >> 19) as usize % BINS;
    let count = |scores: &[f32]| {
        let mut counts = vec![0_usize; BINS];
        scores.iter().for_each(|score| counts[bin(score)] += 1);
        counts
    };
    let add = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    let counts = scores.par_chunks(PIECE).map(count).reduce(|| vec![0; BINS], add);
    let (mut target, mut before) = (0, 0);
    while before + counts[target] <= index {
        before += counts[target];
        target += 1;
    }
    let mut in_bin: Vec<f32> = scores.par_iter().copied().with_min_len(PIECE).filter(|score| bin(score) == target).collect();
    let threshold = *in_bin.select_nth_unstable_by(index - before, f32::total_cmp).1;
    let less = in_bin.iter().filter(|score| score.total_cmp(&threshold).is_lt()).count();
    let ties = in_bin.iter().filter(|score| score.total_cmp(&threshold).is_eq()).count();
    Ranked { threshold, below: before + less, ties }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn marked(scores: &[f32], count: usize) -> Vec<bool> {
        let mut pruned = vec![true; scores.len()];
        mark_smallest(scores, count, &mut pruned);
        pruned
    }

    #[test]
    fn ties_are_zeros_or_few_or_in_order() {
        assert_eq!(marked(&[0.0, 1.0, 0.0, 0.0], 1), [true, false, true, true]);
        assert_eq!(marked(&[1.0, 1.0, 0.5, 1.0], 2), [true, false, true, false]);
        assert_eq!(marked(&[1.0; 2000], 5).iter().filter(|pruned| **pruned).count(), 5);
        let mut scores = vec![2.0; 2000];
        scores[3] = 1.0;
        scores[1500] = 1.0;
        assert_eq!(marked(&scores, 1).iter().filter(|pruned| **pruned).count(), 2);
    }

    proptest! {
        #[test]
        fn marks_the_smallest(scores in prop::collection::vec(0.001f32..1.0, 1..300), share in 0.0..1.0) {
            let count = (scores.len() as f64 * share) as usize;
            let pruned = marked(&scores, count);
            let most = scores.iter().zip(&pruned).filter(|(_, pruned)| **pruned).map(|(score, _)| *score).fold(0.0, f32::max);
            let least = scores.iter().zip(&pruned).filter(|(_, pruned)| !**pruned).map(|(score, _)| *score).fold(1.0, f32::min);
            prop_assert_eq!(pruned.iter().filter(|pruned| **pruned).count(), count);
            prop_assert!(most <= least);
        }

        #[test]
        fn an_exact_quota_is_never_off_by_more_than_half(sizes in prop::collection::vec(1usize..50, 1..50), share in 0.0..1.0) {
            let mut quota = Quota::new(share, false);
            let pruned: usize = sizes.iter().map(|size| quota.next(*size)).sum();
            let total: usize = sizes.iter().sum();
            prop_assert!((pruned as f64 - total as f64 * share).abs() <= 0.5 + 1e-9);
        }
    }
}
