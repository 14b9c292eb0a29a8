//! The kernel of conjugate gradients.

use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use super::{Kernels, Number, numbers, plain};

/// The threads that work on one row; `WORKERS` in the source.
const WORKERS: u32 = 256;

/// The state of a descent, which a step updates: matrices [o, d] in fp32, numbers of rows `[o]` in
/// fp64, all contiguous.
#[derive(Debug)]
pub(crate) struct Descent<'a> {
    /// W.
    pub weight: &'a Tensor,
    /// G = (W - W0) H.
    pub gradient: &'a Tensor,
    /// The direction of the next step.
    pub direction: &'a Tensor,
    /// The dot product of the gradient with the conditioned gradient.
    pub before: &'a Tensor,
    /// By how much the last step has lowered the objective.
    pub lower: &'a Tensor,
}

impl Kernels {
    /// A step along the direction, whose product with H is `product` [o, d]. `mask` [o, d] is 1
    /// where a weight is kept, else 0; `conditioner` `[d]` the reciprocal of H's diagonal.
    ///
    /// # Errors
    /// [`Error::Internal`] for a tensor of another size or dtype.
    pub(crate) fn descend(&self, state: &Descent<'_>, product: &Tensor, mask: &Tensor, conditioner: &Tensor) -> Result<()> {
        let Descent { weight, gradient, direction, before, lower } = *state;
        let (rows, width) = weight.size2()?;
        for matrix in [weight, gradient, direction, product, mask] {
            plain(matrix, [rows, width], Kind::Float)?;
        }
        plain(conditioner, [width, 1], Kind::Float)?;
        plain(before, [rows, 1], Kind::Double)?;
        plain(lower, [rows, 1], Kind::Double)?;
        let pointers = [weight, gradient, direction, product, mask, conditioner, before, lower];
        let pointers = pointers.map(|tensor| tensor.data_ptr() as u64);
        let blocks = u32::try_from(rows).map_err(|_| Error::internal("more rows than a launch takes"))?;
        let numbers = numbers([rows, width])?.into_iter().map(Number::Int).collect::<Vec<_>>();
        self.start(&self.descend, &pointers, &numbers, [blocks, 1], WORKERS)
    }
}
