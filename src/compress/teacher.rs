//! The dense network that runs beside the compressed one, where layers are fitted to its outputs.

use sdxl_model::unet::{Part, Scope};
use squeeze_base::error::Result;

use super::carries::Carries;
use super::dense_outputs::DenseOutputs;
use super::forward::{dense_outputs, forward};
use super::overflows::Overflows;

/// The dense network on one device, with its own carries of the device's samples.
pub(super) struct Teacher {
    pub carries: Carries,
    pub part: Option<Part>,
    /// The units whose activations were beyond fp16.
    pub overflows: Overflows,
    /// Whether its carries have already passed the block that the compressed network is in.
    is_ahead: bool,
}

impl Teacher {
    pub(super) fn new(carries: Carries) -> Self {
        Teacher { carries, part: None, overflows: Overflows::default(), is_ahead: false }
    }

    fn part(&self) -> &Part {
        self.part.as_ref().expect("the teacher is loaded together with its shard")
    }

    /// The dense outputs of `layers` for the carry `index`, and multiply-adds. The carry passes
    /// `scope` if it `advances`; otherwise the forward ends with the last output.
    pub(super) fn outputs(
        &mut self,
        index: usize,
        scope: Scope,
        layers: &[String],
        advances: Advances,
    ) -> Result<(DenseOutputs, f64)> {
        let carry = self.carries.get(index)?;
        let advances = advances == Advances::Yes;
        let (outputs, after, multiply_adds) = dense_outputs(self.part(), scope, carry, layers, advances, &self.overflows)?;
        if let Some(after) = after {
            self.carries.replace(index, after)?;
        }
        Ok((outputs, multiply_adds))
    }

    /// Records that a pass has taken all carries past the block.
    pub(super) fn set_ahead(&mut self, advances: Advances) {
        self.is_ahead = match advances {
            Advances::Yes => true,
            Advances::No => false,
        };
    }

    /// Whether the carries still have to pass the block. The next block begins anew.
    pub(super) fn lags(&mut self) -> bool {
        !std::mem::take(&mut self.is_ahead)
    }

    /// Sends the carry `index` through `scope`; returns multiply-adds.
    pub(super) fn advance(&mut self, index: usize, scope: Scope) -> Result<f64> {
        let (after, multiply_adds) = forward(self.part(), scope, self.carries.get(index)?, &self.overflows)?;
        self.carries.replace(index, after)?;
        Ok(multiply_adds)
    }
}

/// Whether the carries of the dense network pass the block while Hessians are gathered. They do in
/// the last pass of a block, which saves a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advances {
    Yes,
    No,
}
