//! A device's share of the samples.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;
use sdxl_model::Layer;
use sdxl_model::checkpoint::{Prefetched, TensorSource};
use sdxl_model::unet::{Carry, Part, PartName, Scope};
use squeeze_base::allocator;
use squeeze_base::error::Result;
use tch::{Device, Tensor};

use super::carries::Carries;
use super::job::Model;
use super::overflows::Overflows;
use super::teacher::Teacher;
use super::workspace::Workspace;
use crate::plan::CarriesIn;

/// A device with the part of the network that is loaded on it, and the carries of its samples.
pub(super) struct DeviceShard {
    pub device: Device,
    pub carries: Carries,
    /// The weight of each carry's samples.
    pub weights: Vec<f64>,
    pub teacher: Option<Teacher>,
    /// How many vectors of a held-out batch are kept.
    pub held_out_vectors: i64,
    /// The units whose activations were beyond fp16.
    pub overflows: Overflows,
    part: Option<Part>,
    /// The layers of the part that have their stored weights.
    installed: BTreeSet<String>,
}

/// Where the carries of a run wait between the parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct CarryStore<'a> {
    pub carries: CarriesIn,
    /// The folder for carries in files.
    pub folder: &'a Path,
    /// Whether the dense network has carries of its own.
    pub has_teacher: bool,
}

impl DeviceShard {
    /// The shard `number` on `device`, without carries, of whose held-out batches so many vectors
    /// are kept.
    pub(super) fn new(number: usize, device: Device, store: CarryStore<'_>, held_out_vectors: i64) -> Result<Self> {
        let carries = |name: String| match store.carries {
            CarriesIn::Files => Carries::in_files(&store.folder.join(format!("carries-{name}")), device),
            CarriesIn::Host => Ok(Carries::on_host(device)),
            CarriesIn::Memory | CarriesIn::Nowhere => Ok(Carries::in_memory()),
        };
        let teacher = match store.has_teacher {
            true => Some(Teacher::new(carries(format!("{number}-dense"))?)),
            false => None,
        };
        let carries = carries(number.to_string())?;
        Ok(DeviceShard {
            device,
            carries,
            weights: Vec::new(),
            teacher,
            held_out_vectors,
            overflows: Overflows::default(),
            part: None,
            installed: BTreeSet::new(),
        })
    }

    /// Sentences about the units whose activations were beyond fp16.
    pub(super) fn overflow_notes(&self) -> BTreeSet<String> {
        let of_dense = self.teacher.iter().flat_map(|teacher| teacher.overflows.notes());
        of_dense.map(|note| format!("dense network: {note}")).chain(self.overflows.notes()).collect()
    }

    /// Adds the first carry of a batch of samples, and that of the dense network.
    pub(super) fn push(&mut self, carry: Carry, dense: Option<Carry>, weight: f64) -> Result<()> {
        if let (Some(teacher), Some(carry)) = (&mut self.teacher, dense) {
            teacher.carries.push(carry)?;
        }
        self.carries.push(carry)?;
        self.weights.push(weight);
        Ok(())
    }

    /// Says which portion of a part the carries are sent through next: a block takes one residual
    /// at most.
    pub(super) fn expect(&mut self, scope: Scope) {
        let last = match scope {
            Scope::Whole => None,
            Scope::Block(_) => Some(1),
        };
        self.carries.need_residuals(last);
        if let Some(teacher) = &mut self.teacher {
            teacher.carries.need_residuals(last);
        }
    }

    /// Drops the loaded part.
    pub(super) fn unload(&mut self) {
        self.part = None;
        self.installed.clear();
        if let Some(teacher) = &mut self.teacher {
            teacher.part = None;
        }
        allocator::give_back();
    }

    /// Loads a part with its dense weights in the place of the part before.
    pub(super) fn load(&mut self, model: Model<'_>, name: PartName) -> Result<()> {
        // The old part is dropped first: there may not be memory for both.
        self.unload();
        // The dense network and the compressed one share tensors until layers get their stored
        // ones.
        let source = OnDevice { source: model.source, device: self.device };
        let source = Prefetched::for_network(&source, |source| model.chain.load_part(name, source))?;
        self.part = Some(model.chain.load_part(name, &source)?);
        if let Some(teacher) = &mut self.teacher {
            teacher.part = Some(model.chain.load_part(name, &source)?);
        }
        Ok(())
    }

    /// The loaded part.
    pub(super) fn part(&self) -> &Part {
        self.part.as_ref().expect("samples are sent through a part after it was loaded")
    }

    /// Gives `layers` their stored weights, as far as `store` has them.
    pub(super) fn install(&mut self, layers: &BTreeSet<String>, store: &Workspace) -> Result<()> {
        let part = self.part.as_mut().expect("weights are installed after the part was loaded");
        let installed = &mut self.installed;
        install(part.layers_mut(), store, &mut |name| layers.contains(name) && installed.insert(name.to_owned()))
    }

    /// The dense weight of a layer, if it is loaded.
    pub(super) fn dense_weight(&self, layer: &str) -> Option<Tensor> {
        let layers = self.part.as_ref().filter(|_| !self.installed.contains(layer))?.layers();
        layers.iter().find(|own| own.name() == layer).map(|own| own.weight().shallow_clone())
    }
}

/// Gives the `chosen` ones of `layers` their stored weights, as far as `store` has them. Layers
/// that stay dense keep their weight.
pub(super) fn install(layers: &mut [Layer], store: &Workspace, chosen: &mut dyn FnMut(&str) -> bool) -> Result<()> {
    let mut layers: Vec<&mut Layer> = layers.iter_mut().filter(|layer| store.has(layer.name()) && chosen(layer.name())).collect();
    // As many at once as there are threads: the dense weights that they replace are still there. On
    // a CPU libtorch's operations stay on one thread, as in `Prefetched`.
    for layers in layers.chunks_mut(rayon::current_num_threads()) {
        let names: Vec<(&str, Device)> = layers.iter().map(|layer| (layer.name(), layer.weight().device())).collect();
        let one = |(name, device): &(&str, Device)| decoded(store, name, *device);
        let decoded: Vec<_> = match names[0].1 {
            Device::Cpu => names.iter().map(one).collect(),
            _ => names.par_iter().map(one).collect(),
        };
        for (layer, decoded) in layers.iter_mut().zip(decoded) {
            if let Some(decoded) = decoded? {
                layer.replace_weight(&decoded)?;
            }
        }
    }
    Ok(())
}

/// A stored weight in fp16; `None` if the layer stays dense.
fn decoded(store: &Workspace, layer: &str, device: Device) -> Result<Option<Tensor>> {
    let Some(stored) = store.weight(layer)? else { return Ok(None) };
    let decoded = Tensor::f_from_slice(&stored.decode()?)?.f_view(stored.shape.as_slice())?;
    Ok(Some(decoded.f_to_device(device)?))
}

/// A source whose tensors are moved to a device.
pub(super) struct OnDevice<'a> {
    pub source: &'a (dyn TensorSource + Sync),
    pub device: Device,
}

impl TensorSource for OnDevice<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.source.tensor(name, shape)?.f_to_device(self.device)?)
    }
}
