//! Normalizations.

use half::f16;
use squeeze_base::error::Result;

use super::Network;
use crate::element::Element;
use crate::literal::Literal;
use crate::program::{Arg, Var};

impl Network<'_> {
    /// `torch.nn.GroupNorm`, in the operations that coremltools takes it apart to
    /// (`frontend/torch/ops.py`, `group_norm`).
    ///
    /// The last operation is a `batch_norm` of mean 0 and variance 1, which applies weight and
    /// bias. Its epsilon of 1e-5 makes all values smaller by 5e-6, in coremltools too.
    pub(super) fn group_norm(&mut self, name: &str, x: &Var, groups: i64, eps: f64) -> Result<Var> {
        let shape = x.dims(name)?;
        let [batch, channels, height, width] = shape;
        let groups = groups as u64;
        let gamma = self.tensor(&format!("{name}.weight"), &[channels], &[channels])?;
        let beta = self.tensor(&format!("{name}.bias"), &[channels], &[channels])?;
        let mean = |this: &mut Self, name: &str, x: &Var| {
            let axes = Literal::Ints(vec![2, 3, 4]);
            this.op("reduce_mean", name, [("x", x.into()), ("axes", axes.into()), ("keep_dims", Literal::Bool(true).into())])
        };
        let grouped = self.reshape(&format!("{name}.grouped"), x, &[batch, groups, channels / groups, height, width])?;
        let average = mean(self, &format!("{name}.mean"), &grouped)?;
        let centered = self.binary("sub", &format!("{name}.centered"), &grouped, &average)?;
        let squared = self.unary("square", &format!("{name}.squared"), &centered)?;
        let variance = mean(self, &format!("{name}.variance"), &squared)?;
        let shifted = self.epsilon(eps);
        let shifted = self.op("add", &format!("{name}.shifted"), [("x", (&variance).into()), ("y", shifted)])?;
        let deviation = self.unary("sqrt", &format!("{name}.deviation"), &shifted)?;
        let scaled = self.binary("real_div", &format!("{name}.scaled"), &centered, &deviation)?;
        let normed = self.reshape(&format!("{name}.normed"), &scaled, &shape)?;
        let zeros = self.repeated(&format!("zeros_{channels}"), f16::ZERO, channels)?;
        let ones = self.repeated(&format!("ones_{channels}"), f16::ONE, channels)?;
        let parameters = [
            ("x", (&normed).into()),
            ("mean", (&zeros).into()),
            ("variance", (&ones).into()),
            ("gamma", (&gamma).into()),
            ("beta", (&beta).into()),
            ("epsilon", self.epsilon(1e-5)),
        ];
        self.op("batch_norm", name, parameters)
    }

    /// `torch.nn.LayerNorm` over the channels of tokens.
    pub(super) fn layer_norm(&mut self, name: &str, x: &Var, eps: f64) -> Result<Var> {
        let channels = self.channels(x);
        let gamma = self.tensor(&format!("{name}.weight"), &[channels], &[channels])?;
        let beta = self.tensor(&format!("{name}.bias"), &[channels], &[channels])?;
        let parameters = [
            ("x", x.into()),
            ("axes", Literal::Ints(vec![self.channel_axis_literal()]).into()),
            ("gamma", (&gamma).into()),
            ("beta", (&beta).into()),
            ("epsilon", self.epsilon(eps)),
        ];
        self.op("layer_norm", name, parameters)
    }

    /// An epsilon in the network's dtype. In fp16 it must not become zero.
    fn epsilon<'v>(&self, eps: f64) -> Arg<'v> {
        match self.element {
            Element::F32 => self.number(eps).into(),
            _ => Literal::Half(f16::from_f64(eps).max(f16::from_bits(1))).into(),
        }
    }
}
