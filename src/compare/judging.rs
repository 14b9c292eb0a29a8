//! What results are judged on.

use super::lpips::Lpips;
use crate::calibration::PromptSet;

/// What results are judged on, and what is measured.
#[derive(Debug)]
pub struct Judging {
    /// The prompts, and how they are drawn. Its seed is that of the first prompt's first noise.
    pub set: PromptSet,
    /// Noises of each prompt, at least 1. The noise `k` of the prompt `i` has the set's seed + `i`
    /// + 2^20 `k`.
    pub seeds: usize,
    /// UNet calls on which the error of the UNet's output is measured; `None` is one for each
    /// picture, and at least [`HELD_OUT`](Self::HELD_OUT).
    pub held_out: Option<usize>,
    /// The entry that all others are compared with; `None` is the first.
    pub baseline: Option<String>,
    /// Whether the dense model is measured in another dtype too.
    pub noise_floor: bool,
    /// The weights of LPIPS, if it is measured.
    pub lpips: Option<Lpips>,
    /// How many pictures of each model the report shows, from the first on.
    pub shown: usize,
}

impl Judging {
    /// The least default of [`held_out`](Self::held_out).
    pub const HELD_OUT: usize = 48;
    /// The seed of the first prompt's first noise that the command line takes where none is given.
    pub const SEED: u64 = 231;
    /// The command line's default of [`shown`](Self::shown).
    pub const SHOWN: usize = 32;

    /// One noise for each prompt, with a noise floor.
    #[must_use]
    pub fn of(set: PromptSet) -> Self {
        Judging { set, seeds: 1, held_out: None, baseline: None, noise_floor: true, lpips: None, shown: Self::SHOWN }
    }
}
