//! The result of a run: finished weights, and everything else of the UNet in fp16.

use std::collections::BTreeMap;
use std::path::Path;

use sdxl_model::checkpoint::{TensorSource, Weights, halves};
use sdxl_model::unet::UnetChain;
use serde_json::{Map, Value, json};
use squeeze_base::error::Result;
use squeeze_base::input::SourceFile;
use squeeze_base::progress::{Progress, Task};
use squeeze_container::{ContainerInfo, ContainerWriter, StoredLayer, Written};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

use super::report::LayerReport;
use super::workspace::Workspace;

/// A UNet whose compressed layers are finished.
pub(super) struct FinishedUnet<'a> {
    pub chain: &'a UnetChain,
    /// Its config.json.
    pub unet_config: &'a Map<String, Value>,
    /// Its dense weights.
    pub weights: &'a Weights,
    /// Its compressed layers.
    pub layers: &'a Workspace,
    /// The config of the run.
    pub settings: Value,
    /// The files that the dense weights come from.
    pub sources: Vec<SourceFile>,
}

/// Sums over the compressed weights of a container.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub elements: u64,
    pub kept: u64,
    pub bytes: u64,
}

impl Sums {
    fn add(&mut self, weight: &StoredLayer) {
        self.elements += weight.shape.iter().map(|n| n.unsigned_abs()).product::<u64>();
        self.kept += weight.kept;
        self.bytes += weight.bytes;
    }

    /// The pruned share of all compressed weights.
    pub(super) fn sparsity(&self) -> f64 {
        1.0 - self.kept as f64 / self.elements.max(1) as f64
    }

    /// Stored bits per weight.
    pub(super) fn bits_per_weight(&self) -> f64 {
        8.0 * (self.bytes as f64 / self.elements.max(1) as f64)
    }
}

/// Writes the container `path`.
pub(super) fn write_container(path: &Path, unet: FinishedUnet<'_>, progress: &dyn Progress) -> Result<(Written, Sums)> {
    let FinishedUnet { chain, unet_config, weights, layers, settings, sources } = unet;
    let info = ContainerInfo { unet_config: unet_config.clone(), recipe: settings, sources };
    let mut writer = ContainerWriter::create(path, info)?;
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let reports: BTreeMap<&str, &LayerReport> = layers.reports().map(|(report, _)| (report.name.as_str(), report)).collect();
    let tensors = chain.tensors()?;
    let task = Task::begin(progress, "writing the container", "tensors", tensors.len());
    let mut sums = Sums::default();
    for spec in tensors {
        task.advance(&spec.name);
        let report = spec.name.strip_suffix(".weight").and_then(|layer| reports.get(layer));
        let stored = match report {
            Some(report) => layers.copy(&report.name, &mut writer, json!(report.errors))?,
            None => None,
        };
        match stored {
            Some(stored) => sums.add(&stored),
            None => {
                let tensor = source.tensor(&spec.name, &spec.shape)?;
                writer.add_tensor(&spec.name, &spec.shape, &halves(&tensor)?)?;
            }
        }
    }
    // The container names its sources, so none of it may be of another model.
    weights.check_unchanged()?;
    Ok((writer.finish()?, sums))
}
