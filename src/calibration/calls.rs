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
