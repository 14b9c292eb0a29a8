//! The result of a run: finished weights, and everything else of the network in fp16.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use sdxl_model::checkpoint::{TensorSource, TensorSpec, Weights, halves};
use serde_json::json;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_codebook::Codebook;
use squeeze_container::{CompressedWeight, ContainerInfo, ContainerWriter, StoredLayer, Values, Written};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

use super::report::LayerReport;
use super::workspace::Workspace;
use crate::tune::Trained;

/// A network whose compressed layers are finished.
pub(super) struct Finished<'a> {
    /// The facts about the container.
    pub info: ContainerInfo,
    /// Every tensor of the network, in execution order.
    pub tensors: Vec<TensorSpec>,
    /// Its dense weights.
    pub weights: &'a Weights,
    /// Its compressed layers.
    pub layers: &'a Workspace,
    /// The trained values that take the place of palettes, norms and biases, if it is tuned.
    pub tuned: Option<&'a Trained>,
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

    fn add_tuned(&mut self, weight: &CompressedWeight) {
        self.elements += weight.numel() as u64;
        self.kept += weight.kept() as u64;
        self.bytes += weight.stored_bytes();
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
pub(super) fn write_container(path: &Path, network: Finished<'_>, progress: &dyn Progress) -> Result<(Written, Sums)> {
    let Finished { info, tensors, weights, layers, tuned } = network;
    let mut writer = ContainerWriter::create(path, info)?;
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let reports: BTreeMap<&str, &LayerReport> = layers.reports().map(|(report, _)| (report.name.as_str(), report)).collect();
    let task = Task::begin(progress, "writing the container", "tensors", tensors.len());
    let mut sums = Sums::default();
    for spec in tensors {
        task.advance(&spec.name);
        let report = spec.name.strip_suffix(".weight").and_then(|layer| reports.get(layer));
        let trained = tuned.and_then(|tuned| tuned.values.get(&spec.name));
        if let (Some(report), Some(palettes)) = (report, trained)
            && let Some(weight) = layers.weight(&report.name)?
        {
            let weight = with_palettes(weight, palettes)?;
            writer.add_weight(&spec.name, &weight, json!(report.errors))?;
            sums.add_tuned(&weight);
            continue;
        }
        let stored = match report {
            Some(report) => layers.copy(&report.name, &mut writer, json!(report.errors))?,
            None => None,
        };
        match stored {
            Some(stored) => sums.add(&stored),
            None if let Some(values) = trained => writer.add_tensor(&spec.name, &spec.shape, values)?,
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

/// A palettized weight with other palettes.
fn with_palettes(weight: CompressedWeight, palettes: &[f16]) -> Result<CompressedWeight> {
    let CompressedWeight { shape, mask, values } = weight;
    match values {
        Values::Palettized { codebook, indices } => {
            let codebook = Codebook { palettes: palettes.to_vec(), ..codebook };
            CompressedWeight::new(shape, mask, Values::Palettized { codebook, indices })
        }
        Values::Plain(_) => Err(Error::internal("palettes were trained for a weight that has none")),
    }
}
