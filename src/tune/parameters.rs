//! What is trained: palette entries, norms and biases, as fp32 masters of what is stored in fp16.

use std::cell::RefCell;
use std::collections::BTreeMap;

use half::f16;
use sdxl_model::checkpoint::{TensorSource, TensorSpec, halves};
use squeeze_base::error::{Error, Result};
use squeeze_container::CompressedWeight;
use squeeze_numerics::device::Placement;
use tch::{Kind, Tensor};

use super::table::Table;

/// One trained tensor.
#[derive(Debug)]
pub(super) struct Parameter {
    /// fp32 `[n]`: the values of all palettes of a weight, or a norm's or a layer's vector.
    pub value: Tensor,
    /// How a weight is made of its palettes; `None` for a vector.
    table: Option<Table>,
}

/// All trained tensors of a UNet, by their checkpoint names, and a source of the others.
pub(super) struct Parameters<'a> {
    pub by_name: BTreeMap<String, Parameter>,
    /// The tensors that are not trained, as they are stored.
    fixed: &'a dyn TensorSource,
    /// Where the network computes.
    placement: Placement,
}

impl<'a> Parameters<'a> {
    /// The trained tensors among `tensors`: the palettes of those for which `weight` has a
    /// palettized weight, and all vectors, which `fixed` has too.
    ///
    /// # Errors
    /// If a tensor cannot be read, or libtorch refuses, usually for want of memory.
    pub(super) fn new(
        tensors: Vec<TensorSpec>,
        weight: &dyn Fn(&str) -> Result<Option<CompressedWeight>>,
        fixed: &'a dyn TensorSource,
        placement: Placement,
    ) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for TensorSpec { name, shape } in tensors {
            let palettized = match weight(&name)? {
                Some(weight) => Table::of(&weight, placement.device)?,
                None => None,
            };
            let parameter = match palettized {
                Some((table, palettes)) => {
                    let value = Tensor::f_from_slice(&palettes)?.f_to_device(placement.device)?;
                    Parameter { value: value.f_to_kind(Kind::Float)?, table: Some(table) }
                }
                None if shape.len() == 1 => {
                    let value = fixed.tensor(&name, &shape)?.f_to_device(placement.device)?.f_to_kind(Kind::Half)?;
                    Parameter { value: value.f_to_kind(Kind::Float)?, table: None }
                }
                None => continue,
            };
            by_name.insert(name, parameter);
        }
        Ok(Parameters { by_name, fixed, placement })
    }

    /// Where the network computes.
    pub(super) fn placement(&self) -> Placement {
        self.placement
    }

    /// The values of each tensor as they are stored.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if one is beyond fp16; if libtorch refuses.
    pub(super) fn stored(&self) -> Result<BTreeMap<String, Vec<f16>>> {
        let stored = |(name, parameter): (&String, &Parameter)| {
            let values = halves(&parameter.value)?;
            match values.iter().all(|value| value.is_finite()) {
                true => Ok((name.clone(), values)),
                false => Err(Error::NotFinite(format!("`{name}` is beyond fp16 after tuning"))),
            }
        };
        self.by_name.iter().map(stored).collect()
    }

    /// A source of the whole network as it is stored. With `learns` the trained tensors are leaves
    /// of a graph.
    pub(super) fn source(&self, learns: bool) -> Leaves<'_> {
        Leaves { parameters: self, learns, leaves: RefCell::default() }
    }

    /// The gradient of the parameter `name` for that of its tensor in the network.
    pub(super) fn gradient(&self, name: &str, of_tensor: &Tensor) -> Result<Tensor> {
        match &self.by_name[name].table {
            Some(table) => table.gradient(of_tensor),
            None => Ok(of_tensor.f_to_kind(Kind::Float)?),
        }
    }
}

/// The network's tensors in the dtype of its forwards, and the leaves among them.
pub(super) struct Leaves<'a> {
    parameters: &'a Parameters<'a>,
    learns: bool,
    leaves: RefCell<Vec<(String, Tensor)>>,
}

impl Leaves<'_> {
    /// The leaves so far, in the order in which the network asked for them.
    pub(super) fn into_leaves(self) -> Vec<(String, Tensor)> {
        self.leaves.into_inner()
    }
}

impl TensorSource for Leaves<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let Placement { device, kind } = self.parameters.placement;
        let Some(parameter) = self.parameters.by_name.get(name) else {
            // As it is stored: in fp16.
            let fixed = self.parameters.fixed.tensor(name, shape)?.f_to_device(device)?;
            return Ok(fixed.f_to_kind(Kind::Half)?.f_to_kind(kind)?);
        };
        // The network computes with what is stored, and the gradient is that of the stored value
        // (a straight-through estimator, Bengio et al. 2013).
        let stored = parameter.value.f_detach()?.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?;
        let tensor = match &parameter.table {
            Some(table) => table.decode(&stored)?,
            None => stored,
        };
        let tensor = tensor.f_to_kind(kind)?;
        if tensor.size() != shape {
            return Err(Error::shape(format!("`{name}`"), tensor.size(), format!("{shape:?}")));
        }
        if !self.learns {
            return Ok(tensor);
        }
        let leaf = tensor.f_detach()?.f_set_requires_grad(true)?;
        self.leaves.borrow_mut().push((name.to_owned(), leaf.shallow_clone()));
        Ok(leaf)
    }
}
