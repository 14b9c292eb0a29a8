//! The number and shape of calibration samples.

use serde::Serialize;

/// The number and shape of the samples, known before any of them is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// The number of samples; each is one call of the UNet.
    pub count: usize,
    /// Batch size of each call: 2 with guidance, 3 of an edit model.
    pub batch: i64,
    /// Height of the latents.
    pub height: i64,
    /// Width of the latents.
    pub width: i64,
    /// Length of the text states.
    pub text: i64,
}

impl Calls {
    /// The number of calls that go through the stages as one batch. Several small calls are joined,
    /// because starting an operation would cost more than computing it. `numel` is the size of the
    /// first carry for a batch of one.
    #[must_use]
    pub fn joined(&self, numel: i64) -> usize {
        const ENOUGH: i64 = 1 << 19;
        const MOST: i64 = 16;
        (ENOUGH / (self.batch * numel).max(1)).clamp(1, MOST) as usize
    }
}
