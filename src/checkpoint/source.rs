//! Sources of a network's tensors while it is built.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// Gives tensors by their checkpoint name. Building a network from a source asks for each of its
/// tensors once, in execution order.
pub trait TensorSource {
    /// The tensor `name` of `shape`, placed and converted as the source is set to.
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

/// A tensor that an architecture has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its checkpoint name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// The number of elements.
    pub fn numel(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }
}

/// A source without weights. A network that is built from it has every shape and name and no
/// memory, and the source records each tensor that was asked for.
///
/// The code that builds a network is therefore also the one list of its tensors: for checking a
/// checkpoint before anything is read, for `inspect`, and for `synth`.
#[derive(Debug, Default)]
pub struct Blueprint {
    asked: RefCell<Vec<TensorSpec>>,
}

impl Blueprint {
    /// The recorded tensors, in the order in which they were asked for.
    pub fn into_tensors(self) -> Vec<TensorSpec> {
        self.asked.into_inner()
    }
}

impl TensorSource for Blueprint {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.asked.borrow_mut().push(TensorSpec { name: name.to_owned(), shape: shape.to_vec() });
        // One zero, repeated without memory.
        Ok(Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_expand(shape, false)?)
    }
}
