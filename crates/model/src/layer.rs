//! The layers that have weights worth compressing: Conv2d and Linear.

use squeeze_base::error::{Error, Result};
use squeeze_codebook::LayerKind;
use squeeze_numerics::product::{add_product, in_fp32, linear};
use tch::Tensor;

/// A Conv2d or Linear under its checkpoint name.
#[derive(Debug)]
pub struct Layer {
    name: String,
    operation: Operation,
    input: LayerInput,
    weight: Tensor,
    bias: Option<Tensor>,
}

/// The input of a [`Layer`]. Layers of a UNet with equal values have one tensor as their input, so
/// that one Hessian serves all of them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerInput {
    /// The text states, which go through the whole UNet unchanged: `to_k` and `to_v` of every
    /// cross-attention.
    Text,
    /// SiLU of the time embedding, the same in the whole UNet: every `time_emb_proj`.
    Time,
    /// Features that are the input of a few neighbouring layers (`to_q`, `to_k` and `to_v` of a
    /// self-attention) or of a single layer, under the name of the first of these layers.
    Features(String),
}

/// The computation of a [`Layer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `x W^T + b` over the last dimension; weight [o, d].
    Linear,
    /// A convolution of [b, c, h, w]; weight [o, c / groups, kh, kw].
    Conv2d(ConvGeometry),
}

/// How a convolution's window moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Step of the window, down and right, in pixels.
    pub stride: [i64; 2],
    /// Zeros around the input: rows above and below, columns left and right.
    pub padding: [i64; 2],
    /// Distance between a kernel's taps.
    pub dilation: [i64; 2],
    /// The number of independent parts into which input and output channels are split.
    pub groups: i64,
}

impl ConvGeometry {
    /// A square window: stride and padding as given, no dilation, one group.
    #[must_use]
    pub fn new(stride: i64, padding: i64) -> Self {
        ConvGeometry { stride: [stride; 2], padding: [padding; 2], dilation: [1; 2], groups: 1 }
    }
}

/// Sees the input of every layer during a forward pass, before the layer computes. An observer must
/// not change the tensors that it sees.
pub trait Observer {
    /// Called with the `input` of `layer` before the layer computes: [.., d] for a Linear, [b, c,
    /// h, w] for a Conv2d.
    ///
    /// # Errors
    /// Any error ends the forward pass and is its result.
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()>;

    /// Called before `layer` computes if its output will be added to `residual`, which has the
    /// output's shape, or [b, c, h, w] where the output is [b, h w, c].
    ///
    /// # Errors
    /// Any error ends the forward pass and is its result.
    fn residual(&mut self, _layer: &Layer, _residual: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Called with the `output` of `layer` before a residual is added to it. Later operations may
    /// change the tensor in place.
    ///
    /// # Errors
    /// Any error ends the forward pass and is its result.
    fn output(&mut self, _layer: &Layer, _output: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// The observer that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn input(&mut self, _layer: &Layer, _input: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl Layer {
    pub(super) fn new(name: String, operation: Operation, input: LayerInput, weight: Tensor, bias: Option<Tensor>) -> Self {
        Layer { name, operation, input, weight, bias }
    }

    /// The checkpoint name without `.weight`, e.g.
    /// `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The layer's computation.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The layer's kind.
    #[must_use]
    pub fn kind(&self) -> LayerKind {
        match self.operation {
            Operation::Linear => LayerKind::Linear,
            Operation::Conv2d(_) => LayerKind::Conv2d,
        }
    }

    /// The layer's input.
    #[must_use]
    pub fn input(&self) -> &LayerInput {
        &self.input
    }

    /// The weight, [o, d] or [o, c / groups, kh, kw], in the dtype of its storage. A forward pass
    /// converts it to the dtype of the input.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[o]`, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Replaces the layer's weight by `weight`, which is moved to the layer's device. Its dtype is
    /// kept; a forward pass converts it.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes differ.
    pub fn replace_weight(&mut self, weight: &Tensor) -> Result<()> {
        if weight.size() != self.weight.size() {
            let expected = format!("{:?}", self.weight.size());
            return Err(Error::shape(format!("`{}`: the new weight", self.name), weight.size(), expected));
        }
        self.weight = weight.f_to_device(self.weight.device())?;
        Ok(())
    }

    pub(super) fn forward(&self, input: &Tensor, observer: &mut dyn Observer) -> Result<Tensor> {
        observer.input(self, input)?;
        let kind = input.f_kind()?;
        let weight = self.weight.f_to_kind(kind)?;
        let bias = self.bias.as_ref().map(|bias| bias.f_to_kind(kind)).transpose()?;
        let bias = bias.as_ref();
        let output = match self.operation {
            Operation::Linear => linear(input, &weight, bias)?,
            Operation::Conv2d(geometry) if geometry == ConvGeometry::new(1, 0) && weight.size().ends_with(&[1, 1]) => {
                pointwise(input, &weight, bias)?
            }
            Operation::Conv2d(ConvGeometry { stride, padding, dilation, groups }) => {
                input.f_conv2d(&weight, bias, stride, padding, dilation, groups)?
            }
        };
        observer.output(self, &output)?;
        Ok(output)
    }
}

/// A 1 x 1 convolution as a matrix product, because the rounding of oneDNN's kernels for it depends
/// on the number of threads.
fn pointwise(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if let Some(output) = in_fp32(input, weight, bias, pointwise)? {
        return Ok(output);
    }
    let (batch, channels, height, width) = input.size4()?;
    let weight = weight.f_flatten(1, -1)?;
    let pixels = input.f_reshape([batch, channels, height * width])?;
    let output = pixels.f_new_zeros([batch, weight.size2()?.0, height * width], (pixels.f_kind()?, pixels.device()))?;
    if let Some(bias) = bias {
        let _ = output.shallow_clone().f_add_(&bias.f_unsqueeze(-1)?)?;
    }
    for image in 0..batch {
        add_product(&output.f_get(image)?, &weight, &pixels.f_get(image)?)?;
    }
    Ok(output.f_view([batch, -1, height, width])?)
}
