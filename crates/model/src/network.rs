//! The construction of networks: a builder that follows checkpoint names, and the list that holds a
//! network's layers.
//!
//! A network keeps its layers in one list, in execution order, and its blocks hold indices into
//! that list. Listing the layers, observing their inputs and replacing their weights therefore work
//! on the list alone, without code in the blocks.

use std::fmt::Display;

use squeeze_base::error::Result;
use tch::Tensor;

use super::layer::{ConvGeometry, Layer, LayerInput, Observer, Operation};
use crate::checkpoint::TensorSource;

/// The index of a layer in its network's list.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerId(usize);

impl LayerId {
    /// The layer with this index, in its network's list.
    pub(crate) fn of(self, layers: &[Layer]) -> &Layer {
        &layers[self.0]
    }
}

/// Builds blocks from a source at a path of checkpoint names.
pub(super) struct Builder<'a> {
    source: &'a dyn TensorSource,
    path: String,
    layers: &'a mut Vec<Layer>,
}

impl<'a> Builder<'a> {
    /// A builder at `path` ("" for the top), which adds to `layers`.
    pub(crate) fn new(source: &'a dyn TensorSource, path: impl Into<String>, layers: &'a mut Vec<Layer>) -> Self {
        Builder { source, path: path.into(), layers }
    }

    /// The builder for the child `name` of this path.
    pub(crate) fn at(&mut self, name: impl Display) -> Builder<'_> {
        Builder { source: self.source, path: self.name(name), layers: self.layers }
    }

    /// The number of layers so far.
    pub(crate) fn count(&self) -> usize {
        self.layers.len()
    }

    fn name(&self, leaf: impl Display) -> String {
        if self.path.is_empty() { leaf.to_string() } else { format!("{}.{leaf}", self.path) }
    }

    /// The tensor `leaf` of this path.
    pub(crate) fn tensor(&self, leaf: &str, shape: &[i64]) -> Result<Tensor> {
        self.source.tensor(&self.name(leaf), shape)
    }

    /// The Linear `leaf`: weight [`output`, `input`].
    pub(crate) fn linear(&mut self, leaf: &str, input: i64, output: i64, bias: bool) -> Result<LayerId> {
        self.linear_of(leaf, self.features(leaf), input, output, bias)
    }

    /// The Linear `leaf`, whose input `of` other layers share.
    pub(crate) fn linear_of(&mut self, leaf: &str, of: LayerInput, input: i64, output: i64, bias: bool) -> Result<LayerId> {
        self.layer(leaf, Operation::Linear, of, &[output, input], bias)
    }

    /// The features whose first layer in execution order is `leaf`.
    pub(crate) fn features(&self, leaf: &str) -> LayerInput {
        LayerInput::Features(self.name(leaf))
    }

    /// The Conv2d `leaf`, with a bias: weight [`output`, `input`, `kernel`, `kernel`].
    pub(crate) fn conv2d(&mut self, leaf: &str, input: i64, output: i64, kernel: i64, geometry: ConvGeometry) -> Result<LayerId> {
        self.layer(leaf, Operation::Conv2d(geometry), self.features(leaf), &[output, input, kernel, kernel], true)
    }

    fn layer(&mut self, leaf: &str, operation: Operation, input: LayerInput, shape: &[i64], bias: bool) -> Result<LayerId> {
        let weight = self.at(leaf).tensor("weight", shape)?;
        let bias = if bias { Some(self.at(leaf).tensor("bias", &shape[..1])?) } else { None };
        self.layers.push(Layer::new(self.name(leaf), operation, input, weight, bias));
        Ok(LayerId(self.layers.len() - 1))
    }

    /// The GroupNorm `leaf`.
    pub(crate) fn group_norm(&mut self, leaf: &str, groups: i64, channels: i64, eps: f64) -> Result<GroupNorm> {
        let (weight, bias) = self.affine(leaf, channels)?;
        Ok(GroupNorm { groups, weight, bias, eps })
    }

    /// The LayerNorm `leaf`.
    pub(crate) fn layer_norm(&mut self, leaf: &str, width: i64, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = self.affine(leaf, width)?;
        Ok(LayerNorm { weight, bias, eps })
    }

    fn affine(&mut self, leaf: &str, width: i64) -> Result<(Tensor, Tensor)> {
        let here = self.at(leaf);
        Ok((here.tensor("weight", &[width])?, here.tensor("bias", &[width])?))
    }
}

/// One forward pass: the layers and their observer.
pub(super) struct Run<'a> {
    layers: &'a [Layer],
    observer: &'a mut dyn Observer,
}

impl<'a> Run<'a> {
    pub(crate) fn new(layers: &'a [Layer], observer: &'a mut dyn Observer) -> Self {
        Run { layers, observer }
    }

    /// Runs one layer.
    pub(crate) fn layer(&mut self, id: LayerId, input: &Tensor) -> Result<Tensor> {
        id.of(self.layers).forward(input, self.observer)
    }

    /// Tells the observer that the next output of the layer will be added to `residual`.
    pub(crate) fn onto(&mut self, id: LayerId, residual: &Tensor) -> Result<()> {
        self.observer.residual(id.of(self.layers), residual)
    }
}

/// Group normalization over [b, c, ..] (Wu and He 2018; `torch.nn.GroupNorm`).
#[derive(Debug)]
pub(super) struct GroupNorm {
    groups: i64,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let kind = input.f_kind()?;
        let (weight, bias) = (self.weight.f_to_kind(kind)?, self.bias.f_to_kind(kind)?);
        Ok(input.f_group_norm(self.groups, Some(&weight), Some(&bias), self.eps, true)?)
    }
}

/// Layer normalization over the last dimension (Ba et al. 2016; `torch.nn.LayerNorm`).
#[derive(Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let kind = input.f_kind()?;
        let (weight, bias) = (self.weight.f_to_kind(kind)?, self.bias.f_to_kind(kind)?);
        Ok(input.f_layer_norm(weight.size(), Some(&weight), Some(&bias), self.eps, true)?)
    }
}

/// [b, s, heads x width] to [b, heads, s, width].
pub(super) fn split_heads(states: &Tensor, heads: i64) -> Result<Tensor> {
    let (batch, length, width) = states.size3()?;
    Ok(states.f_view([batch, length, heads, width / heads])?.f_transpose(1, 2)?)
}

/// Softmax attention, scaled by 1/sqrt(width): [b, heads, s, width] each, to [b, s, heads x width].
pub(super) fn attend(query: &Tensor, key: &Tensor, value: &Tensor, causal: bool) -> Result<Tensor> {
    let mixed =
        Tensor::f_scaled_dot_product_attention::<Tensor>(query, key, value, None, 0.0, causal, None, false)?.f_transpose(1, 2)?;
    let (batch, length, heads, width) = mixed.size4()?;
    Ok(mixed.f_reshape([batch, length, heads * width])?)
}
