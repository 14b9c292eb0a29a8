//! The weights of a text encoder or a VAE: a model's own, or those of a container.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use sdxl_model::checkpoint::{TensorSource, TensorSpec, Weights, check_tensors};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_container::{Container, Network};
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::stored::{StoredTensor, placed};

/// The tensors of a network, as they are stored.
pub trait StoredNetwork {
    /// The container's file, or the checkpoint's folder or file.
    fn path(&self) -> &Path;

    /// Compares names and shapes with those of an architecture. Tensors that are `unused` may be
    /// there or not.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming the tensors that are missing, misshapen or surplus.
    fn check_against(&self, expected: &[TensorSpec], unused: &dyn Fn(&str) -> bool) -> Result<()>;

    /// Reads the tensor `name` of `shape` as it is stored, or in fp16 from dense weights.
    ///
    /// # Errors
    /// [`Error::BadFile`] or [`Error::Tensors`] if it is missing, damaged or of another shape, or
    /// has a value that fp16 does not hold; [`Error::Read`]; [`Error::Changed`].
    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor>;
}

impl StoredNetwork for Weights {
    fn path(&self) -> &Path {
        self.folder()
    }

    fn check_against(&self, expected: &[TensorSpec], unused: &dyn Fn(&str) -> bool) -> Result<()> {
        self.check(expected, unused)
    }

    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor> {
        Ok(StoredTensor::Dense(self.halves(name, shape)?))
    }
}

impl StoredNetwork for Container {
    fn path(&self) -> &Path {
        Container::path(self)
    }

    fn check_against(&self, expected: &[TensorSpec], unused: &dyn Fn(&str) -> bool) -> Result<()> {
        let tensors = self.shapes().map(|(name, shape)| (name, (shape, Dtype::F16)));
        check_tensors(Container::path(self), expected, tensors.collect(), unused)
    }

    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor> {
        StoredTensor::of_container(self, name, shape)
    }
}

/// The weights of a text encoder or a VAE, checked against the architecture.
#[derive(Debug)]
pub enum NetworkWeights {
    /// The model's own.
    Dense(Weights),
    /// Those of a container, whose compressed weights stay compressed, bit for bit.
    Container(Arc<Container>),
}

impl NetworkWeights {
    /// The tensors as they are stored.
    #[must_use]
    pub fn stored(&self) -> &dyn StoredNetwork {
        match self {
            NetworkWeights::Dense(weights) => weights,
            NetworkWeights::Container(container) => container.as_ref(),
        }
    }

    /// The container; `None` for a model's own weights.
    #[must_use]
    pub fn container(&self) -> Option<&Container> {
        match self {
            NetworkWeights::Dense(_) => None,
            NetworkWeights::Container(container) => Some(container),
        }
    }

    /// A source of decoded weights, each with the device and dtype of `placement`.
    #[must_use]
    pub fn source(&self, placement: Placement) -> Box<dyn TensorSource + Sync + '_> {
        match self {
            NetworkWeights::Dense(weights) => Box::new(weights.source(placement)),
            NetworkWeights::Container(container) => Box::new(ContainerSource { container, placement }),
        }
    }

    /// Names and shapes of the tensors.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        match self {
            NetworkWeights::Dense(weights) => weights.tensors().collect(),
            NetworkWeights::Container(container) => {
                let spec = |(name, shape): (&str, &[i64])| TensorSpec { name: name.to_owned(), shape: shape.to_vec() };
                container.shapes().map(spec).collect()
            }
        }
    }

    /// The shape of the tensor `name`, if there is one.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        match self {
            NetworkWeights::Dense(weights) => weights.shape(name),
            NetworkWeights::Container(container) => container.shape(name),
        }
    }

    /// The dtype of the tensor `name`, decoded; `None` if there is none.
    #[must_use]
    pub fn dtype_of(&self, name: &str) -> Option<Dtype> {
        match self {
            NetworkWeights::Dense(weights) => weights.dtype_of(name),
            NetworkWeights::Container(container) => container.shape(name).map(|_| Dtype::F16),
        }
    }

    /// Reads all values for a NaN or an infinity. Those of a container were checked when it was
    /// opened.
    ///
    /// # Errors
    /// As [`Weights::check_finite`].
    pub fn check_finite(&self) -> Result<()> {
        match self {
            NetworkWeights::Dense(weights) => weights.check_finite(),
            NetworkWeights::Container(_) => Ok(()),
        }
    }

    /// The files, each with its hash, under the name that `name_of` gives.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn source_files(&self, name_of: impl Fn(&Path) -> String) -> Result<Vec<SourceFile>> {
        let read = |path: &Path| SourceFile::read(path, name_of(path));
        match self {
            NetworkWeights::Dense(weights) => weights.files().map(read).collect(),
            NetworkWeights::Container(container) => Ok(vec![read(container.path())?]),
        }
    }
}

/// A container as a source of decoded weights.
struct ContainerSource<'a> {
    container: &'a Container,
    placement: Placement,
}

impl TensorSource for ContainerSource<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let values = match StoredTensor::of_container(self.container, name, shape)? {
            StoredTensor::Dense(values) => values,
            StoredTensor::Compressed(weight) => {
                weight.decode().map_err(|why| Error::bad_file(self.container.path(), format!("`{name}`: {why}")))?
            }
        };
        placed(&values, shape, self.placement)
    }
}

/// Opens the container `path` of `network`, whose hashes are checked.
///
/// # Errors
/// As [`Container::open`]; [`Error::BadFile`] if it holds another network.
pub(crate) fn open_container(path: &Path, network: Network) -> Result<Arc<Container>> {
    let container = Container::open(path)?;
    let held = container.info().network;
    if held != network {
        return Err(Error::bad_file(path, format!("holds a {held}, where a {network} is needed")));
    }
    Ok(Arc::new(container))
}
