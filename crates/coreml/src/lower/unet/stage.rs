//! Down, mid and up stages.

use sdxl_model::ConvGeometry;
use sdxl_model::unet::{Resample, StageName, StageSpec};
use squeeze_base::error::{Error, Result};

use super::UnetLowering;
use crate::program::Var;

impl UnetLowering<'_> {
    /// A stage, as [`sdxl_model::unet::Stage`] computes it.
    pub(super) fn stage(&mut self, stage: &StageSpec, mut hidden: Var) -> Result<Var> {
        let name = stage.name().to_string();
        for (i, shape) in stage.resnets().iter().enumerate() {
            if let StageName::Up(_) = stage.name() {
                let none_left = || Error::internal(format!("`{name}` has no skip connection left"));
                let residual = self.residuals.pop().ok_or_else(none_left)?;
                hidden = self.network.concat(&format!("{name}.skip.{i}"), &[&hidden, &residual], 1)?;
            }
            let silu_temb = self.silu_temb.as_ref().ok_or_else(|| Error::internal(format!("`{name}` is given no embedding")))?;
            hidden = self.network.resnet(&format!("{name}.resnets.{i}"), &hidden, *shape, Some(silu_temb))?;
            if let Some(shape) = stage.transformers().get(i) {
                hidden = self.transformer(&format!("{name}.attentions.{i}"), &hidden, *shape)?;
            }
            if let StageName::Down(_) = stage.name() {
                self.residuals.push(hidden.clone());
            }
        }
        let net = &mut self.network;
        match stage.resample() {
            None => Ok(hidden),
            Some(Resample::Down { channels, padding }) => {
                // Without padding of its own, the convolution gets one row and column of zeros at
                // the end.
                let geometry = ConvGeometry::new(2, padding);
                let after = i64::from(padding == 0);
                let smaller = net.conv2d(&format!("{name}.downsamplers.0.conv"), &hidden, channels, 3, geometry, after)?;
                self.residuals.push(smaller.clone());
                Ok(smaller)
            }
            Some(Resample::Up { channels }) => {
                let larger = net.upsample(&format!("{name}.upsamplers.0"), &hidden)?;
                net.conv2d(&format!("{name}.upsamplers.0.conv"), &larger, channels, 3, ConvGeometry::new(1, 1), 0)
            }
        }
    }
}
