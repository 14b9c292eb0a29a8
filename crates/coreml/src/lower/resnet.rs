//! Residual blocks.

use sdxl_model::{ConvGeometry, ResnetShape};
use squeeze_base::error::Result;

use super::Network;
use crate::options::Layout;
use crate::program::Var;

impl Network<'_> {
    /// `ResnetBlock2D`, as [`sdxl_model`] computes it. `silu_temb` is SiLU of the embedding of
    /// time, text and sizes, which the resnets of a VAE do not have.
    pub(super) fn resnet(&mut self, name: &str, x: &Var, shape: ResnetShape, silu_temb: Option<&Var>) -> Result<Var> {
        let ResnetShape { input, output, groups, eps, .. } = shape;
        let net = self;
        let same = ConvGeometry::new(1, 1);
        let normed = net.group_norm(&format!("{name}.norm1"), x, groups, eps)?;
        let active = net.unary("silu", &format!("{name}.silu1"), &normed)?;
        let mut hidden = net.conv2d(&format!("{name}.conv1"), &active, output, 3, same, 0)?;
        if let Some(silu_temb) = silu_temb {
            let time = net.dense(&format!("{name}.time_emb_proj"), silu_temb, output, true)?;
            let time = match net.layout {
                // [b, c, 1, 1] already.
                Layout::SplitEinsum => time,
                Layout::Linear => net.append_axes(&format!("{name}.time"), &time)?,
            };
            hidden = net.binary("add", &format!("{name}.timed"), &hidden, &time)?;
        }
        let normed = net.group_norm(&format!("{name}.norm2"), &hidden, groups, eps)?;
        let active = net.unary("silu", &format!("{name}.silu2"), &normed)?;
        let skip = match input == output {
            true => x.clone(),
            false => net.conv2d(&format!("{name}.conv_shortcut"), x, output, 1, ConvGeometry::new(1, 0), 0)?,
        };
        hidden = net.conv2d(&format!("{name}.conv2"), &active, output, 3, same, 0)?;
        net.binary("add", name, &skip, &hidden)
    }
}
