//! A UNet's weights in a container or in a checkpoint, read one tensor at a time.

use std::path::Path;

use half::f16;
use safetensors::Dtype;
use sdxl_model::checkpoint::{ConfigFile, TensorSource, TensorSpec, Weights, check_tensors};
use sdxl_model::unet::{UnetChain, UnetConfig};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_container::{Container, Network};
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::folder::PipelineFolder;
use super::stored::{StoredTensor, placed};

/// The source of a UNet's weights: everything that an exporter reads.
#[derive(Debug, Clone, Copy)]
pub enum UnetWeights<'a> {
    /// A container, whose compressed weights stay compressed, bit for bit.
    Container(&'a Container),
    /// A model's dense weights, in fp16.
    Dense {
        /// The weights.
        weights: &'a Weights,
        /// The UNet's `config.json`.
        config: &'a Map<String, Value>,
        /// What the UNet predicts, if its sampler is known.
        prediction_type: Option<&'a str>,
    },
}

impl<'a> From<&'a Container> for UnetWeights<'a> {
    fn from(container: &'a Container) -> Self {
        UnetWeights::Container(container)
    }
}

impl<'a> UnetWeights<'a> {
    /// The container's file, or the checkpoint's folder.
    #[must_use]
    pub fn path(&self) -> &'a Path {
        match self {
            UnetWeights::Container(container) => container.path(),
            UnetWeights::Dense { weights, .. } => weights.folder(),
        }
    }

    /// The UNet's `config.json`.
    #[must_use]
    pub fn config(&self) -> &'a Map<String, Value> {
        match self {
            UnetWeights::Container(container) => &container.info().config,
            UnetWeights::Dense { config, .. } => config,
        }
    }

    /// What the UNet predicts (`epsilon`, `v_prediction`, `sample`), if it is known.
    #[must_use]
    pub fn prediction_type(&self) -> Option<&'a str> {
        match self {
            UnetWeights::Container(container) => container.info().prediction_type.as_deref(),
            UnetWeights::Dense { prediction_type, .. } => *prediction_type,
        }
    }

    /// The files that the weights were compressed from; none for dense weights.
    #[must_use]
    pub fn sources(&self) -> &'a [SourceFile] {
        match self {
            UnetWeights::Container(container) => &container.info().sources,
            UnetWeights::Dense { .. } => &[],
        }
    }

    /// The UNet's chain of stages, after a check that exactly its tensors are there.
    ///
    /// # Errors
    /// [`Error::BadFile`] for a container of another network; [`Error::ConfigKey`] if the
    /// architecture is not implemented; [`Error::Tensors`] naming the tensors that are missing,
    /// misshapen or surplus.
    pub fn chain(&self) -> Result<UnetChain> {
        if let UnetWeights::Container(container) = self
            && container.info().network != Network::Unet
        {
            let held = container.info().network;
            return Err(Error::bad_file(self.path(), format!("holds a {held}, where a UNet is needed")));
        }
        let config = ConfigFile::from_entries(self.path(), self.config().clone());
        let chain = UnetChain::new(UnetConfig::parse(config)?);
        self.check(&chain.tensors()?)?;
        Ok(chain)
    }

    /// As [`chain`](Self::chain), after a check that the architecture is that of a pipeline.
    ///
    /// # Errors
    /// As [`chain`](Self::chain); [`Error::BadFile`] if the architecture is another.
    pub fn chain_of(&self, pipeline: &PipelineFolder) -> Result<UnetChain> {
        let chain = self.chain()?;
        if chain.config() == pipeline.unet.config() {
            return Ok(chain);
        }
        let problem = format!("holds another architecture than {}", pipeline.root().display());
        Err(Error::bad_file(self.path(), problem))
    }

    /// Compares names and shapes of the tensors with those of an architecture.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming the tensors that are missing, misshapen or surplus.
    pub fn check(&self, expected: &[TensorSpec]) -> Result<()> {
        match self {
            UnetWeights::Container(container) => {
                let tensors = container.shapes().map(|(name, shape)| (name, (shape, Dtype::F16)));
                check_tensors(container.path(), expected, tensors.collect(), |_| false)
            }
            UnetWeights::Dense { weights, .. } => weights.check(expected, |_| false),
        }
    }

    /// Whether the tensor `name` is stored pruned or palettized.
    #[must_use]
    pub fn is_compressed(&self, name: &str) -> bool {
        match self {
            UnetWeights::Container(container) => container.has_weight(name),
            UnetWeights::Dense { .. } => false,
        }
    }

    /// The bytes of the tensor `name` of `shape` as it is stored; in fp16 if it is not compressed.
    ///
    /// # Errors
    /// [`Error::BadFile`] if a compressed weight is missing.
    pub fn stored_bytes(&self, name: &str, shape: &[i64]) -> Result<u64> {
        match self {
            UnetWeights::Container(container) if container.has_weight(name) => Ok(container.stored(name)?.bytes),
            UnetWeights::Container(_) | UnetWeights::Dense { .. } => Ok(2 * shape.iter().product::<i64>() as u64),
        }
    }

    /// Reads the tensor `name` of `shape` as it is stored, or in fp16 from dense weights.
    ///
    /// # Errors
    /// [`Error::BadFile`] or [`Error::Tensors`] if it is missing, damaged or of another shape, or
    /// has a value that fp16 does not hold; [`Error::Read`]; [`Error::Changed`].
    pub fn read(&self, name: &str, shape: &[i64]) -> Result<StoredTensor> {
        match self {
            UnetWeights::Container(container) => StoredTensor::of_container(container, name, shape),
            UnetWeights::Dense { weights, .. } => Ok(StoredTensor::Dense(weights.halves(name, shape)?)),
        }
    }

    /// Reads the tensor `name` of `shape`, decoded, in row-major order.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn decode(&self, name: &str, shape: &[i64]) -> Result<Vec<f16>> {
        match self.read(name, shape)? {
            StoredTensor::Dense(values) => Ok(values),
            StoredTensor::Compressed(weight) => {
                weight.decode().map_err(|why| Error::bad_file(self.path(), format!("`{name}`: {why}")))
            }
        }
    }

    /// A source of decoded weights, each with the device and dtype of `placement`. A UNet built
    /// from it computes with exactly the stored values.
    #[must_use]
    pub fn source(&self, placement: Placement) -> UnetSource<'a> {
        UnetSource { weights: *self, placement }
    }
}

/// [`UnetWeights`] as a [`TensorSource`].
#[derive(Debug, Clone, Copy)]
pub struct UnetSource<'a> {
    weights: UnetWeights<'a>,
    placement: Placement,
}

impl TensorSource for UnetSource<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let UnetSource { weights, placement } = *self;
        if let UnetWeights::Dense { weights, .. } = weights {
            // Straight from the stored dtype, which may be wider than fp16.
            return weights.source(placement).tensor(name, shape);
        }
        let values = weights.decode(name, shape)?;
        placed(&values, shape, placement)
    }
}
