//! The plan of a run: its schedule, sizes, memory, passes over the samples, work.
//!
//! A [`Plan`] turns recipe and chain into a [`Schedule`] and prices its stops; compression executes
//! the same stops.

mod card;
mod disk;
mod memory;
mod need;
mod part;
mod schedule;
mod tuning;
mod work;

pub use card::{Card, Drawing};
pub use disk::{Disk, free as free_disk};
pub(crate) use disk::{check as check_disk, of_samples, taken};
pub use memory::{CUDA_CONTEXT, Memory, WAITING};
pub(crate) use memory::{batched_layer_bytes, solving_bytes};
use part::Outline;
pub use part::StagePlan;
pub use schedule::{Gather, Schedule, Stop, Then};
use sdxl_model::checkpoint::Blueprint;
use sdxl_model::unet::{CarryShape, Part, PartName, Scope, UnetChain};
use sdxl_model::{Layer, LayerInput};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_solver::{Hessian, OutputGradients};
use tch::Device;
pub use tuning::TuningPlan;
pub(crate) use tuning::{HELD_OUT, JUDGED, MOST_HELD_OUT, PROBES, joined};
pub use work::{Work, measured_rate};

use crate::calibration::{Calls, drawing_activations};
use crate::geometry::input_geometry;
use crate::recipe::{LayerRecipes, Sequencing, kept, stored_bytes};

/// Where recorded carries wait between the stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CarriesIn {
    /// There are none: no layer needs a Hessian.
    Nowhere,
    /// The device's memory.
    Memory,
    /// The host's memory, pinned where the device is a GPU.
    Host,
    /// Files beside the result.
    Files,
}

/// The plan of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The stops of the run.
    #[serde(skip)]
    pub schedule: Schedule,
    /// The stages, in the order in which they run.
    pub stages: Vec<StagePlan>,
    /// Bytes of the result's tensors.
    pub payload_bytes: u64,
    /// Bytes of the compressed weights among them.
    pub compressed_bytes: u64,
    /// Elements of the compressed weights.
    pub compressed_elements: u64,
    /// The share of them that is pruned.
    pub sparsity: f64,
    /// The calibration samples; `None` if no layer needs them.
    pub calls: Option<Calls>,
    /// Where carries wait.
    pub carries: CarriesIn,
    /// Whether the Hessians of a pass wait in the host's memory until they are solved with.
    pub hessians_wait: bool,
    /// Bytes of the host's memory in which carries and Hessians of a GPU wait.
    pub host_bytes: u64,
    /// Bytes for layers that a GPU solves at once, besides the largest; 0 solves one by one.
    pub batch_bytes: u64,
    /// Whether parts stay loaded on a GPU while their layers are solved.
    pub keeps_parts: bool,
    /// Bytes of all carries at their largest.
    pub carry_bytes: u64,
    /// The most bytes in use at once, by estimate, without the drawing of samples.
    pub peak_bytes: u64,
    /// The least bytes in which a GPU encodes texts and draws the samples, with one part of the
    /// UNet in memory at a time; 0 on other devices, and for samples that are not drawn. (The
    /// number of prompts in a batch does not depend on the memory: a batch of another size is
    /// rounded in another way.)
    pub drawing_bytes: u64,
    /// Its disk space.
    pub disk: Disk,
    /// Its work, without the drawing of samples.
    pub work: Work,
    /// The work of one call of the UNet; 0 if no layer needs samples.
    pub call: Work,
    /// Bytes of the UNet's tensors in memory.
    pub resident_bytes: u64,
}

impl Plan {
    /// Plans the compression of a UNet. `bytes_of` gives the bytes of an element of a tensor in
    /// memory, by the tensor's name; `calls` are needed if a recipe needs Hessians.
    ///
    /// # Errors
    /// [`Error::Argument`] if the memory is too little, naming the least that is enough.
    pub fn new(
        chain: &UnetChain,
        recipes: &LayerRecipes,
        sequencing: Sequencing,
        calls: Option<Calls>,
        memory: Memory,
        bytes_of: &dyn Fn(&str) -> usize,
    ) -> Result<Self> {
        let calls = calls.filter(|_| recipes.values().any(|recipe| recipe.needs_hessian()));
        let attempt = |memory, carries| Plan::with_carries(chain, recipes, sequencing, calls, memory, bytes_of, carries);
        if calls.is_none() {
            let plan = attempt(memory, CarriesIn::Nowhere)?;
            let (least, budget) = (plan.peak_bytes, memory.budget);
            let few = || {
                Error::Argument(format!("{} of memory are too little; {} would do", number::size(budget), number::size(least)))
            };
            return if least > budget { Err(few()) } else { Ok(plan) };
        }
        let waits: &[bool] = if memory.host > 0 { &[false, true] } else { &[false] };
        // From the fastest way on.
        let ways = [CarriesIn::Memory, CarriesIn::Host, CarriesIn::Files];
        let ways = ways.into_iter().filter(|carries| *carries != CarriesIn::Host || memory.host > 0);
        let ways: Vec<(CarriesIn, bool)> = ways.flat_map(|carries| waits.iter().map(move |waits| (carries, *waits))).collect();
        let plans = |memory: Memory| {
            let one = move |&(carries, hessians_wait): &_| attempt(Memory { hessians_wait, ..memory }, carries);
            ways.iter().map(one)
        };
        // Loading a part again takes about as long as a pass. Of equal plans the first is the
        // fastest.
        let best = |memory| plans(memory).filter_map(Result::ok).min_by_key(|plan| plan.passes() + plan.unloads());
        // Layers that a GPU solves at once are worth more than a few passes.
        let alone = Memory { batch: 0, ..memory };
        if let Some(best) = best(memory).or_else(|| if memory.batch > 0 { best(alone) } else { None }) {
            return Ok(best);
        }
        let why = plans(alone).filter_map(Result::err).last().expect("there is a way, and it does not fit");
        // The least that works, to a MiB; carries in files take the least.
        let enough = |budget: u64| plans(Memory { budget, ..alone }).rev().take(waits.len()).any(|plan| plan.is_ok());
        let (mut low, mut high) = (memory.budget >> 20, 1 << 26);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if enough(middle << 20) { high = middle } else { low = middle }
        }
        Err(Error::Argument(format!("{why}; {} would do", number::size(high << 20))))
    }

    fn with_carries(
        chain: &UnetChain,
        recipes: &LayerRecipes,
        sequencing: Sequencing,
        calls: Option<Calls>,
        memory: Memory,
        bytes_of: &dyn Fn(&str) -> usize,
        carries: CarriesIn,
    ) -> Result<Self> {
        let parts = Sketch::of_all(chain, bytes_of)?;
        let mut memory = memory;
        memory.carries_away = matches!(carries, CarriesIn::Host | CarriesIn::Files);
        if let Some(calls) = &calls {
            memory.shared = shared_bytes(&parts) + metric_bytes(&parts, recipes);
            if memory.device.is_cuda() {
                // Samples stay where they were drawn.
                memory.shared += of_samples(calls, chain.config()) / 4 * memory.element_bytes;
            }
        }
        let size = CompressedSize::of(&parts, recipes);

        let networks = if sequencing.has_dense_target() { 2 } else { 1 };
        let carry_bytes = |numel: i64| {
            calls.map_or(0, |calls| networks * memory.element_bytes * (calls.count as i64 * calls.batch * numel).unsigned_abs())
        };
        let outlines = outlines(chain, &parts, sequencing, (calls.as_ref(), memory.device));
        let largest = |outline: &Outline| carry_bytes(outline.before.numel().max(outline.after.numel()));
        let mut schedule = Schedule {
            stops: Vec::new(),
            has_dense_target: sequencing.has_dense_target(),
            holds_out: recipes.values().any(|recipe| recipe.joint.is_some()),
        };
        let mut ranges = Vec::new();
        for outline in &outlines {
            let held = if carries == CarriesIn::Memory { largest(outline) } else { 0 };
            let begin = schedule.stops.len();
            schedule.stops.extend(outline.stops(recipes, calls.as_ref(), &memory, held)?);
            ranges.push(begin..schedule.stops.len());
        }
        let mut work = Work::default();
        for (outline, range) in outlines.iter().zip(&ranges) {
            for index in range.clone() {
                let forward = calls.map_or(0.0, |calls| outline.forward_work(&schedule, index, &calls));
                schedule.stops[index].work.forward = forward;
                let layer_forwards = calls.map_or(0.0, |calls| outline.layer_forwards(&schedule, index, &calls));
                schedule.stops[index].work.layer_forwards = layer_forwards;
                let carried_bytes = calls.map_or(0.0, |calls| outline.carried_bytes(&schedule, index, &calls, &memory));
                schedule.stops[index].work.carried_bytes = carried_bytes;
                work += schedule.stops[index].work;
            }
        }
        let mut call = Work::default();
        if let Some(calls) = &calls {
            outlines.iter().for_each(|outline| call += outline.call(calls));
        }
        let stages = outlines.iter().zip(&ranges).filter(|(outline, _)| matches!(outline.name, PartName::Stage(_)));
        let stages = stages.map(|(outline, range)| outline.summary(recipes, &schedule.stops[range.clone()])).collect();

        let dense = chain
            .tensors()?
            .into_iter()
            .filter(|tensor| tensor.name.strip_suffix(".weight").is_none_or(|layer| !recipes.contains_key(layer)));
        let payload_bytes = size.bytes + dense.map(|tensor| 2 * tensor.numel()).sum::<u64>();
        let largest_part = parts.iter().map(|sketch| sketch.resident_bytes).max().unwrap_or(0);
        let keeps_parts = memory.device != Device::Cpu && schedule.peak_bytes() + networks * largest_part <= memory.usable();
        for (outline, range) in outlines.iter().zip(ranges) {
            work.loaded_bytes += outline.loaded_bytes(&schedule.stops[range], keeps_parts);
        }
        let largest_carry = outlines.iter().map(largest).max().unwrap_or(0);
        // Within a transformer a carry has tokens too, as many as its features; their files stay
        // until others replace them.
        let features = |carry: &CarryShape| carry.hidden_states.iter().product::<i64>();
        let tokens = outlines.iter().map(|outline| features(&outline.after)).max().unwrap_or(0);
        let last = outlines.last().map_or(0, |outline| outline.after.numel());
        let in_files = carries == CarriesIn::Files;
        let waiting_carries = match (carries, calls) {
            (CarriesIn::Host, Some(calls)) => {
                let of_outline = |outline: &Outline| outline.waiting_bytes(&calls, &memory);
                networks * outlines.iter().map(of_outline).max().unwrap_or(0)
            }
            (CarriesIn::Host | CarriesIn::Nowhere | CarriesIn::Memory | CarriesIn::Files, _) => 0,
        };
        let waiting_hessians = match memory.hessians_wait {
            // Their tensors are small enough that some are rounded up by half.
            true => schedule.stops.iter().map(|stop| stop.hessian_bytes + stop.hessian_bytes / 2).max().unwrap_or(0),
            false => 0,
        };
        let host_bytes = waiting_carries + waiting_hessians;
        if host_bytes > memory.host {
            let size = number::size;
            let few =
                format!("{} of the host's memory are too little for {} that wait there", size(memory.host), size(host_bytes));
            return Err(Error::Argument(few));
        }
        let drawing_bytes = match &calls {
            Some(calls) if memory.device.is_cuda() => {
                let drawn = memory.program() + largest_part + drawing_activations(chain, calls, memory.element_bytes);
                drawn.max(memory.encoding_bytes())
            }
            Some(_) | None => 0,
        };
        Ok(Plan {
            stages,
            payload_bytes,
            compressed_bytes: size.bytes,
            compressed_elements: size.elements,
            sparsity: size.pruned as f64 / f64::max(size.elements as f64, 1.0),
            calls,
            carries,
            hessians_wait: memory.hessians_wait,
            host_bytes,
            drawing_bytes,
            batch_bytes: memory.batch,
            keeps_parts,
            carry_bytes: largest_carry,
            peak_bytes: schedule.peak_bytes(),
            disk: Disk {
                samples: calls.map_or(0, |calls| of_samples(&calls, chain.config())),
                carries: if in_files { largest_carry + carry_bytes(tokens) } else { 0 },
                carries_left: if in_files { carry_bytes(last + tokens) } else { 0 },
                parts: size.bytes,
                result: payload_bytes,
            },
            work,
            call,
            resident_bytes: parts.iter().map(|part| part.resident_bytes).sum(),
            schedule,
        })
    }

    /// The number of passes over the samples in which the Hessians of stages are gathered.
    #[must_use]
    pub fn passes(&self) -> usize {
        self.stages.iter().map(|stage| stage.passes).sum()
    }

    /// The number of stops at which the part leaves the device while its layers are solved.
    #[must_use]
    pub fn unloads(&self) -> usize {
        self.schedule.stops.iter().filter(|stop| stop.unloads).count()
    }
}

/// A part without weights.
struct Sketch {
    name: PartName,
    part: Part,
    /// The block of each of its layers.
    block_of: Vec<usize>,
    /// Bytes of its tensors in memory.
    resident_bytes: u64,
}

impl Sketch {
    fn of_all(chain: &UnetChain, bytes_of: &dyn Fn(&str) -> usize) -> Result<Vec<Self>> {
        let sketch = |name: PartName| {
            let blueprint = Blueprint::default();
            let part = chain.load_part(name, &blueprint)?;
            let tensors = blueprint.into_tensors();
            let resident_bytes = tensors.iter().map(|tensor| tensor.numel() * bytes_of(&tensor.name) as u64).sum();
            let block_of = |layer: &Layer| {
                let mut blocks = 0..part.blocks();
                blocks.find(|block| part.scope_has(Scope::Block(*block), layer.name())).expect("every layer is in a block")
            };
            let block_of = part.layers().iter().map(block_of).collect();
            Ok(Sketch { name, part, block_of, resident_bytes })
        };
        chain.parts().map(sketch).collect()
    }
}

/// Bytes of the Hessians of text and time, which stay for the whole run, and of their factors.
fn shared_bytes(parts: &[Sketch]) -> u64 {
    let of_input = |input: LayerInput| {
        let layers = parts.iter().flat_map(|sketch| sketch.part.layers()).filter(|layer| *layer.input() == input);
        let bytes = layers.map(|layer| {
            let size = layer.weight().size();
            Hessian::bytes(input_geometry(layer), &size) + Hessian::factor_bytes(input_geometry(layer), &size)
        });
        bytes.max().unwrap_or(0)
    };
    of_input(LayerInput::Text) + of_input(LayerInput::Time)
}

/// Bytes of the metrics of outputs, which are measured before the first layer is solved.
fn metric_bytes(parts: &[Sketch], recipes: &LayerRecipes) -> u64 {
    let layers = parts.iter().flat_map(|sketch| sketch.part.layers());
    let has_metric = |layer: &&Layer| recipes.get(layer.name()).is_some_and(|recipe| recipe.output_probes() > 0);
    layers.filter(has_metric).map(|layer| OutputGradients::bytes(layer.weight().size()[0])).sum()
}

/// Sums over the compressed weights.
#[derive(Default)]
struct CompressedSize {
    elements: u64,
    pruned: u64,
    bytes: u64,
}

impl CompressedSize {
    fn of(parts: &[Sketch], recipes: &LayerRecipes) -> Self {
        let mut sums = CompressedSize::default();
        for layer in parts.iter().flat_map(|sketch| sketch.part.layers()) {
            let Some(recipe) = recipes.get(layer.name()) else { continue };
            let size = layer.weight().size();
            let (o, d) = (size[0].unsigned_abs(), size.iter().skip(1).product::<i64>().unsigned_abs());
            sums.pruned += o * d - kept(o, d, recipe);
            sums.elements += o * d;
            sums.bytes += stored_bytes(&size, recipe);
        }
        sums
    }
}

/// Every part with the carries that it takes and gives.
fn outlines<'a>(
    chain: &UnetChain,
    parts: &'a [Sketch],
    sequencing: Sequencing,
    (calls, device): (Option<&Calls>, Device),
) -> Vec<Outline<'a>> {
    // Without calls there are no carries; their shapes have no elements then.
    let [height, width] = calls.map_or([0, 0], |calls| [calls.height, calls.width]);
    let first = chain.first_carry(height, width);
    let joined = calls.map_or(1, |calls| calls.joined(first.numel(), device) as i64);
    let mut stages = chain.stages().iter();
    let mut before = first;
    let outline = |Sketch { name, part, block_of, resident_bytes }: &'a Sketch| {
        let (after, joined) = match name {
            // The input block runs once for each call.
            PartName::InputBlock => (before.clone(), 1),
            PartName::Stage(_) => (stages.next().expect("parts has every stage once").after(&before), joined),
            PartName::OutputBlock => (before.clone(), joined),
        };
        let before = std::mem::replace(&mut before, after.clone());
        Outline { name: *name, part, block_of, sequencing, joined, resident_bytes: *resident_bytes, before, after }
    };
    parts.iter().map(outline).collect()
}
