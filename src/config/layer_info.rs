//! The layers to which a config gives settings.

use squeeze_codebook::LayerKind;

/// A layer of a model, as far as resolution needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// The checkpoint name without `.weight`.
    pub name: String,
    /// The stage that the layer belongs to (`down_blocks.0`); `None` for the UNet's two ends.
    pub stage: Option<String>,
    /// Its type.
    pub module_type: LayerKind,
    /// The weight's shape: [o, d] or [o, c / groups, kh, kw].
    pub shape: Vec<i64>,
}

impl LayerInfo {
    pub(crate) fn elements(&self) -> u64 {
        // A dimension below 0, which no tensor has, counts as 0.
        self.shape.iter().map(|n| n.max(&0).unsigned_abs()).fold(1, u64::saturating_mul)
    }

    /// d of [o, d], convolutions flattened to [o, c kh kw].
    pub(super) fn columns(&self) -> i64 {
        self.shape.iter().skip(1).copied().fold(1, i64::saturating_mul)
    }
}
