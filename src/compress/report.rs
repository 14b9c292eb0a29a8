//! The report of a run: its compressed layers, their sizes and errors.

use sdxl_model::Layer;
use sdxl_model::unet::PartName;
use serde::{Deserialize, Serialize};
use squeeze_base::progress::LayerDone;
use squeeze_container::CompressedWeight;

use super::layer::{CompressedLayer, LayerErrors};
use crate::config::RunConfig;
use crate::plan::Plan;
use crate::tune::Log;

/// A compressed layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerReport {
    /// The checkpoint name, without `.weight`.
    pub name: String,
    /// The stage, `head` for the input block, or `tail` for the output block; for other networks
    /// than the UNet the piece: `layers.0` or `decoder.mid_block`, for example.
    pub stage: String,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// The pruned share of the weight.
    pub sparsity: f64,
    /// Stored bits per weight, with palettes and scales.
    pub bits_per_weight: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// The number of vectors in its Hessian; absent if it needed none.
    pub vectors: Option<u64>,
    /// Its errors.
    pub errors: LayerErrors,
}

impl LayerReport {
    pub(super) fn of(layer: &Layer, part: PartName, compressed: &CompressedLayer, vectors: Option<u64>) -> Self {
        LayerReport::new(layer.name(), part.to_string(), layer.weight().size(), compressed, vectors)
    }

    /// The report on the layer `name` of `stage`, whose weight is of `shape`.
    pub(super) fn new(name: &str, stage: String, shape: Vec<i64>, compressed: &CompressedLayer, vectors: Option<u64>) -> Self {
        let stored = compressed.stored.as_ref();
        let elements: i64 = shape.iter().product();
        LayerReport {
            name: name.to_owned(),
            stage,
            sparsity: stored.map_or(0.0, CompressedWeight::sparsity),
            bits_per_weight: stored.map_or(16.0, CompressedWeight::bits_per_weight),
            bytes: stored.map_or(2 * elements.unsigned_abs(), CompressedWeight::stored_bytes),
            shape,
            vectors,
            errors: compressed.errors,
        }
    }

    /// The numbers for progress.
    pub(super) fn progress(&self) -> LayerDone<'_> {
        LayerDone {
            layer: &self.name,
            stage: &self.stage,
            sparsity: self.sparsity,
            bits_per_weight: self.bits_per_weight,
            bytes: self.bytes,
            weight_error: self.errors.weight,
            pruned_output_error: self.errors.pruned_output,
            output_error: self.errors.output,
        }
    }
}

/// The report of a run, written beside the container as JSON.
#[derive(Debug, Serialize)]
pub struct JobReport {
    /// Bytes of the container.
    pub bytes: u64,
    /// Bytes of the tensors in it.
    pub payload_bytes: u64,
    /// The number of calibration samples; 0 if no layer needed them.
    pub samples: usize,
    /// The pruned share of all compressed weights.
    pub sparsity: f64,
    /// Stored bits per weight, over all compressed weights.
    pub bits_per_weight: f64,
    /// The plan of the run.
    pub plan: Plan,
    /// What tuning did; absent if there was none. The errors of the layers are those before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Log>,
    /// Every compressed layer, in execution order.
    pub layers: Vec<LayerReport>,
    /// Warnings and remarks.
    pub notes: Vec<String>,
    /// The config of the run; if it had a budget, with the settings that were chosen for each
    /// layer.
    #[serde(skip)]
    pub config: RunConfig,
}
