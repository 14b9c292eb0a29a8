//! The number and shape of calibration samples.

use serde::Serialize;
use tch::Device;

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
    /// The number of prompts that a GPU draws in one batch, each with `rows` rows of latents of
    /// `height` x `width`: as many as keep it busy. It does not depend on the memory, because a
    /// batch of another size has another rounding.
    pub(super) fn drawn_together(rows: i64, height: i64, width: i64) -> i64 {
        /// Pixels of latents in a batch. With 64x64 latents, 16 rows.
        const ENOUGH: i64 = 1 << 16;
        (ENOUGH / (rows * height * width).max(1)).max(1)
    }

    /// The number of batches in which a GPU draws samples of this shape from so many prompts.
    #[must_use]
    pub fn drawn_batches(&self, prompts: usize) -> usize {
        prompts.div_ceil(Calls::drawn_together(self.batch, self.height, self.width) as usize)
    }

    /// The number of calls that go through the stages as one batch on `device`. Several small calls
    /// are joined, because starting an operation would cost more than computing it; a GPU needs
    /// larger batches to be busy, but no fewer than twelve of them, of which one is held out.
    /// `numel` is the size of the first carry for a batch of one.
    #[must_use]
    pub fn joined(&self, numel: i64, device: Device) -> usize {
        let (enough, most) = match device {
            Device::Cpu => (1 << 19, 16),
            _ => (1 << 26, (self.count as i64 / 12).clamp(1, 64)),
        };
        (enough / (self.batch * numel).max(1)).clamp(1, most) as usize
    }
}
