//! The size, the memory and the work of a run before it computes.

use sdxl_model::checkpoint::{Blueprint, TensorSpec};
use sdxl_model::text::CLIP_LENGTH;
use sdxl_model::{Layer, Pieces};
use serde::Serialize;
use squeeze_base::error::Result;
use squeeze_container::Network;
use squeeze_solver::Hessian;

use super::dense::Dense;
use super::prepare::PreparedNetwork;
use super::walk::stops;
use crate::geometry::input_geometry;
use crate::plan::{Work, solving_bytes, stored_bytes};

/// The plan of a text encoder's or a VAE's run. Bytes are exact, memory and work estimates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkPlan {
    /// The network.
    pub network: Network,
    /// Compressed layers.
    pub layers: usize,
    /// Bytes of all tensors of the container.
    pub payload_bytes: u64,
    /// Bytes of the same tensors in fp16.
    pub dense_bytes: u64,
    /// Bytes of the network, its samples between two pieces, and the layer that takes most.
    pub peak_bytes: u64,
    /// The work, without that of drawing latents and of attention.
    pub work: Work,
}

impl PreparedNetwork<'_> {
    /// The plan of the run.
    ///
    /// # Errors
    /// If the weights cannot be read, or the VAE cannot make pictures of the config's size.
    pub fn plan(&self) -> Result<NetworkPlan> {
        let tensors = self.dense.tensors(&self.dense.weights()?)?;
        let recipe = |spec: &TensorSpec| self.recipes.get(spec.name.strip_suffix(".weight")?);
        let stored = |spec: &TensorSpec| recipe(spec).map_or(2 * spec.numel(), |recipe| stored_bytes(&spec.shape, recipe));
        let loaded = self.dense.load(&Blueprint::default())?;
        let net = loaded.pieces();
        let placement = self.placement();
        let element = placement.kind.elt_size_in_bytes() as u64;
        let (samples, of_samples) = match self.is_calibrated() {
            true => (self.nsamples as f64, self.sample_elements(net)? * self.nsamples as u64 * element),
            false => (0.0, 0),
        };
        let of_layer = |layer: &Layer| {
            let recipe = self.recipes.get(layer.name())?;
            let (geometry, shape) = (input_geometry(layer), layer.weight().size());
            let hessian = if recipe.needs_hessian() { Hessian::bytes(geometry, &shape) } else { 0 };
            Some(hessian + solving_bytes(geometry, &shape, recipe, placement.device))
        };
        let elements: u64 = tensors.iter().map(TensorSpec::numel).sum();
        Ok(NetworkPlan {
            network: self.network(),
            layers: self.recipes.len(),
            payload_bytes: tensors.iter().map(stored).sum(),
            dense_bytes: 2 * elements,
            peak_bytes: element * elements + of_samples + net.layers().iter().filter_map(of_layer).max().unwrap_or(0),
            work: self.work(net, samples)?,
        })
    }

    /// The multiply-adds of forwards, Hessians and solvers for so many samples.
    fn work(&self, net: &dyn Pieces, samples: f64) -> Result<Work> {
        let mut work = Work::default();
        for (_, range) in net.pieces() {
            let layers = &net.layers()[range.clone()];
            let stops = stops(net.layers(), &range, self.sequencing());
            let is_calibrated = |layer: &Layer| self.recipes.get(layer.name()).is_some_and(|recipe| recipe.needs_hessian());
            let passes = stops.iter().filter(|stop| stop.iter().any(|index| is_calibrated(&net.layers()[*index]))).count();
            let mut inputs = Vec::new();
            for layer in layers {
                let (o, d) = rows_and_columns(layer);
                let rows = samples * self.rows(layer)?;
                work.forward += (passes + 1) as f64 * rows * o * d;
                if self.recipes.contains_key(layer.name()) {
                    work.palettized += o * d;
                }
                if !is_calibrated(layer) {
                    continue;
                }
                work.sweeps += 1.5 * o * d * d;
                if !inputs.contains(layer.input()) {
                    inputs.push(layer.input().clone());
                    work.hessians += rows * d * d / 2.0;
                    work.factors += d.powi(3) / 3.0;
                }
            }
        }
        Ok(work)
    }

    /// The vectors of a sample that a layer is given.
    fn rows(&self, layer: &Layer) -> Result<f64> {
        Ok(match self.dense {
            Dense::Text(..) if layer.name() == "text_projection" => 1.0,
            Dense::Text(..) => CLIP_LENGTH as f64,
            Dense::Vae(folder) => {
                let (height, width) = folder.picture_size(self.config.calibration.size)?;
                let scale = folder.vae.scale();
                let levels = folder.vae.block_out_channels.len();
                let block = layer.name().strip_prefix("decoder.up_blocks.").and_then(|rest| rest.split('.').next()?.parse().ok());
                let level: usize = match block {
                    Some(block) if layer.name().contains("upsamplers") => block + 1,
                    Some(block) => block,
                    None if layer.name() == "decoder.conv_out" => levels - 1,
                    None => 0,
                };
                ((height / scale) * (width / scale)) as f64 * 4f64.powi(level as i32)
            }
        })
    }

    /// The most elements of a sample between two layers.
    fn sample_elements(&self, net: &dyn Pieces) -> Result<u64> {
        let mut most = 0.0_f64;
        for layer in net.layers() {
            let channels = layer.weight().size().iter().take(2).copied().max().unwrap_or(1);
            most = most.max(self.rows(layer)? * channels as f64);
        }
        Ok(most as u64)
    }
}

/// The shape [o, d] of a layer's weight as a matrix.
fn rows_and_columns(layer: &Layer) -> (f64, f64) {
    let shape = layer.weight().size();
    (shape[0] as f64, shape[1..].iter().product::<i64>() as f64)
}
