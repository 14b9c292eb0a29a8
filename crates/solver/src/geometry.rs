//! The vectors of a layer's input, with which a row of its weight is multiplied.

use squeeze_base::error::{Error, Result};

/// The rule that turns a layer's input into vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputGeometry {
    /// The vectors are the last dimension of the input [.., d]; weight [o, d].
    Linear,
    /// The vectors are windows of the input [b, c, h, w], channel by channel as `torch.nn.Unfold`
    /// orders them; weight [o, c / groups, kh, kw].
    Windows(Windows),
}

/// The movement of a convolution's window over its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Step of the window, down and right, in pixels.
    pub stride: [i64; 2],
    /// Zeros around the input: rows above and below, columns left and right.
    pub padding: [i64; 2],
    /// Distance between a kernel's taps.
    pub dilation: [i64; 2],
    /// The number of independent parts into which input and output channels are split.
    pub groups: i64,
}

impl Windows {
    /// A square window: stride and padding as given, no dilation, one group.
    #[must_use]
    pub fn new(stride: i64, padding: i64) -> Self {
        Windows { stride: [stride; 2], padding: [padding; 2], dilation: [1; 2], groups: 1 }
    }

    /// Whether windows move by one pixel and contain every channel, so that the Hessian consists of
    /// [`Correlations`](super::correlations::Correlations).
    pub(super) fn correlate(&self) -> bool {
        self.stride == [1; 2] && self.dilation == [1; 2] && self.groups == 1
    }
}

/// An input geometry with the sizes of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inputs {
    /// Vectors of `dimension` numbers.
    Vectors { outputs: i64, dimension: i64 },
    /// Windows of `kernel` rows and columns in `channels` channels for each group.
    Windows { outputs: i64, channels: i64, kernel: [i64; 2], windows: Windows },
}

impl InputGeometry {
    /// The sizes of a weight of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if no weight of this geometry has the shape.
    pub(super) fn inputs(self, shape: &[i64]) -> Result<Inputs> {
        let inputs = match (self, shape) {
            (InputGeometry::Linear, &[outputs, dimension]) => Inputs::Vectors { outputs, dimension },
            (InputGeometry::Windows(windows), &[outputs, channels, height, width]) => {
                Inputs::Windows { outputs, channels, kernel: [height, width], windows }
            }
            (InputGeometry::Linear | InputGeometry::Windows(_), _) => {
                let expected = match self {
                    InputGeometry::Linear => "[o, d]",
                    InputGeometry::Windows(_) => "[o, c / groups, kh, kw]",
                };
                return Err(Error::shape("the weight", shape, expected));
            }
        };
        Ok(inputs)
    }

    /// As [`inputs`](Self::inputs), for a shape that is known to belong to the geometry.
    ///
    /// # Panics
    /// If the shape does not belong to the geometry.
    pub(super) fn inputs_of_layer(self, shape: &[i64]) -> Inputs {
        self.inputs(shape).expect("a layer's weight has the shape of its operation")
    }
}

impl Inputs {
    /// Output channels.
    pub(crate) fn outputs(&self) -> i64 {
        match self {
            Inputs::Vectors { outputs, .. } | Inputs::Windows { outputs, .. } => *outputs,
        }
    }

    /// d, the length of a vector.
    pub(crate) fn dimension(&self) -> i64 {
        match self {
            Inputs::Vectors { dimension, .. } => *dimension,
            Inputs::Windows { channels, kernel, .. } => channels * kernel[0] * kernel[1],
        }
    }
}
