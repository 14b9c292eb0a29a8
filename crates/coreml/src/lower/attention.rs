//! Attention in both layouts.

use half::f16;
use squeeze_base::error::Result;

use super::Network;
use crate::literal::Literal;
use crate::options::Layout;
use crate::program::{Arg, Var};

/// The sizes of an attention: `heads` heads of `width` channels each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub heads: u64,
    pub width: u64,
}

impl Network<'_> {
    /// Scaled dot-product attention of projected queries, keys and values, in the tokens' form of
    /// the layout.
    pub(super) fn attention(&mut self, name: &str, projected: [&Var; 3], heads: Heads) -> Result<Var> {
        match self.layout {
            Layout::Linear => self.whole_attention(name, projected, heads, None),
            Layout::SplitEinsum => self.split_attention(name, projected, heads),
        }
    }

    /// All heads at once, on [b, n, c]. The operation itself divides by the root of a head's width,
    /// and adds `mask` [1, 1, n, n] to the scores.
    pub(super) fn whole_attention(
        &mut self,
        name: &str,
        [query, key, value]: [&Var; 3],
        heads: Heads,
        mask: Option<&Var>,
    ) -> Result<Var> {
        let Heads { heads, width } = heads;
        let mut split = |part: &str, x: &Var| -> Result<Var> {
            let [batch, length, _] = x.dims(name)?;
            let rows = self.reshape(&format!("{name}.{part}.rows"), x, &[batch, length, heads, width])?;
            self.transpose(&format!("{name}.{part}.heads"), &rows, &[0, 2, 1, 3])
        };
        let (q, k, v) = (split("q", query)?, split("k", key)?, split("v", value)?);
        let mut parameters: Vec<(&'static str, Arg)> = vec![("query", (&q).into()), ("key", (&k).into()), ("value", (&v).into())];
        parameters.extend(mask.map(|mask| ("attn_mask", mask.into())));
        let mixed = self.program.op("scaled_dot_product_attention", &format!("{name}.heads"), &parameters)?;
        let rows = self.transpose(&format!("{name}.rows"), &mixed, &[0, 2, 1, 3])?;
        self.reshape(&format!("{name}.mixed"), &rows, query.shape())
    }

    /// Head by head, on [b, c, 1, n] (apple/ml-stable-diffusion, `attention.py`, `split_einsum`).
    fn split_attention(&mut self, name: &str, [query, key, value]: [&Var; 3], heads: Heads) -> Result<Var> {
        let Heads { heads, width } = heads;
        let keys_last = self.transpose(&format!("{name}.k.rows"), key, &[0, 3, 2, 1])?;
        let scale = Literal::Half(f16::from_f64(1.0 / (width as f64).sqrt()));
        let mut mixed = Vec::new();
        for head in 0..heads {
            let at = |part: &str| format!("{name}.{part}.{head}");
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
}
