//! Spatial transformers in both layouts.

use half::f16;

use super::{Layout, Lowering};
use crate::coreml::literal::Literal;
use crate::coreml::program::{Arg, Var};
use crate::error::{Error, Result};
use crate::model::ConvGeometry;
use crate::model::unet::TransformerShape;

impl Lowering<'_> {
    /// `Transformer2DModel`, as [`crate::model::unet`] computes it: [b, c, h, w] to the same.
    pub(super) fn transformer(&mut self, name: &str, x: &Var, shape: TransformerShape) -> Result<Var> {
        let pixels = x.shape().to_vec();
        let normed = self.group_norm(&format!("{name}.norm"), x, shape.groups, 1e-6)?;
        let mut hidden = if shape.linear_projection {
            let tokens = self.tokens(name, &normed)?;
            self.dense(&format!("{name}.proj_in"), &tokens, shape.channels, true)?
        } else {
            let projected = self.conv2d(&format!("{name}.proj_in"), &normed, shape.channels, 1, ConvGeometry::new(1, 0), 0)?;
            self.tokens(name, &projected)?
        };
        for i in 0..shape.depth {
            hidden = self.transformer_block(&format!("{name}.transformer_blocks.{i}"), hidden, shape)?;
        }
        let hidden = if shape.linear_projection {
            let projected = self.dense(&format!("{name}.proj_out"), &hidden, shape.channels, true)?;
            self.image(name, &projected, &pixels)?
        } else {
            let image = self.image(name, &hidden, &pixels)?;
            self.conv2d(&format!("{name}.proj_out"), &image, shape.channels, 1, ConvGeometry::new(1, 0), 0)?
        };
        self.binary("add", name, &hidden, x)
    }

    /// [b, c, h, w] to [b, h w, c], or [b, c, 1, h w].
    fn tokens(&mut self, name: &str, x: &Var) -> Result<Var> {
        let [batch, channels, height, width] = *x.shape() else { return Err(misshapen(name, x)) };
        let tokens = format!("{name}.tokens");
        match self.layout {
            Layout::Linear => {
                let last = self.transpose(&format!("{name}.channels_last"), x, &[0, 2, 3, 1])?;
                self.reshape(&tokens, &last, &[batch, height * width, channels])
            }
            Layout::SplitEinsum => self.reshape(&tokens, x, &[batch, channels, 1, height * width]),
        }
    }

    /// Tokens to [b, c, h, w].
    fn image(&mut self, name: &str, x: &Var, pixels: &[u64]) -> Result<Var> {
        let [batch, channels, height, width] = *pixels else { return Err(misshapen(name, x)) };
        let image = format!("{name}.image");
        match self.layout {
            Layout::Linear => {
                let last = self.reshape(&format!("{name}.pixels"), x, &[batch, height, width, channels])?;
                self.transpose(&image, &last, &[0, 3, 1, 2])
            }
            Layout::SplitEinsum => self.reshape(&image, x, pixels),
        }
    }

    fn transformer_block(&mut self, name: &str, x: Var, shape: TransformerShape) -> Result<Var> {
        let text = self.text.clone().ok_or_else(|| Error::Failed("a transformer before the text states".into()))?;
        let normed = self.layer_norm(&format!("{name}.norm1"), &x)?;
        let mixed = self.attention(&format!("{name}.attn1"), &normed, &normed, shape)?;
        let x = self.binary("add", &format!("{name}.residual1"), &mixed, &x)?;
        let normed = self.layer_norm(&format!("{name}.norm2"), &x)?;
        let mixed = self.attention(&format!("{name}.attn2"), &normed, &text, shape)?;
        let x = self.binary("add", &format!("{name}.residual2"), &mixed, &x)?;
        let normed = self.layer_norm(&format!("{name}.norm3"), &x)?;
        let fed = self.feed_forward(&format!("{name}.ff"), &normed, shape.channels)?;
        self.binary("add", name, &fed, &x)
    }

    /// `hidden` asks, `context` answers.
    fn attention(&mut self, name: &str, hidden: &Var, context: &Var, shape: TransformerShape) -> Result<Var> {
        let query = self.dense(&format!("{name}.to_q"), hidden, shape.channels, false)?;
        let key = self.dense(&format!("{name}.to_k"), context, shape.channels, false)?;
        let value = self.dense(&format!("{name}.to_v"), context, shape.channels, false)?;
        let (heads, width) = (shape.heads as u64, (shape.channels / shape.heads) as u64);
        let mixed = match self.layout {
            Layout::Linear => self.whole_attention(name, [&query, &key, &value], heads, width)?,
            Layout::SplitEinsum => self.split_attention(name, [&query, &key, &value], heads, width)?,
        };
        self.dense(&format!("{name}.to_out.0"), &mixed, shape.channels, true)
    }

    /// All heads at once, on [b, s, c]. The operation itself divides by the root of a head's width.
    fn whole_attention(&mut self, name: &str, [query, key, value]: [&Var; 3], heads: u64, width: u64) -> Result<Var> {
        let mut split = |what: &str, x: &Var| -> Result<Var> {
            let [batch, length, _] = *x.shape() else { return Err(misshapen(name, x)) };
            let rows = self.reshape(&format!("{name}.{what}.rows"), x, &[batch, length, heads, width])?;
            self.transpose(&format!("{name}.{what}.heads"), &rows, &[0, 2, 1, 3])
        };
        let (q, k, v) = (split("q", query)?, split("k", key)?, split("v", value)?);
        let parameters = [("query", (&q).into()), ("key", (&k).into()), ("value", (&v).into())];
        let mixed = self.op("scaled_dot_product_attention", &format!("{name}.heads"), parameters)?;
        let rows = self.transpose(&format!("{name}.rows"), &mixed, &[0, 2, 1, 3])?;
        self.reshape(&format!("{name}.mixed"), &rows, query.shape())
    }

    /// Head by head, on [b, c, 1, s] (apple/ml-stable-diffusion, `attention.py`, `split_einsum`).
    fn split_attention(&mut self, name: &str, [query, key, value]: [&Var; 3], heads: u64, width: u64) -> Result<Var> {
        let keys_last = self.transpose(&format!("{name}.k.rows"), key, &[0, 3, 2, 1])?;
        let scale = Literal::Half(f16::from_f64(1.0 / (width as f64).sqrt()));
        let mut mixed = Vec::new();
        for head in 0..heads {
            let at = |what: &str| format!("{name}.{what}.{head}");
            let q = self.slice(&at("q"), query, 1, head * width, width)?;
            let k = self.slice(&at("k"), &keys_last, 3, head * width, width)?;
            let v = self.slice(&at("v"), value, 1, head * width, width)?;
            let scores = self.einsum(&at("scores"), "bkhc,bchq->bkhq", &k, &q)?;
            let scaled = self.op("mul", &at("scaled"), [("x", (&scores).into()), ("y", scale.clone().into())])?;
            let weights = self.op("softmax", &at("weights"), [("x", (&scaled).into()), ("axis", Literal::Int(1).into())])?;
            mixed.push(self.einsum(&at("mixed"), "bchk,bkhq->bchq", &v, &weights)?);
        }
        self.concat(&format!("{name}.mixed"), &mixed.iter().collect::<Vec<_>>(), 1)
    }

    fn einsum(&mut self, name: &str, equation: &str, x: &Var, y: &Var) -> Result<Var> {
        self.op("einsum", name, [("values", Arg::Vars(&[x, y])), ("equation", Literal::text(equation).into())])
    }

    /// `length` of the channels of an axis from `start` on.
    fn slice(&mut self, name: &str, x: &Var, axis: usize, start: u64, length: u64) -> Result<Var> {
        let mut begin = vec![0; x.shape().len()];
        let mut end = x.shape().to_vec();
        let mut to_end = vec![true; end.len()];
        begin.iter_mut().skip(axis).take(1).for_each(|n| *n = start);
        end.iter_mut().skip(axis).take(1).for_each(|n| *n = start + length);
        to_end.iter_mut().skip(axis).take(1).for_each(|n| *n = false);
        let parameters = [
            ("x", x.into()),
            ("begin", Literal::sizes(&begin).into()),
            ("end", Literal::sizes(&end).into()),
            ("end_mask", Literal::Bools(to_end).into()),
        ];
        self.op("slice_by_index", name, parameters)
    }

    /// GEGLU: twice four widths, one half gated by the GELU of the other.
    fn feed_forward(&mut self, name: &str, x: &Var, width: i64) -> Result<Var> {
        let inner = 4 * width;
        let projected = self.dense(&format!("{name}.net.0.proj"), x, 2 * inner, true)?;
        let axis = match self.layout {
            Layout::Linear => -1,
            Layout::SplitEinsum => 1,
        };
        let parameters = [
            ("x", (&projected).into()),
            ("split_sizes", Literal::sizes(&[inner as u64; 2]).into()),
            ("axis", Literal::Int(axis).into()),
        ];
        let halves = self.program.ops("split", &format!("{name}.net.0.split"), &parameters)?;
        let [hidden, gate] = &halves[..] else { return Err(misshapen(name, &projected)) };
        let gate =
            self.op("gelu", &format!("{name}.net.0.gate"), [("x", gate.into()), ("mode", Literal::text("EXACT").into())])?;
        let gated = self.binary("mul", &format!("{name}.net.0"), hidden, &gate)?;
        self.dense(&format!("{name}.net.2"), &gated, width, true)
    }
}

fn misshapen(name: &str, x: &Var) -> Error {
    Error::Failed(format!("`{name}` is given {:?}", x.shape()))
}
