//! What is judged: every prompt with every noise, in one order, of which parts can be cut.

use std::ops::Range;

use squeeze_base::error::{Error, Result};

/// Distance between the seeds of a prompt's noises. libtorch's generator on a CPU uses 32 bits of a
/// seed, so that 4,096 noises of a million prompts are all different.
const STRIDE: u64 = 1 << 20;

/// The most noises of a prompt.
const MOST_NOISES: usize = 4096;

/// A picture that every model draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pair {
    /// Index of the prompt.
    pub prompt: usize,
    /// Seed of the noise.
    pub seed: u64,
}

/// All pictures: each prompt with its first noise, then each with its second, and so on. The noise
/// `k` of the prompt `i` has the seed `seed` + `i` + 2^20 `k`.
///
/// # Errors
/// [`Error::Argument`] if there are no prompts, no noises, or more than have seeds of their own.
pub(super) fn pairs(prompts: usize, seed: u64, noises: usize) -> Result<Vec<Pair>> {
    if prompts == 0 {
        return Err(Error::Argument("there are no prompts to judge on".into()));
    }
    if !(1..=MOST_NOISES).contains(&noises) || prompts as u64 > STRIDE {
        return Err(Error::Argument(format!(
            "{prompts} prompts with {noises} noises each cannot be judged on; 1 to {STRIDE} prompts and 1 to {MOST_NOISES} noises can"
        )));
    }
    let seed_of = |prompt: usize, noise: usize| seed.wrapping_add(prompt as u64).wrapping_add(STRIDE * noise as u64);
    let all = (0..noises).flat_map(|noise| (0..prompts).map(move |prompt| (prompt, noise)));
    Ok(all.map(|(prompt, noise)| Pair { prompt, seed: seed_of(prompt, noise) }).collect())
}

/// The part `part` (from 1) of `parts` nearly equal parts of `count` pictures. Each begins at a
/// multiple of `step`.
pub(super) fn share(count: usize, part: usize, parts: usize, step: usize) -> Range<usize> {
    let cut = |at: usize| if at == parts { count } else { at * count / parts / step * step };
    cut(part - 1)..cut(part)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_noises_are_those_of_one_noise_a_prompt() {
        let (one, three) = (pairs(5, 231, 1).unwrap(), pairs(5, 231, 3).unwrap());
        assert_eq!(one, (0..5).map(|i| Pair { prompt: i as usize, seed: 231 + i }).collect::<Vec<_>>());
        assert_eq!(three[..5], one);
        assert_eq!(three.len(), 15);
        let seeds: BTreeSet<u32> = three.iter().map(|pair| pair.seed as u32).collect();
        assert_eq!(seeds.len(), 15);
        for (prompts, noises) in [(0, 1), (1, 0), (1, 4097), (1 << 21, 1)] {
            assert!(pairs(prompts, 0, noises).unwrap_err().is_bad_input());
        }
    }

    proptest! {
        #[test]
        fn parts_are_everything_once(count in 0usize..300, parts in 1usize..40, step in 1usize..3) {
            let mut next = 0;
            for part in 1..=parts {
                let share = share(count, part, parts, step);
                prop_assert_eq!(share.start, next);
                prop_assert!(share.end >= share.start && share.start.is_multiple_of(step) || share.is_empty());
                next = share.end;
            }
            prop_assert_eq!(next, count);
        }
    }
}
