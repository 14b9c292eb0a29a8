//! The groups of weights that share a palette.

use serde::Serialize;

/// The groups of weights that share a palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// All weights of the layer (coremltools' `per_tensor`).
    PerTensor,
    /// Each run of `group_size` neighbouring channels (coremltools' `per_grouped_channel`).
    PerGroupedChannel {
        /// The number of channels in a group, at least 1.
        group_size: usize,
    },
}

impl Grouping {
    /// The number of channels in a group; `None` for one palette.
    #[must_use]
    pub fn group_size(self) -> Option<usize> {
        match self {
            Grouping::PerTensor => None,
            Grouping::PerGroupedChannel { group_size } => Some(group_size),
        }
    }
}

/// The policy for a layer whose channels are no multiple of its group size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMisfit {
    /// Take the largest smaller group size that divides the channels.
    SmallerGroup,
    /// Leave the layer in fp16, which coremltools does without a warning.
    Dense,
    /// Refuse, naming the layer.
    Error,
}

/// The outcome for a layer whose channels are no multiple of its group size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit {
    /// The layer gets groups of this size.
    SmallerGroup(usize),
    /// The layer stays fp16.
    Dense,
    /// The policy forbids it.
    Error,
}

impl OnMisfit {
    /// All policies.
    pub const ALL: [OnMisfit; 3] = [OnMisfit::SmallerGroup, OnMisfit::Dense, OnMisfit::Error];

    /// The name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            OnMisfit::SmallerGroup => "smaller_group",
            OnMisfit::Dense => "dense",
            OnMisfit::Error => "error",
        }
    }

    /// The outcome for `channels` in groups of `group_size`; `None` if the groups fit. Both are at
    /// least 1.
    #[must_use]
    pub fn outcome(self, channels: usize, group_size: usize) -> Option<Misfit> {
        if channels.is_multiple_of(group_size) {
            return None;
        }
        Some(match self {
            OnMisfit::SmallerGroup => {
                let divisor = (1..=group_size.min(channels)).rev().find(|size| channels.is_multiple_of(*size));
                Misfit::SmallerGroup(divisor.expect("1 divides every number of channels"))
            }
            OnMisfit::Dense => Misfit::Dense,
            OnMisfit::Error => Misfit::Error,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_group_is_the_largest_divisor() {
        for (channels, size, used) in [(20, 8, 5), (20, 3, 2), (20, 40, 20), (20, usize::MAX, 20), (6, 4, 3), (6, 7, 6)] {
            assert_eq!(OnMisfit::SmallerGroup.outcome(channels, size), Some(Misfit::SmallerGroup(used)));
        }
        assert_eq!(OnMisfit::Dense.outcome(20, 8), Some(Misfit::Dense));
        assert_eq!(OnMisfit::Error.outcome(20, 8), Some(Misfit::Error));
        for policy in OnMisfit::ALL {
            assert_eq!(policy.outcome(20, 5), None);
        }
    }
}
