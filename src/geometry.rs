//! The input geometry of a model's layer, in the solver's terms.

use sdxl_model::{ConvGeometry, Layer, Operation};
use squeeze_solver::{InputGeometry, Windows};

/// How `layer`'s input becomes the vectors that its Hessian sums.
pub(crate) fn input_geometry(layer: &Layer) -> InputGeometry {
    match layer.operation() {
        Operation::Linear => InputGeometry::Linear,
        Operation::Conv2d(ConvGeometry { stride, padding, dilation, groups }) => {
            InputGeometry::Windows(Windows { stride, padding, dilation, groups })
        }
    }
}
