//! Tensors that are read before a network is made of them: for a GPU on all threads.

use std::collections::HashMap;

use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use tch::{Device, Tensor};

use super::source::{Blueprint, TensorSource, TensorSpec};

/// Tensors of a source, all in memory, each in the source's dtype and on its device. Networks that
/// are made of it share their tensors.
#[derive(Debug)]
pub struct Prefetched(HashMap<String, Tensor>);

impl Prefetched {
    /// Reads the tensors of `specs`: several at a time if they go to another device than the CPU.
    ///
    /// On a CPU, libtorch's operations stay on the thread that calls this: each thread that calls
    /// them has OpenMP threads of its own, and where OpenMP has more threads than the machine, all
    /// of them sleep between operations, which makes every forward twice as slow.
    ///
    /// # Errors
    /// As the source, for the first of the tensors that cannot be read.
    pub fn new(source: &(dyn TensorSource + Sync), specs: &[TensorSpec]) -> Result<Self> {
        let read = |spec: &TensorSpec| Ok((spec.name.clone(), source.tensor(&spec.name, &spec.shape)?));
        let Some((first, rest)) = specs.split_first() else { return Ok(Prefetched(HashMap::new())) };
        let first = read(first)?;
        let rest: Vec<Result<(String, Tensor)>> = match first.1.device() {
            Device::Cpu => rest.iter().map(read).collect(),
            _ => rest.par_iter().map(read).collect(),
        };
        Ok(Prefetched([Ok(first)].into_iter().chain(rest).collect::<Result<_>>()?))
    }

    /// The tensors that `build` asks for.
    ///
    /// # Errors
    /// As [`new`](Self::new) and `build`.
    pub fn for_network<T>(source: &(dyn TensorSource + Sync), build: impl Fn(&dyn TensorSource) -> Result<T>) -> Result<Self> {
        let blueprint = Blueprint::default();
        build(&blueprint)?;
        Self::new(source, &blueprint.into_tensors())
    }
}

impl TensorSource for Prefetched {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let tensor = self.0.get(name).filter(|tensor| tensor.size() == shape);
        let tensor = tensor.ok_or_else(|| Error::internal(format!("`{name}` {shape:?} was not read in advance")))?;
        Ok(tensor.shallow_clone())
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// The thread of the test, which has the test's name.
    const TEST: Option<&str> = Some("checkpoint::prefetched::tests::tensors_are_shared_and_the_first_error_is_told");

    /// Zeros of any shape, but not of every name.
    struct Zeros;

    impl TensorSource for Zeros {
        fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
            assert_eq!(std::thread::current().name(), TEST, "tensors of a CPU are read on the thread that asks");
            match name {
                "absent" | "lost" => Err(Error::Argument(format!("`{name}` is absent"))),
                _ => Ok(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?),
            }
        }
    }

    #[test]
    fn tensors_are_shared_and_the_first_error_is_told() {
        let spec = |name: &str| TensorSpec { name: name.into(), shape: vec![2, 3] };
        let read = Prefetched::new(&Zeros, &[spec("a"), spec("b")]).unwrap();
        let (one, other) = (read.tensor("a", &[2, 3]).unwrap(), read.tensor("a", &[2, 3]).unwrap());
        assert_eq!(one.data_ptr(), other.data_ptr());
        assert!(read.tensor("a", &[3, 2]).is_err() && read.tensor("c", &[2, 3]).is_err());
        let specs = [spec("a"), spec("lost"), spec("b"), spec("absent")];
        assert_eq!(Prefetched::new(&Zeros, &specs).unwrap_err().to_string(), "`lost` is absent");
    }
}
