//! Down, mid and up stages.

use super::Lowering;
use crate::coreml::literal::Literal;
use crate::coreml::program::Var;
use crate::error::{Error, Result};
use crate::model::ConvGeometry;
use crate::model::unet::{Resample, StageName, StageSpec};

impl Lowering<'_> {
    /// A stage, as [`crate::model::unet::Stage`] computes it.
    pub(super) fn stage(&mut self, stage: &StageSpec, mut hidden: Var) -> Result<Var> {
        let name = stage.name().to_string();
        for (i, shape) in stage.resnets().iter().enumerate() {
            if let StageName::Up(_) = stage.name() {
                let residual = self.residuals.pop().ok_or_else(|| Error::Failed(format!("`{name}` has no residual left")))?;
                hidden = self.concat(&format!("{name}.skip.{i}"), &[&hidden, &residual], 1)?;
            }
            hidden = self.resnet(&format!("{name}.resnets.{i}"), &hidden, *shape)?;
            if let Some(shape) = stage.transformers().get(i) {
                hidden = self.transformer(&format!("{name}.attentions.{i}"), &hidden, *shape)?;
            }
            if let StageName::Down(_) = stage.name() {
                self.residuals.push(hidden.clone());
            }
        }
        match stage.resample() {
            None => Ok(hidden),
            Some(Resample::Down { channels, padding }) => {
                // Without padding of its own it gets one row and column of zeros at the end.
                let geometry = ConvGeometry::new(2, padding);
                let after = i64::from(padding == 0);
                let smaller = self.conv2d(&format!("{name}.downsamplers.0.conv"), &hidden, channels, 3, geometry, after)?;
                self.residuals.push(smaller.clone());
                Ok(smaller)
            }
            Some(Resample::Up { channels }) => {
                let larger = [
                    ("x", (&hidden).into()),
                    ("scale_factor_height", Literal::Float(2.0).into()),
                    ("scale_factor_width", Literal::Float(2.0).into()),
                ];
                let larger = self.op("upsample_nearest_neighbor", &format!("{name}.upsamplers.0"), larger)?;
                self.conv2d(&format!("{name}.upsamplers.0.conv"), &larger, channels, 3, ConvGeometry::new(1, 1), 0)
            }
        }
    }
}
