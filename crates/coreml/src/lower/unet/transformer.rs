//! Spatial transformers in both layouts.

use sdxl_model::ConvGeometry;
use sdxl_model::unet::TransformerShape;
use squeeze_base::error::{Error, Result};

use super::super::Network;
use super::super::attention::Heads;
use super::UnetLowering;
use crate::literal::Literal;
use crate::program::Var;

/// Epsilon of the layer norms of `BasicTransformerBlock`.
const NORM_EPS: f64 = 1e-5;

impl UnetLowering<'_> {
    /// `Transformer2DModel`, as [`sdxl_model::unet`] computes it: [b, c, h, w] to [b, c, h,
    /// w].
    pub(super) fn transformer(&mut self, name: &str, x: &Var, shape: TransformerShape) -> Result<Var> {
        let net = &mut self.network;
        let pixels = x.dims(name)?;
        let pointwise = ConvGeometry::new(1, 0);
        let normed = net.group_norm(&format!("{name}.norm"), x, shape.groups, 1e-6)?;
        let mut hidden = if shape.linear_projection {
            let tokens = net.tokens(name, &normed)?;
            net.dense(&format!("{name}.proj_in"), &tokens, shape.channels, true)?
        } else {
            let projected = net.conv2d(&format!("{name}.proj_in"), &normed, shape.channels, 1, pointwise, 0)?;
            net.tokens(name, &projected)?
        };
        for i in 0..shape.depth {
            let text = self.text.as_ref().ok_or_else(|| Error::internal(format!("`{name}` is given no text states")))?;
            hidden = block(net, &format!("{name}.transformer_blocks.{i}"), hidden, text, shape)?;
        }
        let hidden = if shape.linear_projection {
            let projected = net.dense(&format!("{name}.proj_out"), &hidden, shape.channels, true)?;
            net.image(name, &projected, pixels)?
        } else {
            let image = net.image(name, &hidden, pixels)?;
            net.conv2d(&format!("{name}.proj_out"), &image, shape.channels, 1, pointwise, 0)?
        };
        net.binary("add", name, &hidden, x)
    }
}

/// `BasicTransformerBlock`: attention among the tokens, attention to the text, a gated
/// feed-forward.
fn block(net: &mut Network, name: &str, x: Var, text: &Var, shape: TransformerShape) -> Result<Var> {
    let normed = net.layer_norm(&format!("{name}.norm1"), &x, NORM_EPS)?;
    let mixed = attention(net, &format!("{name}.attn1"), &normed, &normed, shape)?;
    let x = net.binary("add", &format!("{name}.residual1"), &mixed, &x)?;
    let normed = net.layer_norm(&format!("{name}.norm2"), &x, NORM_EPS)?;
    let mixed = attention(net, &format!("{name}.attn2"), &normed, text, shape)?;
    let x = net.binary("add", &format!("{name}.residual2"), &mixed, &x)?;
    let normed = net.layer_norm(&format!("{name}.norm3"), &x, NORM_EPS)?;
    let fed = feed_forward(net, &format!("{name}.ff"), &normed, shape.channels)?;
    net.binary("add", name, &fed, &x)
}

/// Queries from `hidden`, keys and values from `context`.
fn attention(net: &mut Network, name: &str, hidden: &Var, context: &Var, shape: TransformerShape) -> Result<Var> {
    let query = net.dense(&format!("{name}.to_q"), hidden, shape.channels, false)?;
    let key = net.dense(&format!("{name}.to_k"), context, shape.channels, false)?;
    let value = net.dense(&format!("{name}.to_v"), context, shape.channels, false)?;
    let heads = Heads { heads: shape.heads as u64, width: (shape.channels / shape.heads) as u64 };
    let mixed = net.attention(name, [&query, &key, &value], heads)?;
    net.dense(&format!("{name}.to_out.0"), &mixed, shape.channels, true)
}

/// GEGLU: a projection to twice four widths, whose first half is gated by the GELU of the second.
fn feed_forward(net: &mut Network, name: &str, x: &Var, width: i64) -> Result<Var> {
    let projected = net.dense(&format!("{name}.net.0.proj"), x, 8 * width, true)?;
    let [hidden, gate] = net.halve(&format!("{name}.net.0.split"), &projected)?;
    let exact = Literal::text("EXACT");
    let gate = net.op("gelu", &format!("{name}.net.0.gate"), [("x", (&gate).into()), ("mode", exact.into())])?;
    let gated = net.binary("mul", &format!("{name}.net.0"), &hidden, &gate)?;
    net.dense(&format!("{name}.net.2"), &gated, width, true)
}
