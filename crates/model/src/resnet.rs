//! The residual block of the UNet and the VAE.

use squeeze_base::error::Result;
use squeeze_numerics::elementwise::silu_in_place;
use tch::Tensor;

use super::layer::{ConvGeometry, LayerInput};
use super::network::{Builder, GroupNorm, LayerId, Run};

/// The sizes of a `ResnetBlock2D`.
#[derive(Debug, Clone, Copy)]
pub struct ResnetShape {
    /// Channels of the input.
    pub input: i64,
    /// Channels of the output.
    pub output: i64,
    /// The width of the time embedding; `None` for blocks without one (VAE).
    pub temb: Option<i64>,
    /// Groups of the norms.
    pub groups: i64,
    /// The norms' epsilon.
    pub eps: f64,
}

/// `diffusers.models.resnet.ResnetBlock2D` with SiLU and the default time shift: two 3x3
/// convolutions around a skip.
#[derive(Debug)]
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: LayerId,
    time_emb_proj: Option<LayerId>,
    norm2: GroupNorm,
    conv2: LayerId,
    conv_shortcut: Option<LayerId>,
}

impl Resnet {
    pub(crate) fn build(b: &mut Builder, shape: ResnetShape) -> Result<Self> {
        let ResnetShape { input, output, temb, groups, eps } = shape;
        let same = ConvGeometry::new(1, 1);
        Ok(Resnet {
            norm1: b.group_norm("norm1", groups, input, eps)?,
            conv1: b.conv2d("conv1", input, output, 3, same)?,
            time_emb_proj: temb.map(|width| b.linear_of("time_emb_proj", LayerInput::Time, width, output, true)).transpose()?,
            norm2: b.group_norm("norm2", groups, output, eps)?,
            conv_shortcut: (input != output)
                .then(|| b.conv2d("conv_shortcut", input, output, 1, ConvGeometry::new(1, 0)))
                .transpose()?,
            conv2: b.conv2d("conv2", output, output, 3, same)?,
        })
    }

    /// `silu_temb` is SiLU(temb), which all resnets of a UNet share: [b, temb].
    pub(crate) fn forward(&self, input: &Tensor, silu_temb: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        let mut hidden = run.layer(self.conv1, &silu_in_place(self.norm1.forward(input)?)?)?;
        if let (Some(projection), Some(temb)) = (self.time_emb_proj, silu_temb) {
            hidden = hidden.f_add_(&run.layer(projection, temb)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let normed = silu_in_place(self.norm2.forward(&hidden)?)?;
        drop(hidden);
        let shortcut = self.conv_shortcut.map(|shortcut| run.layer(shortcut, input)).transpose()?;
        let skip = shortcut.as_ref().unwrap_or(input);
        run.onto(self.conv2, skip)?;
        Ok(run.layer(self.conv2, &normed)?.f_add_(skip)?)
    }
}
