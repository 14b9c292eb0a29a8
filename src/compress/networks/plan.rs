//! The size, the memory and the work of a run before it computes.

use sdxl_model::checkpoint::TensorSpec;
use sdxl_model::text::CLIP_LENGTH;
use sdxl_model::{Layer, Pieces};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_container::Network;
use squeeze_numerics::device::Placement;
use squeeze_solver::{Hessian, OutputResidual};

use super::dense::{Dense, TOKEN_EMBEDDING};
use super::inputs::TEXTS_TOGETHER;
use super::prepare::PreparedNetwork;
use super::walk::stops;
use crate::geometry::input_geometry;
use crate::plan::{Disk, Memory, Work, solving_bytes};
use crate::recipe::stored_bytes;

/// Bytes that each element of a table of embeddings takes while its palettes are made.
const BYTES_OF_A_PALETTIZED_ELEMENT: u64 = 16;

/// Tensors of the size of a layer's output that are alive at once in a forward: the input, the
/// normalized input, the output, the residual, and a copy for padding or another dtype.
const ACTIVATIONS: u64 = 5;

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
    /// The most bytes in use at once, by estimate, without the drawing of latents: the program, the
    /// network, its samples, and the layer that takes most.
    pub peak_bytes: u64,
    /// The disk space. What is kept to go on with (`samples`: latents; `parts`: finished layers)
    /// stays until all networks are done.
    pub disk: Disk,
    /// The work, without that of drawing latents and of attention.
    pub work: Work,
}

impl NetworkPlan {
    /// Checks that the run fits into `budget` bytes of memory.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the least that is enough.
    pub fn check_memory(&self, budget: u64) -> Result<()> {
        if self.peak_bytes <= budget {
            return Ok(());
        }
        let [budget, least] = [budget, self.peak_bytes].map(number::size);
        let fewer = match (self.work.hessians > 0.0, self.network) {
            (true, Network::Vae) => ", or fewer or smaller pictures (`nsamples`, `height` and `width`), or `target: current`",
            (true, _) => ", or fewer texts (`nsamples`)",
            (false, _) => "",
        };
        Err(Error::Argument(format!(
            "{budget} of memory are too little to compress the {}; {least} would do{fewer}",
            self.network
        )))
    }
}

impl PreparedNetwork<'_> {
    /// The plan of the run.
    ///
    /// # Errors
    /// If the weights cannot be read, or the VAE cannot make pictures of the config's size.
    pub fn plan(&self) -> Result<NetworkPlan> {
        let tensors = self.dense.tensors(&self.dense.weights()?)?;
        let recipe = |spec: &TensorSpec| self.recipes.get(spec.name.strip_suffix(".weight")?);
        let compressed = |spec: &TensorSpec| recipe(spec).map(|recipe| stored_bytes(&spec.shape, recipe));
        let stored = |spec: &TensorSpec| compressed(spec).unwrap_or(2 * spec.numel());
        let (mut peak_bytes, mut work) = (0, Work::default());
        for half in self.dense.halves() {
            let outline = self.dense.outline(*half)?;
            peak_bytes = peak_bytes.max(self.peak_of(outline.pieces(), self.table_bytes(&tensors))?);
            work += self.work(outline.pieces())?;
        }
        let payload_bytes = tensors.iter().map(stored).sum();
        Ok(NetworkPlan {
            network: self.network(),
            layers: self.recipes.len(),
            payload_bytes,
            dense_bytes: 2 * tensors.iter().map(TensorSpec::numel).sum::<u64>(),
            peak_bytes: peak_bytes + self.memory().program(),
            disk: Disk {
                samples: self.latents_bytes()?,
                carries: 0,
                carries_left: 0,
                parts: tensors.iter().filter_map(compressed).sum(),
                result: payload_bytes,
            },
            work,
        })
    }

    fn memory(&self) -> Memory {
        let Placement { device, kind } = self.placement();
        Memory::new(self.options.budget.unwrap_or(u64::MAX), kind, device)
    }

    /// Bytes in which the table of the tokens' embeddings is compressed.
    fn table_bytes(&self, tensors: &[TensorSpec]) -> u64 {
        let is_table = |spec: &&TensorSpec| spec.name.strip_suffix(".weight") == Some(TOKEN_EMBEDDING);
        let elements = tensors.iter().find(is_table).map_or(0, TensorSpec::numel);
        if self.recipes.contains_key(TOKEN_EMBEDDING) { BYTES_OF_A_PALETTIZED_ELEMENT * elements } else { 0 }
    }

    /// The bytes that a half takes at most: its weights, the samples between two pieces, those of
    /// one forward, and the layer or the `table` that takes most. Without samples, that alone.
    fn peak_of(&self, net: &dyn Pieces, table: u64) -> Result<u64> {
        let Placement { device, kind } = self.placement();
        let element = kind.elt_size_in_bytes() as u64;
        let has_dense_target = self.sequencing().has_dense_target();
        let weight_bytes = |layer: &Layer| element * layer.weight().numel() as u64;
        let of_layer = |layer: &Layer| {
            let recipe = self.recipes.get(layer.name())?;
            let (geometry, shape) = (input_geometry(layer), layer.weight().size());
            let hessian = if recipe.needs_hessian() { Hessian::bytes(geometry, &shape) } else { 0 };
            let residual = if recipe.needs_hessian() && has_dense_target { OutputResidual::bytes(&shape) } else { 0 };
            Some(weight_bytes(layer) + hessian + residual + solving_bytes(geometry, &shape, recipe, device))
        };
        let layer = net.layers().iter().filter_map(of_layer).max().unwrap_or(0).max(table);
        if !self.is_calibrated() {
            return Ok(layer);
        }
        let networks = if has_dense_target { 2 } else { 1 };
        let (waiting, of_forward) = self.sample_elements(net)?;
        let samples = networks * self.nsamples as u64 * waiting + ACTIVATIONS * of_forward;
        let tables = match self.dense {
            Dense::Text(_, part) => (part.config.vocab_size * part.config.hidden_size).unsigned_abs(),
            Dense::Vae(..) => 0,
        };
        Ok(net.layers().iter().map(weight_bytes).sum::<u64>() + element * (tables + samples) + layer)
    }

    /// Bytes of the latents that are kept to go on with: at most 11 digits and a comma for each
    /// number.
    fn latents_bytes(&self) -> Result<u64> {
        let Dense::Vae(folder, _) = self.dense else { return Ok(0) };
        if !self.is_calibrated() {
            return Ok(0);
        }
        let (height, width) = folder.picture_size(self.config.calibration.size)?;
        let scale = folder.vae.scale();
        let numbers = folder.vae.latent_channels * (height / scale) * (width / scale);
        Ok(12 * self.nsamples as u64 * numbers.unsigned_abs())
    }

    /// The multiply-adds of forwards, Hessians and solvers.
    fn work(&self, net: &dyn Pieces) -> Result<Work> {
        let samples = if self.is_calibrated() { self.nsamples as f64 } else { 0.0 };
        let networks = if self.sequencing().has_dense_target() { 2 } else { 1 };
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
                work.forward += (networks * (passes + 1)) as f64 * rows * o * d;
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

    /// The vectors of a sample that a layer makes.
    fn rows(&self, layer: &Layer) -> Result<f64> {
        Ok(match self.dense {
            Dense::Text(..) if layer.name() == "text_projection" => 1.0,
            Dense::Text(..) => CLIP_LENGTH as f64,
            Dense::Vae(folder, _) => {
                let (height, width) = folder.picture_size(self.config.calibration.size)?;
                let scale = folder.vae.scale();
                let level = level(layer.name(), folder.vae.block_out_channels.len());
                ((height / scale) * (width / scale)) as f64 * 4f64.powi(level as i32)
            }
        })
    }

    /// The most elements of a sample between two pieces, and in one layer of the forward of what
    /// runs at once: some texts, or one picture.
    fn sample_elements(&self, net: &dyn Pieces) -> Result<(u64, u64)> {
        let (mut between, mut within) = (0.0_f64, 0.0_f64);
        for (_, range) in net.pieces() {
            for layer in &net.layers()[range.clone()] {
                within = within.max(self.rows(layer)? * layer.weight().size()[0] as f64);
            }
            // A piece ends with its last layer, whose output has the size of the states.
            if let Some(last) = net.layers()[range].last() {
                between = between.max(self.rows(last)? * last.weight().size()[0] as f64);
            }
        }
        let together = match self.dense {
            Dense::Text(..) => TEXTS_TOGETHER.min(self.nsamples),
            Dense::Vae(..) => 1,
        };
        Ok((between as u64, together as u64 * within as u64))
    }
}

/// The resolution of a VAE's layer: that of the latents is 0, and each level doubles both sides.
fn level(layer: &str, levels: usize) -> usize {
    let block = |prefix: &str| layer.strip_prefix(prefix).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let samples = layer.contains("samplers.");
    let finest = levels - 1;
    match (block("decoder.up_blocks."), block("encoder.down_blocks."), layer) {
        // The convolution of an upsampler comes after it, that of a downsampler is the downsampler.
        (Some(up), _, _) => up + usize::from(samples),
        (_, Some(down), _) => finest - down - usize::from(samples),
        (None, None, "decoder.conv_out" | "encoder.conv_in") => finest,
        (None, None, _) => 0,
    }
}

/// The shape [o, d] of a layer's weight as a matrix.
fn rows_and_columns(layer: &Layer) -> (f64, f64) {
    let shape = layer.weight().size();
    (shape[0] as f64, shape[1..].iter().product::<i64>() as f64)
}
