//! The kinds of layers that have weights to compress.

use std::fmt::{self, Display};

use serde::Serialize;

/// The kinds of layers that have weights to compress, under torch's class names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum LayerKind {
    /// `torch.nn.Conv2d`, weight [o, i / groups, kh, kw].
    Conv2d,
    /// `torch.nn.Linear`, weight [o, i].
    Linear,
}

impl LayerKind {
    /// All kinds.
    pub const ALL: [LayerKind; 2] = [LayerKind::Conv2d, LayerKind::Linear];

    /// The name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LayerKind::Conv2d => "Conv2d",
            LayerKind::Linear => "Linear",
        }
    }
}

impl Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
