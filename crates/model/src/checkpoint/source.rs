//! Sources of a network's tensors while it is built.

use std::cell::RefCell;

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// A source of tensors by their checkpoint names. The construction of a network asks its source for
/// each tensor once, in execution order.
pub trait TensorSource {
    /// The tensor `name` of `shape`, on the device and in the dtype that the source is set to.
    ///
    /// # Errors
    /// If the source does not have it, or has it in another shape.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor>;
}

impl<S: TensorSource + ?Sized> TensorSource for &S {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        (**self).tensor(name, shape)
    }
}

/// The name and shape of a tensor of an architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The checkpoint name.
    pub name: String,
    /// The shape.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// The number of elements.
    #[must_use]
    pub fn numel(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }
}

/// A source without weights. A network that is built from it has all names and shapes but takes no
/// memory for weights, and the source records each requested tensor.
///
/// The code that builds a network is thereby the only list of its tensors. The list serves to check
/// a checkpoint before its data is read, for `inspect`, and for `synth`.
#[derive(Debug, Default)]
pub struct Blueprint {
    asked: RefCell<Vec<TensorSpec>>,
}

impl Blueprint {
    /// The recorded tensors, in the order of the requests.
    pub fn into_tensors(self) -> Vec<TensorSpec> {
        self.asked.into_inner()
    }
}

impl TensorSource for Blueprint {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.asked.borrow_mut().push(TensorSpec { name: name.to_owned(), shape: shape.to_vec() });
        // One zero, expanded to the shape without memory.
        Ok(Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_expand(shape, false)?)
    }
}
