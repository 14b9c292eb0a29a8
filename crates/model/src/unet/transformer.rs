//! Spatial transformers: self-attention, cross-attention with the text, feed-forward.

use squeeze_base::error::Result;
use tch::Tensor;

use crate::layer::{ConvGeometry, LayerInput};
use crate::network::{Builder, GroupNorm, LayerId, LayerNorm, Run, attend, split_heads};

/// The sizes of a `Transformer2DModel`.
#[derive(Debug, Clone, Copy)]
pub struct TransformerShape {
    /// Channels of input and output.
    pub channels: i64,
    /// Attention heads.
    pub heads: i64,
    /// Transformer blocks.
    pub depth: usize,
    /// Width of the text states.
    pub cross_attention_dim: i64,
    /// Whether proj_in and proj_out are Linear (SDXL) or 1x1 convolutions.
    pub linear_projection: bool,
    /// Groups of the norm.
    pub groups: i64,
}

/// `diffusers.models.transformers.Transformer2DModel` on continuous input.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: LayerId,
    blocks: Vec<TransformerBlock>,
    proj_out: LayerId,
    linear_projection: bool,
}

impl Transformer {
    pub(super) fn build(b: &mut Builder, shape: TransformerShape) -> Result<Self> {
        let channels = shape.channels;
        let projection = |b: &mut Builder, name: &str| {
            if shape.linear_projection {
                b.linear(name, channels, channels, true)
            } else {
                b.conv2d(name, channels, channels, 1, ConvGeometry::new(1, 0))
            }
        };
        Ok(Transformer {
            norm: b.group_norm("norm", shape.groups, channels, 1e-6)?,
            proj_in: projection(b, "proj_in")?,
            blocks: (0..shape.depth)
                .map(|i| TransformerBlock::build(&mut b.at("transformer_blocks").at(i), shape))
                .collect::<Result<_>>()?,
            proj_out: projection(b, "proj_out")?,
            linear_projection: shape.linear_projection,
        })
    }

    /// The input of the first block: [b, c, h, w] to [b, h w, c].
    pub(super) fn begin(&self, input: &Tensor, run: &mut Run) -> Result<Tensor> {
        let hidden = self.norm.forward(input)?;
        if self.linear_projection {
            run.layer(self.proj_in, &to_tokens(&hidden)?)
        } else {
            Ok(to_tokens(&run.layer(self.proj_in, &hidden)?)?)
        }
    }

    /// Runs a sublayer of block `index`: [b, h w, c] to [b, h w, c].
    pub(super) fn sublayer(
        &self,
        index: usize,
        sublayer: Sublayer,
        tokens: &Tensor,
        encoder_hidden_states: &Tensor,
        run: &mut Run,
    ) -> Result<Tensor> {
        self.blocks[index].forward(sublayer, tokens, encoder_hidden_states, run)
    }

    /// Projects the output of the last block, [b, h w, c], as an image, and adds it to the `input`
    /// of [`begin`](Self::begin).
    pub(super) fn end(&self, tokens: &Tensor, input: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (batch, channels, height, width) = input.size4()?;
        let to_image = |x: &Tensor| x.f_view([batch, height, width, channels])?.f_permute([0, 3, 1, 2])?.f_contiguous();
        run.onto(self.proj_out, input)?;
        let hidden = if self.linear_projection {
            to_image(&run.layer(self.proj_out, tokens)?)?
        } else {
            run.layer(self.proj_out, &to_image(tokens)?)?
        };
        Ok(hidden.f_add(input)?)
    }
}

/// [b, c, h, w] to [b, h w, c].
fn to_tokens(image: &Tensor) -> Result<Tensor, tch::TchError> {
    let (batch, channels, height, width) = image.size4()?;
    image.f_permute([0, 2, 3, 1])?.f_reshape([batch, height * width, channels])
}

/// One of the three parts of a transformer block, each of which is added to its input. They run in
/// this order.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sublayer {
    SelfAttention,
    CrossAttention,
    FeedForward,
}

impl Sublayer {
    pub(super) const ALL: [Self; 3] = [Self::SelfAttention, Self::CrossAttention, Self::FeedForward];

    /// The module's name in a block.
    pub(super) fn name(self) -> &'static str {
        match self {
            Sublayer::SelfAttention => "attn1",
            Sublayer::CrossAttention => "attn2",
            Sublayer::FeedForward => "ff",
        }
    }
}

/// `diffusers.models.attention.BasicTransformerBlock` with a layer norm before each of its
/// sublayers.
#[derive(Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    feed_forward: FeedForward,
}

impl TransformerBlock {
    fn build(b: &mut Builder, shape: TransformerShape) -> Result<Self> {
        let width = shape.channels;
        Ok(TransformerBlock {
            norm1: b.layer_norm("norm1", width, 1e-5)?,
            attn1: Attention::build(&mut b.at(Sublayer::SelfAttention.name()), width, None, shape.heads)?,
            norm2: b.layer_norm("norm2", width, 1e-5)?,
            attn2: Attention::build(
                &mut b.at(Sublayer::CrossAttention.name()),
                width,
                Some(shape.cross_attention_dim),
                shape.heads,
            )?,
            norm3: b.layer_norm("norm3", width, 1e-5)?,
            feed_forward: FeedForward::build(&mut b.at(Sublayer::FeedForward.name()), width)?,
        })
    }

    fn forward(&self, sublayer: Sublayer, hidden: &Tensor, encoder_hidden_states: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (norm, out) = match sublayer {
            Sublayer::SelfAttention => (&self.norm1, self.attn1.to_out),
            Sublayer::CrossAttention => (&self.norm2, self.attn2.to_out),
            Sublayer::FeedForward => (&self.norm3, self.feed_forward.out),
        };
        let normed = norm.forward(hidden)?;
        run.onto(out, hidden)?;
        let mut output = match sublayer {
            Sublayer::SelfAttention => self.attn1.forward(&normed, &normed, run)?,
            Sublayer::CrossAttention => self.attn2.forward(&normed, encoder_hidden_states, run)?,
            Sublayer::FeedForward => self.feed_forward.forward(&normed, run)?,
        };
        Ok(output.f_add_(hidden)?)
    }
}

/// `diffusers.models.attention_processor.Attention` without biases on q, k, v.
#[derive(Debug)]
struct Attention {
    to_q: LayerId,
    to_k: LayerId,
    to_v: LayerId,
    to_out: LayerId,
    heads: i64,
}

impl Attention {
    /// `text_width` is the width of the text states for a cross-attention; `None` for a
    /// self-attention.
    fn build(b: &mut Builder, width: i64, text_width: Option<i64>, heads: i64) -> Result<Self> {
        let (context, context_width) = match text_width {
            Some(text_width) => (LayerInput::Text, text_width),
            None => (b.features("to_q"), width),
        };
        Ok(Attention {
            to_q: b.linear("to_q", width, width, false)?,
            to_k: b.linear_of("to_k", context.clone(), context_width, width, false)?,
            to_v: b.linear_of("to_v", context, context_width, width, false)?,
            to_out: b.linear("to_out.0", width, width, true)?,
            heads,
        })
    }

    /// Queries are made from `hidden` [b, s, width], keys and values from `context` [b, t,
    /// context_width].
    fn forward(&self, hidden: &Tensor, context: &Tensor, run: &mut Run) -> Result<Tensor> {
        let query = split_heads(&run.layer(self.to_q, hidden)?, self.heads)?;
        let key = split_heads(&run.layer(self.to_k, context)?, self.heads)?;
        let value = split_heads(&run.layer(self.to_v, context)?, self.heads)?;
        run.layer(self.to_out, &attend(&query, &key, &value, false)?)
    }
}

/// The GEGLU feed-forward (Shazeer 2020): a projection to twice four widths, one half gated by the
/// GELU of the other.
#[derive(Debug)]
struct FeedForward {
    proj: LayerId,
    out: LayerId,
}

impl FeedForward {
    fn build(b: &mut Builder, width: i64) -> Result<Self> {
        let inner = 4 * width;
        Ok(FeedForward { proj: b.linear("net.0.proj", width, 2 * inner, true)?, out: b.linear("net.2", inner, width, true)? })
    }

    fn forward(&self, input: &Tensor, run: &mut Run) -> Result<Tensor> {
        let projected = run.layer(self.proj, input)?;
        let inner = projected.size3()?.2 / 2;
        let gate = projected.f_narrow(-1, inner, inner)?.f_gelu("none")?;
        let gated = projected.f_narrow(-1, 0, inner)?.f_mul(&gate)?;
        drop(projected);
        run.layer(self.out, &gated)
    }
}
