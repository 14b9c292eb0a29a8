//! The tensors that pass from stage to stage.

use squeeze_base::error::{Error, Result};
use tch::{Device, Tensor};

/// All inputs and outputs of a stage, skip connections included: the output of one stage is the
/// whole input of the next.
#[derive(Debug)]
pub struct Carry {
    /// The image features: [b, c, h, w].
    pub hidden_states: Tensor,
    /// The output of the latest block inside a transformer, [b, h w, c], while `hidden_states`
    /// still holds the transformer's input; `None` outside transformers.
    pub tokens: Option<Tensor>,
    /// The stack of skip connections: down stages push, up stages pop.
    pub down_block_res_samples: Vec<Tensor>,
    /// The embedding of timestep, pooled text and time ids, before its SiLU: [b, time_embed_dim].
    pub temb: Tensor,
    /// The text states: [b, s, cross_attention_dim].
    pub encoder_hidden_states: Tensor,
}

impl Carry {
    /// A carry of the same values whose tensors, but for the text states, are the leaves of a new
    /// autograd graph (no data is copied).
    ///
    /// # Errors
    /// If libtorch refuses, as it does for integers.
    pub fn as_leaves(&self) -> Result<Carry> {
        let leaf = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_detach()?.f_set_requires_grad(true)?) };
        Ok(Carry {
            hidden_states: leaf(&self.hidden_states)?,
            tokens: self.tokens.as_ref().map(leaf).transpose()?,
            down_block_res_samples: self.down_block_res_samples.iter().map(leaf).collect::<Result<_>>()?,
            temb: leaf(&self.temb)?,
            encoder_hidden_states: self.encoder_hidden_states.shallow_clone(),
        })
    }

    /// A carry of the same tensors (no data is copied).
    pub fn shallow_clone(&self) -> Carry {
        Carry {
            hidden_states: self.hidden_states.shallow_clone(),
            tokens: self.tokens.as_ref().map(Tensor::shallow_clone),
            down_block_res_samples: self.down_block_res_samples.iter().map(Tensor::shallow_clone).collect(),
            temb: self.temb.shallow_clone(),
            encoder_hidden_states: self.encoder_hidden_states.shallow_clone(),
        }
    }

    /// Concatenates carries along the batch. A single carry is not copied.
    ///
    /// # Errors
    /// If there are none, they are not at one place of the chain, or their shapes differ.
    pub fn join(carries: &[Carry]) -> Result<Carry> {
        let [first, others @ ..] = carries else { return Err(Error::internal("there are no carries to join")) };
        if others.is_empty() {
            return Ok(first.shallow_clone());
        }
        let place = |carry: &Carry| (carry.tokens.is_some(), carry.down_block_res_samples.len());
        if others.iter().any(|carry| place(carry) != place(first)) {
            return Err(Error::internal("carries of different places in the chain cannot be joined"));
        }
        let join = |pick: &dyn Fn(&Carry) -> &Tensor| -> Result<Tensor> {
            Ok(Tensor::f_cat(&carries.iter().map(pick).collect::<Vec<_>>(), 0)?)
        };
        let tokens: Vec<&Tensor> = carries.iter().filter_map(|carry| carry.tokens.as_ref()).collect();
        let residuals = 0..first.down_block_res_samples.len();
        Ok(Carry {
            hidden_states: join(&|carry| &carry.hidden_states)?,
            tokens: if tokens.is_empty() { None } else { Some(Tensor::f_cat(&tokens, 0)?) },
            down_block_res_samples: residuals
                .map(|index| join(&|carry| &carry.down_block_res_samples[index]))
                .collect::<Result<_>>()?,
            temb: join(&|carry| &carry.temb)?,
            encoder_hidden_states: join(&|carry| &carry.encoder_hidden_states)?,
        })
    }

    /// The carry on `device`. A carry that is already there is not copied.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn to_device(&self, device: Device) -> Result<Carry> {
        Ok(Carry {
            hidden_states: self.hidden_states.f_to_device(device)?,
            tokens: self.tokens.as_ref().map(|tokens| tokens.f_to_device(device)).transpose()?,
            down_block_res_samples: self
                .down_block_res_samples
                .iter()
                .map(|residual| Ok(residual.f_to_device(device)?))
                .collect::<Result<_>>()?,
            temb: self.temb.f_to_device(device)?,
            encoder_hidden_states: self.encoder_hidden_states.f_to_device(device)?,
        })
    }

    /// Takes the newest residual and appends its channels to `hidden_states`.
    pub(super) fn pop_residual(&mut self) -> Result<()> {
        let residual = self
            .down_block_res_samples
            .pop()
            .ok_or_else(|| Error::internal("an up stage was given a carry without residuals: the stages ran out of order"))?;
        let residual = residual.f_to_kind(self.hidden_states.f_kind()?)?;
        self.hidden_states = Tensor::f_cat(&[&self.hidden_states, &residual], 1)?;
        Ok(())
    }

    /// Puts a copy of `hidden_states` on the stack (no data is copied).
    pub(super) fn push_residual(&mut self) {
        self.down_block_res_samples.push(self.hidden_states.shallow_clone());
    }
}

/// The sizes of the image features in a [`Carry`], for planning without running anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CarryShape {
    /// `hidden_states` but for its batch: [c, h, w].
    pub hidden_states: [i64; 3],
    /// Each of `down_block_res_samples` but for its batch: [c, h, w].
    pub down_block_res_samples: Vec<[i64; 3]>,
}

impl CarryShape {
    /// The number of elements, for each item of the batch.
    #[must_use]
    pub fn numel(&self) -> i64 {
        let residuals = self.down_block_res_samples.iter();
        residuals.chain([&self.hidden_states]).map(|size| size.iter().product::<i64>()).sum()
    }

    /// Height and width of `hidden_states`.
    #[must_use]
    pub fn grid(&self) -> [i64; 2] {
        let [_, height, width] = self.hidden_states;
        [height, width]
    }
}
