//! One part of the network: its stops, and what they take and compute.

use sdxl_model::unet::{CarryShape, Part, PartName, Scope};
use sdxl_model::{Layer, LayerInput, Operation};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_numerics::waiting::WaitingTensor;

use super::memory::{Memory, working_set};
use super::need::{Need, Room};
use super::schedule::{Gather, Schedule, Stop, Then, by_block, by_stage};
use super::work::Work;
use crate::calibration::{Calls, is_held_out};
use crate::recipe::{LayerRecipe, LayerRecipes, Sequencing, stored_bytes};

/// A stage in a [`Plan`](super::Plan).
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    /// The name of the stage.
    pub name: String,
    /// The number of its Conv2d and Linear layers.
    pub layers: usize,
    /// The number of pruned layers.
    pub pruned: usize,
    /// The number of palettized layers.
    pub palettized: usize,
    /// Elements of its weights.
    pub elements: u64,
    /// Bytes of its compressed weights in the container.
    pub stored_bytes: u64,
    /// Bytes of its weights in memory while it runs.
    pub resident_bytes: u64,
    /// Bytes of all its Hessians.
    pub hessian_bytes: u64,
    /// The number of passes over the samples in which Hessians are gathered.
    pub passes: usize,
    /// The most bytes in use at once.
    pub peak_bytes: u64,
    /// Its multiply-adds.
    pub work: Work,
}

/// A part to plan.
pub(super) struct Outline<'a> {
    pub name: PartName,
    /// The part, built without weights.
    pub part: &'a Part,
    /// The block of each of its layers.
    pub block_of: &'a [usize],
    pub sequencing: Sequencing,
    /// The number of calls in one batch.
    pub joined: i64,
    pub resident_bytes: u64,
    /// The carry that the part takes.
    pub before: CarryShape,
    /// The carry that the part gives.
    pub after: CarryShape,
}

/// The layers that run in one pass, given as multiply-adds for one call.
struct Pass {
    /// The whole scope.
    whole: f64,
    /// The layers before the first that is given the gathered input.
    before: f64,
    /// The layers up to the last that is given the gathered input.
    through: f64,
}

impl Outline<'_> {
    fn runs_block_by_block(&self) -> bool {
        match (self.name, self.sequencing) {
            (PartName::Stage(_), Sequencing::Stage) => false,
            (PartName::InputBlock | PartName::OutputBlock, _) | (PartName::Stage(_), Sequencing::Sublayer { .. }) => true,
        }
    }

    /// The number of networks that run: the compressed one, and the dense one where it is the
    /// target.
    fn networks(&self) -> u64 {
        if self.sequencing.has_dense_target() { 2 } else { 1 }
    }

    fn compressed<'b>(&'b self, recipes: &'b LayerRecipes) -> impl Iterator<Item = (&'b Layer, &'b LayerRecipe)> {
        self.part.layers().iter().filter_map(|layer| Some((layer, recipes.get(layer.name())?)))
    }

    /// Height and width of a layer's input, or 1 and the number of vectors, for each item of the
    /// batch.
    fn grid(&self, layer: &Layer, calls: &Calls) -> [i64; 2] {
        match (layer.input(), self.name, layer.operation()) {
            (LayerInput::Text, _, _) => [1, calls.text],
            (LayerInput::Time, _, _) | (LayerInput::Features(_), PartName::InputBlock, Operation::Linear) => [1, 1],
            // Features are upsampled before the convolution.
            (LayerInput::Features(name), _, _) if name.contains(".upsamplers.") => self.after.grid(),
            (LayerInput::Features(_), _, _) => self.before.grid(),
        }
    }

    /// Multiply-adds of running `layers` once, with the products of attention, which run between
    /// the layers `to_v` and `to_out.0`.
    fn forward<'b>(&self, layers: impl Iterator<Item = &'b Layer>, calls: &Calls) -> f64 {
        let one = |layer: &Layer| {
            let [height, width] = self.grid(layer, calls);
            let places = match layer.operation() {
                Operation::Linear => height * width,
                Operation::Conv2d(geometry) => (height / geometry.stride[0]).max(1) * (width / geometry.stride[1]).max(1),
            };
            let weight = layer.weight().size();
            let keys = match layer.name() {
                name if name.ends_with("attn1.to_out.0") => height * width,
                name if name.ends_with("attn2.to_out.0") => calls.text,
                _ => 0,
            };
            places as f64 * weight.iter().product::<i64>() as f64 + 2.0 * (height * width * keys * weight[0]) as f64
        };
        calls.batch as f64 * layers.map(one).sum::<f64>()
    }

    /// Bytes of the largest activations of one call, with those that a convolution makes of them.
    fn activations(&self, calls: &Calls, memory: &Memory) -> u64 {
        let largest = self.part.layers().iter().map(|layer| {
            let [height, width] = self.grid(layer, calls);
            let size = layer.weight().size();
            let channels: i64 = size.iter().take(2).sum();
            let weight: i64 = size.iter().product();
            4 * calls.batch * height * width * channels + 2 * weight
        });
        memory.element_bytes * largest.max().unwrap_or(0).unsigned_abs()
    }

    /// Bytes of the host's memory in which the carries of one network wait at this part.
    pub(super) fn waiting_bytes(&self, calls: &Calls, memory: &Memory) -> u64 {
        let batches = calls.count.div_ceil(self.joined as usize) as u64;
        let of_tensor = |size: &[i64; 3]| {
            let numel = self.joined * calls.batch * size.iter().product::<i64>();
            WaitingTensor::bytes(memory.element_bytes * numel.unsigned_abs())
        };
        let of_carry = |carry: &CarryShape| {
            // Within a transformer a carry has tokens too, as many as its features.
            let tensors = carry.down_block_res_samples.iter().chain([&carry.hidden_states, &carry.hidden_states]);
            tensors.map(of_tensor).sum::<u64>()
        };
        batches * of_carry(&self.before).max(of_carry(&self.after))
    }

    /// Elements of the carries of one batch of `rows` rows that are on the device while it runs:
    /// one goes in and one comes out. One that has been away from a GPU is there in pieces, too.
    fn carry_in_use(&self, memory: &Memory, rows: i64) -> i64 {
        if memory.device.is_cuda() && memory.carries_away {
            3 * rows * self.brought_back()
        } else {
            2 * rows * self.before.numel().max(self.after.numel())
        }
    }

    /// Elements of a carry that come back from where it was away, for each item of the batch: for a
    /// block its features, its tokens and one residual.
    fn brought_back(&self) -> i64 {
        let largest = |size: &dyn Fn(&CarryShape) -> i64| size(&self.before).max(size(&self.after));
        if self.runs_block_by_block() {
            3 * largest(&|carry| carry.hidden_states.iter().product())
        } else {
            largest(&CarryShape::numel)
        }
    }

    /// Bytes of carries that are copied to a GPU and away from it at the stop `index` of
    /// `schedule`.
    pub(super) fn carried_bytes(&self, schedule: &Schedule, index: usize, calls: &Calls, memory: &Memory) -> f64 {
        if !(memory.device.is_cuda() && memory.carries_away) {
            return 0.0;
        }
        let gathers = matches!(schedule.stops[index].gather, Gather::Samples(_));
        let times = u64::from(gathers) + 2 * u64::from(schedule.advances(index, &|_| true));
        let carry = memory.element_bytes * (calls.count as i64 * calls.batch * self.brought_back()).unsigned_abs();
        (self.networks() * times * carry) as f64
    }

    /// The bytes that are in use whatever the stop, beside `carries` bytes of recorded carries.
    fn room(&self, calls: Option<&Calls>, memory: &Memory, carries: u64) -> Room {
        let Memory { device, hessians_wait, .. } = *memory;
        let Some(calls) = calls else {
            return Room { fixed: memory.fixed(), running: 0, resting: 0, device, hessians_wait };
        };
        let batch = &Calls { batch: calls.batch * self.joined, ..*calls };
        let carry = memory.element_bytes * self.carry_in_use(memory, batch.batch).unsigned_abs();
        let loaded = self.networks() * self.resident_bytes;
        Room {
            fixed: memory.fixed() + carries + carry,
            running: loaded + self.activations(batch, memory),
            // A stage is not loaded while its layers are solved, unless the next stop needs it as
            // it is.
            resting: if self.runs_block_by_block() { loaded } else { 0 },
            device,
            hessians_wait,
        }
    }

    /// The stops of the part, with the bytes that each takes and the work of solving its layers.
    /// `carries` are the bytes of all recorded carries that are in memory.
    ///
    /// # Errors
    /// [`Error::Argument`] if the memory is too little for a layer.
    pub(super) fn stops(
        &self,
        recipes: &LayerRecipes,
        calls: Option<&Calls>,
        memory: &Memory,
        carries: u64,
    ) -> Result<Vec<Stop>> {
        let has_dense_target = self.sequencing.has_dense_target();
        let needs = Need::of(self.compressed(recipes), has_dense_target);
        let room = self.room(calls, memory, carries);
        // Stages and the output block can be loaded again after their layers are solved.
        let least = if self.name == PartName::InputBlock { room } else { Room { resting: 0, ..room } };
        for need in needs.iter().filter(|need| need.is_gathered()) {
            let alone = least.gathered(&[need]);
            if alone > memory.usable() {
                let layer = format!("{} needs {}", need.first().name(), number::size(alone));
                return Err(self.too_little(memory, &format!(": {layer}")));
            }
        }
        let rest = self.compressed(recipes).filter(|(_, recipe)| !recipe.needs_hessian());
        let rest: Vec<String> = rest.map(|(layer, _)| layer.name().to_owned()).collect();
        let mut stops = if self.runs_block_by_block() {
            by_block(self.name, self.part, &needs, &rest)
        } else {
            by_stage(self.name, &needs, rest, &|wave| room.fits(wave, memory))
        };
        for stop in &mut stops {
            let layers = || self.compressed(recipes).filter(|(layer, _)| stop.layers.iter().any(|name| name == layer.name()));
            let needs = Need::of(layers(), has_dense_target);
            let gathered: Vec<&Need> = needs.iter().filter(|need| need.is_gathered()).collect();
            let shared = needs.iter().filter(|need| !need.is_gathered()).map(|need| need.solving_bytes(memory.device));
            let others = layers().filter(|(_, recipe)| !recipe.needs_hessian());
            let others = others.map(|(layer, recipe)| working_set(&layer.weight().size(), recipe.joint.is_some(), memory.device));
            let alone = shared.chain(others).max().unwrap_or(0);
            let bytes = |room: &Room| room.gathered(&gathered).max(room.at_once(0, alone));
            stop.unloads = bytes(&room) > memory.usable() && bytes(&least) < bytes(&room);
            stop.bytes = bytes(if stop.unloads { &least } else { &room });
            let items = calls.map_or(0.0, |calls| (calls.count as i64 * calls.batch) as f64);
            let grid = |need: &Need| calls.map_or([0, 0], |calls| self.grid(need.first(), calls));
            let mut work = Work::default();
            needs.iter().for_each(|need| work += need.work(items, grid(need)));
            let palettized = layers().filter(|(_, recipe)| recipe.palettize.is_some());
            work.palettized += palettized.map(|(layer, _)| layer.weight().numel() as f64).sum::<f64>();
            let joint = layers().filter(|(_, recipe)| recipe.joint.is_some()).count() as f64;
            (work.joint_layers, work.other_layers) = (joint, layers().count() as f64 - joint);
            stop.work = work;
            stop.hessian_bytes = gathered.iter().map(|need| need.bytes).sum();
        }
        // The samples go through a part in which nothing is calibrated, too.
        let peak = stops.iter().map(|stop| stop.bytes).max().unwrap_or(0);
        if calls.is_some() && peak > memory.usable() {
            return Err(self.too_little(memory, &format!(", which needs {}", number::size(peak))));
        }
        Ok(stops)
    }

    fn too_little(&self, memory: &Memory, needs: &str) -> Error {
        Error::Argument(format!("{} of memory are too little for stage `{}`{needs}", number::size(memory.budget), self.name))
    }

    /// Multiply-adds of sending all samples to the stop `index` of `schedule`, and past it where a
    /// later stop needs them.
    pub(super) fn forward_work(&self, schedule: &Schedule, index: usize, calls: &Calls) -> f64 {
        let stop = &schedule.stops[index];
        let networks = self.networks() as f64;
        let count = calls.count as f64;
        let (gathered, whole) = match &stop.gather {
            Gather::Samples(inputs) => {
                let pass = self.pass(stop.scope, inputs, calls);
                let held_out = if schedule.holds_out { self.held_out(calls) as f64 } else { 0.0 };
                let gathered = match (inputs.len(), schedule.has_dense_target, stop.then) {
                    (1, false, _) => count * pass.before,
                    // The forward of a held-out sample ends at the input.
                    (1, true, then) => {
                        let dense = if then == Then::Advance { pass.whole } else { pass.through };
                        count * dense + (count - held_out) * pass.through + held_out * pass.before
                    }
                    (_, _, _) => count * networks * pass.whole,
                };
                (gathered, pass.whole)
            }
            Gather::Nothing | Gather::Shared(_) => (0.0, self.pass(stop.scope, &[], calls).whole),
        };
        if !schedule.advances(index, &|_| true) {
            return gathered;
        }
        // The last pass of a block has taken the dense network past it already.
        let is_ahead = schedule.has_dense_target && matches!(stop.gather, Gather::Samples(_));
        gathered + if is_ahead { 1.0 } else { networks } * count * whole
    }

    /// The forward of one call.
    pub(super) fn call(&self, calls: &Calls) -> Work {
        let layers = self.part.layers();
        Work { forward: self.forward(layers.iter(), calls), layer_forwards: layers.len() as f64, ..Work::default() }
    }

    /// Layers that run while all samples are sent to the stop `index` of `schedule` and past it,
    /// for every batch of them.
    pub(super) fn layer_forwards(&self, schedule: &Schedule, index: usize, calls: &Calls) -> f64 {
        let stop = &schedule.stops[index];
        let layers = self.part.layers().iter().filter(|layer| self.part.scope_has(stop.scope, layer.name())).count();
        let gathers = matches!(stop.gather, Gather::Samples(_));
        let passes = u64::from(gathers) + u64::from(schedule.advances(index, &|_| true));
        (self.networks() * passes) as f64 * (layers * calls.count.div_ceil(self.joined as usize)) as f64
    }

    /// Bytes of weights that are loaded for `stops` of the part: once, and again where the part has
    /// left the device. A part that does not stay while its layers are solved is loaded for each
    /// pass and to be left, and its weights are read once more to be solved.
    pub(super) fn loaded_bytes(&self, stops: &[Stop], keeps_parts: bool) -> f64 {
        let count = |is_one: &dyn Fn(&&Stop) -> bool| stops.iter().filter(is_one).count() as u64;
        let passes = count(&|stop| matches!(stop.gather, Gather::Samples(_)));
        let times =
            if self.runs_block_by_block() || passes == 0 || keeps_parts { 1 + count(&|stop| stop.unloads) } else { passes + 2 };
        (times * self.resident_bytes) as f64
    }

    fn pass(&self, scope: Scope, inputs: &[LayerInput], calls: &Calls) -> Pass {
        let is_in_scope = |block: &usize| match scope {
            Scope::Whole => true,
            Scope::Block(index) => *block == index,
        };
        let layers = self.part.layers().iter().zip(self.block_of).filter(|(_, block)| is_in_scope(block));
        let layers: Vec<&Layer> = layers.map(|(layer, _)| layer).collect();
        let is_gathered = |layer: &&Layer| inputs.contains(layer.input());
        let first = layers.iter().position(is_gathered).unwrap_or(0);
        let through = layers.iter().rposition(is_gathered).map_or(0, |last| last + 1);
        let forward = |layers: &[&Layer]| self.forward(layers.iter().copied(), calls);
        Pass { whole: forward(&layers), before: forward(&layers[..first]), through: forward(&layers[..through]) }
    }

    /// The number of calls that are held out, on one device.
    fn held_out(&self, calls: &Calls) -> usize {
        let joined = self.joined as usize;
        let batches = calls.count.div_ceil(joined);
        let held_out = (0..batches).filter(|batch| is_held_out(*batch, batches));
        held_out.map(|batch| joined.min(calls.count - batch * joined)).sum()
    }

    /// The plan of a stage, from its stops in `schedule`.
    pub(super) fn summary(&self, recipes: &LayerRecipes, stops: &[Stop]) -> StagePlan {
        let needs = Need::of(self.compressed(recipes), self.sequencing.has_dense_target());
        let is_pass = |stop: &&Stop| matches!(stop.gather, Gather::Samples(_));
        let mut work = Work::default();
        stops.iter().for_each(|stop| work += stop.work);
        StagePlan {
            name: self.name.to_string(),
            layers: self.part.layers().len(),
            pruned: self.compressed(recipes).filter(|(_, recipe)| recipe.prune.is_some()).count(),
            palettized: self.compressed(recipes).filter(|(_, recipe)| recipe.palettize.is_some()).count(),
            elements: self.part.layers().iter().map(|layer| layer.weight().numel() as u64).sum(),
            stored_bytes: self.compressed(recipes).map(|(layer, recipe)| stored_bytes(&layer.weight().size(), recipe)).sum(),
            resident_bytes: self.resident_bytes,
            hessian_bytes: needs.iter().map(|need| need.bytes).sum(),
            passes: stops.iter().filter(is_pass).count(),
            peak_bytes: stops.iter().map(|stop| stop.bytes).max().unwrap_or(0),
            work,
        }
    }
}
