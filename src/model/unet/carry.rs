//! What goes from stage to stage.

use tch::Tensor;

use crate::error::Result;

/// Everything that a stage takes and gives. The UNet has no connection that is not in it, so the output of one stage is the whole
/// input of the next.
#[derive(Debug)]
pub struct Carry {
    /// The image features: [b, c, h, w].
    pub hidden_states: Tensor,
    /// The stack of skip connections: down stages push, up stages pop.
    pub down_block_res_samples: Vec<Tensor>,
    /// The embedding of timestep, pooled text and time ids, before its SiLU: [b, time_embed_dim].
    pub temb: Tensor,
    /// The text states: [b, s, cross_attention_dim].
    pub encoder_hidden_states: Tensor,
}

impl Carry {
    /// A carry of the same tensors (no data is copied).
    pub fn shallow_clone(&self) -> Carry {
        Carry {
            hidden_states: self.hidden_states.shallow_clone(),
            down_block_res_samples: self.down_block_res_samples.iter().map(Tensor::shallow_clone).collect(),
            temb: self.temb.shallow_clone(),
            encoder_hidden_states: self.encoder_hidden_states.shallow_clone(),
        }
    }

    /// Takes the newest residual and appends its channels to `hidden_states`.
    pub(super) fn pop_residual(&mut self, hidden_states: &Tensor) -> Result<Tensor> {
        let residual = self.down_block_res_samples.pop().ok_or_else(|| {
            crate::Error::Argument("an up stage was given a carry without residuals: the stages ran out of order".into())
        })?;
        Ok(Tensor::f_cat(&[hidden_states, &residual], 1)?)
    }
}
