//! Networks that run piece by piece, so that the inputs of a piece's layers can be observed behind
//! compressed pieces.

use std::ops::Range;

use squeeze_base::error::Result;
use tch::Tensor;

use super::layer::{Layer, Observer};

/// What a network hands from piece to piece.
#[derive(Debug)]
pub struct States {
    /// The hidden states: [b, s, c] of a text encoder, [b, c, h, w] of a VAE.
    pub hidden: Tensor,
    /// The token ids [b, s] of a text encoder.
    pub ids: Option<Tensor>,
}

impl States {
    /// The same tensors, which are not copied.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        States { hidden: self.hidden.shallow_clone(), ids: self.ids.as_ref().map(Tensor::shallow_clone) }
    }
}

/// A network as a chain of pieces, each of some layers.
pub trait Pieces {
    /// All layers, in execution order.
    fn layers(&self) -> &[Layer];

    /// All layers, whose weights can be replaced.
    fn layers_mut(&mut self) -> &mut [Layer];

    /// The pieces in execution order: their names, and which of the layers they have.
    fn pieces(&self) -> Vec<(String, Range<usize>)>;

    /// Runs the piece `index`, whose inputs are dropped as early as they can be.
    ///
    /// # Errors
    /// An error of `observer`; if libtorch refuses an operation.
    fn run_piece(&self, index: usize, states: States, observer: &mut dyn Observer) -> Result<Tensor>;
}
