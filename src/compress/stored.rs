//! The network of a workspace as a source of tensors.

use sdxl_model::checkpoint::TensorSource;
use squeeze_base::error::Result;
use squeeze_container::CompressedWeight;
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::workspace::Workspace;

/// The network as it is stored before it is tuned.
pub(super) struct Stored<'a> {
    pub workspace: &'a Workspace,
    /// The dense weights.
    pub source: &'a (dyn TensorSource + Sync),
}

impl Stored<'_> {
    /// The compressed weight `name`; `None` for a tensor that is not compressed.
    pub(super) fn weight(&self, name: &str) -> Result<Option<CompressedWeight>> {
        match name.strip_suffix(".weight") {
            Some(layer) if self.workspace.has(layer) => self.workspace.weight(layer),
            Some(_) | None => Ok(None),
        }
    }
}

impl TensorSource for Stored<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        match self.weight(name)? {
            Some(weight) => Ok(Tensor::f_from_slice(&weight.decode()?)?.f_view(shape)?),
            None => self.source.tensor(name, shape),
        }
    }
}

/// The stored network in the place and dtype in which it runs.
pub(super) struct Placed<'a, 'b> {
    pub stored: &'a Stored<'b>,
    pub placement: Placement,
}

impl TensorSource for Placed<'_, '_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.stored.tensor(name, shape)?.f_to_device(self.placement.device)?.f_to_kind(self.placement.kind)?)
    }
}
