//! Normalizations.

use half::f16;

use super::{Layout, Lowering};
use crate::coreml::literal::Literal;
use crate::coreml::program::Var;
use crate::error::{Error, Result};

impl Lowering<'_> {
    /// `torch.nn.GroupNorm`, in the operations that coremltools takes it apart to (`frontend/torch/ops.py`, `group_norm`).
    ///
    /// The last of them is a `batch_norm` of mean 0 and variance 1, for weight and bias; its epsilon of 1e-5 makes all values smaller by
    /// 5e-6, here as there.
    pub(super) fn group_norm(&mut self, name: &str, x: &Var, groups: i64, eps: f64) -> Result<Var> {
        let shape = x.shape().to_vec();
        let [batch, channels, height, width] = shape[..] else {
            return Err(Error::Failed(format!("`{name}` is given {shape:?}")));
        };
        let groups = groups as u64;
        let gamma = self.tensor(&format!("{name}.weight"), &[channels], &[channels])?;
        let beta = self.tensor(&format!("{name}.bias"), &[channels], &[channels])?;
        let mean = |this: &mut Self, what: &str, x: &Var| {
            let axes = Literal::Ints(vec![2, 3, 4]);
            this.op("reduce_mean", what, [("x", x.into()), ("axes", axes.into()), ("keep_dims", Literal::Bool(true).into())])
        };
        let grouped = self.reshape(&format!("{name}.grouped"), x, &[batch, groups, channels / groups, height, width])?;
        let average = mean(self, &format!("{name}.mean"), &grouped)?;
        let centered = self.binary("sub", &format!("{name}.centered"), &grouped, &average)?;
        let squared = self.unary("square", &format!("{name}.squared"), &centered)?;
        let variance = mean(self, &format!("{name}.variance"), &squared)?;
        let shifted = Literal::Half(epsilon(eps));
        let shifted = self.op("add", &format!("{name}.shifted"), [("x", (&variance).into()), ("y", shifted.into())])?;
        let deviation = self.unary("sqrt", &format!("{name}.deviation"), &shifted)?;
        let scaled = self.binary("real_div", &format!("{name}.scaled"), &centered, &deviation)?;
        let normed = self.reshape(&format!("{name}.normed"), &scaled, &shape)?;
        let zeros = self.program.repeated(&format!("zeros_{channels}"), f16::ZERO, channels)?;
        let ones = self.program.repeated(&format!("ones_{channels}"), f16::ONE, channels)?;
        let parameters = [
            ("x", (&normed).into()),
            ("mean", (&zeros).into()),
            ("variance", (&ones).into()),
            ("gamma", (&gamma).into()),
            ("beta", (&beta).into()),
            ("epsilon", Literal::Half(epsilon(1e-5)).into()),
        ];
        self.op("batch_norm", name, parameters)
    }

    /// `torch.nn.LayerNorm` over the channels of tokens.
    pub(super) fn layer_norm(&mut self, name: &str, x: &Var) -> Result<Var> {
        let axis = self.channel_axis(x);
        let channels = x.shape().get(axis).copied().unwrap_or_default();
        let gamma = self.tensor(&format!("{name}.weight"), &[channels], &[channels])?;
        let beta = self.tensor(&format!("{name}.bias"), &[channels], &[channels])?;
        let axis = match self.layout {
            Layout::Linear => -1,
            Layout::SplitEinsum => 1,
        };
        let parameters = [
            ("x", x.into()),
            ("axes", Literal::Ints(vec![axis]).into()),
            ("gamma", (&gamma).into()),
            ("beta", (&beta).into()),
            ("epsilon", Literal::Half(epsilon(1e-5)).into()),
        ];
        self.op("layer_norm", name, parameters)
    }
}

/// An epsilon in fp16, where it must not become zero.
fn epsilon(eps: f64) -> f16 {
    f16::from_f64(eps).max(f16::from_bits(1))
}
