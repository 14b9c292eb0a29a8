//! Residual blocks.

use super::{Layout, Lowering};
use crate::coreml::program::Var;
use crate::error::{Error, Result};
use crate::model::{ConvGeometry, ResnetShape};

impl Lowering<'_> {
    /// `ResnetBlock2D`, as [`crate::model`] computes it.
    pub(super) fn resnet(&mut self, name: &str, x: &Var, shape: ResnetShape) -> Result<Var> {
        let ResnetShape { input, output, groups, eps, .. } = shape;
        let same = ConvGeometry::new(1, 1);
        let normed = self.group_norm(&format!("{name}.norm1"), x, groups, eps)?;
        let active = self.unary("silu", &format!("{name}.silu1"), &normed)?;
        let mut hidden = self.conv2d(&format!("{name}.conv1"), &active, output, 3, same, 0)?;
        let silu_temb = self.silu_temb.clone().ok_or_else(|| Error::Failed("a resnet before the time embedding".into()))?;
        let time = self.dense(&format!("{name}.time_emb_proj"), &silu_temb, output, true)?;
        let time = self.pixels(&format!("{name}.time"), time)?;
        hidden = self.binary("add", &format!("{name}.timed"), &hidden, &time)?;
        let normed = self.group_norm(&format!("{name}.norm2"), &hidden, groups, eps)?;
        let active = self.unary("silu", &format!("{name}.silu2"), &normed)?;
        let skip = match input == output {
            true => x.clone(),
            false => self.conv2d(&format!("{name}.conv_shortcut"), x, output, 1, ConvGeometry::new(1, 0), 0)?,
        };
        hidden = self.conv2d(&format!("{name}.conv2"), &active, output, 3, same, 0)?;
        self.binary("add", name, &skip, &hidden)
    }

    /// [b, c] to [b, c, 1, 1]; in the split layout it is so already.
    pub(super) fn pixels(&mut self, name: &str, x: Var) -> Result<Var> {
        match self.layout {
            Layout::SplitEinsum => Ok(x),
            Layout::Linear => self.append_axes(name, &x),
        }
    }

    /// [b, c] to [b, c, 1, 1], an axis at a time, as coremltools does.
    pub(super) fn append_axes(&mut self, name: &str, x: &Var) -> Result<Var> {
        let row = self.expand(&format!("{name}.row"), x, 2)?;
        self.expand(&format!("{name}.pixel"), &row, 3)
    }
}
