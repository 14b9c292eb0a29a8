//! The report on a text encoder or a VAE.

use serde::Serialize;
use squeeze_container::Network;

use crate::compress::report::LayerReport;

/// The report on a text encoder or a VAE, written beside the containers as JSON.
#[derive(Debug, Serialize)]
pub struct NetworkReport {
    /// The network.
    pub network: Network,
    /// Bytes of the container.
    pub bytes: u64,
    /// Bytes of the tensors in it.
    pub payload_bytes: u64,
    /// Bytes of the same tensors in fp16.
    pub dense_bytes: u64,
    /// The number of texts or pictures that it was calibrated on; 0 if no layer needed them.
    pub samples: usize,
    /// Stored bits per weight, over all compressed weights.
    pub bits_per_weight: f64,
    /// Every compressed layer, in execution order.
    pub layers: Vec<LayerReport>,
    /// Warnings and remarks.
    pub notes: Vec<String>,
}
