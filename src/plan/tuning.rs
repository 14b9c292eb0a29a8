//! The memory, the work and the disk space of tuning.

use sdxl_model::Layer;
use sdxl_model::checkpoint::TensorSpec;
use sdxl_model::unet::{PartName, UnetChain};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_codebook::PaletteOptions;
use tch::Device;

use super::{Memory, Sketch, of_samples, outlines};
use crate::calibration::Calls;
use crate::config::{TuneSection, TuneWeighting};
use crate::recipe::{LayerRecipes, Sequencing};

/// How often the network is judged by the held-out calls on its way, besides the start.
pub(crate) const JUDGED: usize = 5;
/// Of so many prompts one is held out.
pub(crate) const HELD_OUT: usize = 10;
/// Held-out prompts that are drawn to judge by, at most.
pub(crate) const MOST_HELD_OUT: usize = 20;
/// Pictures on which the effect of errors is measured.
pub(crate) const PROBES: usize = 4;
/// A call's forward, the forward that is made again, and its backward, in forwards.
const FORWARDS_OF_A_STEP: usize = 4;

/// The plan of a tuning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TuningPlan {
    /// Calls of the UNet that are learned from and judged by.
    pub calls: usize,
    /// Calls that go through the network together.
    pub joined: usize,
    /// Multiply-adds, without the drawing of the prompts.
    pub multiply_adds: f64,
    /// The most bytes in use at once, by estimate.
    pub peak_bytes: u64,
    /// Bytes of the two states on the disk.
    pub disk_bytes: u64,
}

impl TuningPlan {
    /// Plans the tuning of a UNet whose calls have the shape of `calls`, with `steps` of them for a
    /// picture. `bytes_of` gives the bytes
    /// of an element of a dense tensor in memory.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn new(
        chain: &UnetChain,
        section: &TuneSection,
        recipes: &LayerRecipes,
        (calls, steps): (Calls, usize),
        memory: Memory,
        bytes_of: &dyn Fn(&str) -> usize,
    ) -> Result<Self> {
        let calls = Calls { count: section.nsamples, ..calls };
        let joined = joined(calls.batch * chain.first_carry(calls.height, calls.width).numel(), memory.device);
        let rows = joined as u64 * calls.batch.unsigned_abs();
        let element = if memory.device == Device::Cpu { 4 } else { memory.element_bytes };
        let parts = Sketch::of_all(chain, bytes_of)?;
        let (mut inputs, mut inside, mut weights, mut largest, mut one) = (0, 0, 0, 0, 0.0);
        for outline in outlines(chain, &parts, Sequencing::Stage, (Some(&calls), memory.device)) {
            let features = |size: &[i64; 3]| size.iter().product::<i64>().unsigned_abs();
            let widest = features(&outline.before.hidden_states).max(features(&outline.after.hidden_states));
            if let PartName::Stage(_) = outline.name {
                // The input of a unit has the features and, in a transformer, the tokens.
                inputs += 2 * outline.part.blocks() as u64 * widest;
            }
            // A feed-forward has the tokens, its projection to eight times the width, two halves,
            // their product, and the gradients of all of them; resnets have less.
            inside = inside.max(32 * widest);
            let numels = outline.part.layers().iter().map(|layer| layer.weight().numel() as u64);
            weights = weights.max(numels.clone().sum());
            largest = largest.max(numels.max().unwrap_or(0));
            one += outline.call(&calls).forward;
        }
        let activations = rows * element * (inputs + inside);
        let layers = parts.iter().flat_map(|sketch| sketch.part.layers());
        let indices: u64 = layers.map(|layer| fixed_bytes(layer, recipes)).sum();
        let values: u64 = chain.tensors()?.iter().map(|tensor| trained_values(tensor, recipes)).sum();
        // Weights of a part and their gradients; places, masks and sums of the largest weight.
        let of_part = 2 * element * weights + 40 * largest;
        let lessons = of_samples(&calls, chain.config()) / 4 * element;
        let held_out = MOST_HELD_OUT * steps;
        let effects = match section.timestep_weighting {
            TuneWeighting::Effect => PROBES * steps * (steps + 3) / 2,
            TuneWeighting::Uniform => 0,
        };
        let trained = FORWARDS_OF_A_STEP * section.steps * section.batch;
        let forwards = effects + calls.count + (2 + JUDGED) * held_out + trained;
        Ok(TuningPlan {
            calls: calls.count,
            joined,
            multiply_adds: forwards as f64 * one,
            // Values, gradients, moments and the best values, in fp32 and for a moment in copies.
            peak_bytes: memory.program() + lessons + indices + 32 * values + of_part + activations,
            disk_bytes: 2 * 14 * values,
        })
    }

    /// Checks that the memory is enough.
    ///
    /// # Errors
    /// [`Error::Argument`] with the numbers.
    pub fn check(&self, budget: u64) -> Result<()> {
        if self.peak_bytes <= budget {
            return Ok(());
        }
        let [budget, least] = [budget, self.peak_bytes].map(number::size);
        Err(Error::Argument(format!("{budget} of memory are too little for tuning; {least} would do (or leave out `tune`)")))
    }

    /// The sizes in a sentence.
    #[must_use]
    pub fn text(&self, section: &TuneSection) -> String {
        format!(
            "tuning: {} steps of {} calls, out of {} calls with their dense predictions; {} TFLOP, peak memory {}, {} on the disk",
            section.steps,
            section.batch,
            number::count(self.calls as u64),
            number::fixed(2e-12 * self.multiply_adds, 1),
            number::size(self.peak_bytes),
            number::size(self.disk_bytes),
        )
    }
}

/// The number of calls that go through the network together: as many as keep the device busy.
/// `numel` is the size of a call's first carry.
pub(crate) fn joined(numel: i64, device: Device) -> usize {
    let enough = if device == Device::Cpu { 1 << 18 } else { 1 << 26 };
    (enough / numel.max(1)).clamp(1, 16) as usize
}

/// Bytes of a layer's indices and mask, one each for an element; of another compressed weight, its
/// values are read anew.
fn fixed_bytes(layer: &Layer, recipes: &LayerRecipes) -> u64 {
    let recipe = recipes.get(layer.name()).filter(|recipe| recipe.palettize.is_some());
    recipe.map_or(0, |recipe| layer.weight().numel() as u64 * if recipe.prune.is_some() { 2 } else { 1 })
}

/// The number of values of a tensor that are trained: those of all its palettes, or a vector.
fn trained_values(TensorSpec { name, shape }: &TensorSpec, recipes: &LayerRecipes) -> u64 {
    let recipe = name.strip_suffix(".weight").and_then(|layer| recipes.get(layer));
    match recipe.and_then(|recipe| recipe.palettize) {
        Some(PaletteOptions { quantizer: Some(_), .. }) => 0,
        Some(PaletteOptions { bits, grouping, axis, vector_length, per_channel_scale: _, quantizer: None }) => {
            let channels = shape.get(axis).copied().unwrap_or(1).unsigned_abs();
            let groups = grouping.group_size().map_or(1, |size| channels / size.max(1) as u64);
            groups * (bits.entries() * vector_length) as u64
        }
        None if shape.len() == 1 => shape[0].unsigned_abs(),
        None => 0,
    }
}
