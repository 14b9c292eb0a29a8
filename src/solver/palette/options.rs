//! What to ask of the palettizer.

use crate::error::{Error, Result};

/// Which weights share a palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// All of them.
    PerTensor,
    /// Each run of `group_size` channels.
    PerGroupedChannel {
        /// Channels in a group.
        group_size: usize,
        /// The dimension that counts the channels: 0 for output channels, 1 for input channels.
        axis: usize,
    },
}

/// What to do where the group size does not divide the channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMisfit {
    /// Refuse, naming the layer.
    Error,
    /// Take the largest divisor of the channels that is not above the group size, and say so in
    /// [`Palettized::misfit`](super::Palettized::misfit).
    SmallerGroup,
    /// Leave the weight as it is, as coremltools does, but say so in [`Outcome::LeftDense`](super::Outcome::LeftDense).
    Dense,
}

/// The settings of one weight, in the words of coremltools' `ModulePostTrainingPalettizerConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaletteOptions {
    /// Bits of an index (`n_bits`): 1, 2, 3, 4, 6 or 8. A palette has 2^bits entries.
    pub bits: u8,
    /// Which weights share a palette.
    pub granularity: Granularity,
    /// Whether each output channel is first divided by its largest magnitude (`enable_per_channel_scale`).
    pub per_channel_scale: bool,
    /// What to do where the group size does not divide the channels.
    pub on_misfit: OnMisfit,
}

/// The widths that Core ML can store.
const BITS: [u8; 6] = [1, 2, 3, 4, 6, 8];

impl PaletteOptions {
    /// Entries of a palette, 2^bits.
    ///
    /// # Errors
    /// [`Error::Argument`] for bits that Core ML cannot store, for a group size of 0 and for an axis above 1; `name` is in it.
    pub(super) fn entries(&self, name: &str) -> Result<usize> {
        if !BITS.contains(&self.bits) {
            return Err(Error::Argument(format!("`{name}`: n_bits is {}; it can be 1, 2, 3, 4, 6 or 8", self.bits)));
        }
        if let Granularity::PerGroupedChannel { group_size, axis } = self.granularity {
            if group_size == 0 {
                return Err(Error::Argument(format!("`{name}`: group_size is 0; it must be at least 1")));
            }
            if axis > 1 {
                let choice = "it can be 0 (output channels) or 1 (input channels)";
                return Err(Error::Argument(format!("`{name}`: channel_axis is {axis}; {choice}")));
            }
        }
        Ok(1 << self.bits)
    }
}
