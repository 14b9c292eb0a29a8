//! Compresses one layer, where its weight is.

use squeeze_base::error::{Error, Result};
use tch::Tensor;

use super::device_layer::compress_on_device;
use super::layer::{CompressedLayer, Evidence, compress_on_host};
use crate::recipe::LayerRecipe;

/// Compresses the weight [o, ...] of the layer `name` by `recipe`. Pruning and the joint solver
/// need evidence, palettizing alone does not.
///
/// # Errors
/// [`Error::Layer`]: NaN in the weight, a group that does not divide its channels, a Hessian that
/// cannot be factored.
pub fn compress_layer(
    name: &str,
    weight: &Tensor,
    recipe: &LayerRecipe,
    evidence: Option<Evidence<'_>>,
) -> Result<CompressedLayer> {
    let compressed = match compress_on_device(name, weight, recipe, evidence) {
        Ok(None) => compress_on_host(name, weight, recipe, evidence),
        Ok(Some(compressed)) => Ok(compressed),
        Err(error) => Err(error),
    };
    compressed.map_err(Error::layer(name))
}
