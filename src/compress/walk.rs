//! The samples on their way through the network, and the loop that takes them along a schedule.
//!
//! [`execute`] is the only loop over the chain. At every stop it gathers Hessians, hands them to a
//! [`Visitor`], installs the weights that the visitor has stored, and lets the samples advance.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sdxl_model::checkpoint::{Blueprint, TensorSource};
use sdxl_model::unet::{Carry, Part, PartName, Scope};
use sdxl_model::{Layer, LayerInput};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use tch::{Device, Tensor};

use super::gather::{Gatherer, HELD_OUT_VECTORS};
use super::input_block::CalibratedInputBlock;
use super::job::{Calibration, Job, Machine, Model};
use super::propagate::{self, Extent, GatherRequest};
use super::shard::{CarryStore, DeviceShard, OnDevice};
use super::statistics::Statistics;
use super::teacher::Advances;
use super::workspace::Workspace;
use crate::plan::{Gather, Schedule, Stop, Then};
use crate::recipe::Devices;

/// The work at the stops of a schedule.
pub(super) trait Visitor {
    /// The inputs of the stop whose Hessians the visitor needs.
    fn open_inputs(&self, stop: &Stop, walk: &Walk<'_>) -> Vec<LayerInput>;

    /// Solves the stop's layers. `gathered` has the Hessians of the open inputs if the samples had
    /// to run for them.
    fn solve(&mut self, stop: &Stop, gathered: Option<Gatherer>, walk: &Walk<'_>) -> Result<()>;

    /// The stored weights that take the place of the dense ones; `None` if the network stays dense.
    fn store(&self) -> Option<&Workspace>;
}

/// Takes the samples of `walk` along `schedule`.
pub(super) fn execute(schedule: &Schedule, walk: &mut Walk<'_>, visitor: &mut dyn Visitor, task: &Task<'_>) -> Result<()> {
    let gathers = |stop: &Stop| !visitor.open_inputs(stop, walk).is_empty();
    let is_pass = |stop: &&Stop| matches!(stop.gather, Gather::Samples(_)) && stop.part != PartName::InputBlock && gathers(stop);
    let last_part = schedule.stops.iter().rev().find(is_pass).map(|stop| stop.part);
    let routes: Vec<Route> = (0..schedule.stops.len())
        .map(|index| match (schedule.advances(index, &gathers), schedule.stops[index].then) {
            (true, _) => Route::Advance(Extent::All),
            (false, Then::Advance) if last_part == Some(schedule.stops[index].part) => Route::Advance(Extent::First),
            (false, Then::Advance | Then::Install | Then::Stay) => Route::Rest,
        })
        .collect();
    let shared = shared_layers(schedule, walk, visitor);
    let mut part = None;
    for (stop, route) in schedule.stops.iter().zip(routes) {
        if part.replace(stop.part) != Some(stop.part) {
            task.go_on()?;
            let mut parts = walk.model.chain.parts();
            let index = parts.position(|part| part == stop.part).expect("a schedule stops at parts of its network");
            task.stage(&stop.part.to_string(), index, walk.outlines.len());
            walk.come_to(stop.part);
        }
        let inputs = visitor.open_inputs(stop, walk);
        let during = |what: &'static str| move |error: Error| error.during(&format!("{what} of `{}`", stop.part));
        let gathered = walk.gather(stop, &inputs, visitor.store()).map_err(during("the Hessians"))?;
        if stop.unloads {
            walk.unload();
        }
        visitor.solve(stop, gathered, walk).map_err(during("the layers"))?;
        walk.leave(stop, route, &shared, visitor.store()).map_err(during("the outputs"))?;
    }
    Ok(())
}

/// The first layer of each open input of text and time, by stop.
fn shared_layers(schedule: &Schedule, walk: &Walk<'_>, visitor: &dyn Visitor) -> Vec<(PartName, String)> {
    let is_shared = |stop: &&Stop| matches!(stop.gather, Gather::Shared(_));
    let stops = schedule.stops.iter().filter(is_shared).filter(|stop| !visitor.open_inputs(stop, walk).is_empty());
    stops.map(|stop| (stop.part, stop.layers[0].clone())).collect()
}

/// Where the samples go from a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// Nowhere.
    Rest,
    /// Past the stop's scope.
    Advance(Extent),
}

/// The samples on their way, at one part of the network.
pub(super) struct Walk<'a> {
    model: Model<'a>,
    calibration: Calibration<'a>,
    machine: Machine<'a>,
    carries: CarryStore<'a>,
    /// Whether the Hessians of a pass wait in the host's memory until they are solved with.
    hessians_wait: bool,
    holds_out: bool,
    keeps_parts: bool,
    progress: &'a dyn Progress,
    /// All parts, without weights.
    outlines: BTreeMap<PartName, Part>,
    input_block: Option<CalibratedInputBlock>,
    /// One for each device, once the samples have passed the input block.
    shards: Vec<DeviceShard>,
    /// The part that the shards have loaded.
    loaded: Option<PartName>,
    /// The layers of the part that the samples have to see as stored.
    behind: BTreeSet<String>,
    /// The Hessians of text and time.
    shared: Gatherer,
    statistics: Statistics,
}

impl<'a> Walk<'a> {
    /// The samples of `job` before the input block. `captions` are Hessians of text and time, which
    /// are added to those of the samples; carries in files wait in `folder`.
    pub(super) fn new(job: &Job<'a>, captions: Gatherer, folder: &'a Path, progress: &'a dyn Progress) -> Result<Self> {
        let Job { model, plan, calibration, machine, .. } = *job;
        let blueprint = Blueprint::default();
        let outline = |name| Ok((name, model.chain.load_part(name, &blueprint)?));
        let carries = CarryStore { carries: plan.carries, folder, has_teacher: plan.schedule.has_dense_target };
        Ok(Walk {
            model,
            calibration,
            machine,
            carries,
            hessians_wait: plan.hessians_wait,
            holds_out: plan.schedule.holds_out,
            keeps_parts: plan.keeps_parts,
            progress,
            outlines: model.chain.parts().map(outline).collect::<Result<_>>()?,
            input_block: None,
            shards: Vec::new(),
            loaded: None,
            behind: BTreeSet::new(),
            shared: captions,
            statistics: Statistics::default(),
        })
    }

    /// The layers of a part, without weights, in execution order.
    pub(super) fn layers(&self, part: PartName) -> &[Layer] {
        self.outlines[&part].layers()
    }

    /// The layers that are solved at a stop, in execution order.
    pub(super) fn layers_of(&self, stop: &Stop) -> Vec<&Layer> {
        self.layers(stop.part).iter().filter(|layer| stop.layers.iter().any(|name| name == layer.name())).collect()
    }

    /// The Hessian of text or time.
    pub(super) fn shared(&self) -> &Gatherer {
        &self.shared
    }

    /// The devices that samples and Hessians are spread over.
    pub(super) fn devices(&self) -> &'a Devices {
        self.machine.devices
    }

    /// The dense weight of a layer, on the first device.
    pub(super) fn dense_weight(&self, layer: &Layer) -> Result<Tensor> {
        self.dense_weight_on(layer, self.devices().first())
    }

    /// The dense weight of a layer, on `device`: that of a Hessian, for example.
    pub(super) fn dense_weight_on(&self, layer: &Layer, device: Device) -> Result<Tensor> {
        let _span = tracing::debug_span!("dense weight").entered();
        let mut shards = self.shards.iter();
        let loaded = shards.find(|shard| shard.device == device).and_then(|shard| shard.dense_weight(layer.name()));
        match loaded {
            Some(weight) => Ok(weight),
            None => {
                let source = OnDevice { source: self.model.source, device };
                source.tensor(&format!("{}.weight", layer.name()), &layer.weight().size())
            }
        }
    }

    /// The carries of the first device.
    pub(super) fn carries(&self) -> Result<Vec<Carry>> {
        let carries = &self.shards.first().expect("the samples have passed the input block").carries;
        (0..carries.len()).map(|index| carries.get(index)).collect()
    }

    /// The counts of the run so far.
    pub(super) fn into_statistics(mut self) -> Statistics {
        self.statistics.overflows.extend(self.shards.iter().flat_map(DeviceShard::overflow_notes));
        self.statistics
    }

    fn come_to(&mut self, part: PartName) {
        self.behind.clear();
        if part != PartName::InputBlock {
            self.input_block = None;
        }
    }

    /// Gathers the Hessians of `inputs`, where the samples have to run for them.
    fn gather(&mut self, stop: &Stop, inputs: &[LayerInput], store: Option<&Workspace>) -> Result<Option<Gatherer>> {
        if inputs.is_empty() || !matches!(stop.gather, Gather::Samples(_)) {
            return Ok(None);
        }
        let (mut gatherer, multiply_adds) = match stop.part {
            PartName::InputBlock => {
                let input_block = match self.input_block.take() {
                    Some(input_block) => input_block,
                    None => CalibratedInputBlock::load(self.model, self.machine.devices.first(), self.carries.has_teacher)?,
                };
                let input_block = self.input_block.insert(input_block);
                if let Some(store) = store {
                    input_block.install(&self.behind, store)?;
                }
                let mut layers = self.outlines[&stop.part].layers().iter();
                let layer = layers.find(|layer| inputs.contains(layer.input())).expect("a stop's inputs are those of its part");
                input_block.gather(layer, self.calibration, self.machine, self.holds_out, self.progress)?
            }
            PartName::Stage(_) | PartName::OutputBlock => {
                self.enter(stop.part, store)?;
                self.shards.iter_mut().for_each(|shard| shard.expect(stop.scope));
                let request = GatherRequest {
                    part: &stop.part.to_string(),
                    scope: stop.scope,
                    inputs,
                    holds_out: self.holds_out,
                    teacher_advances: if stop.then == Then::Advance { Advances::Yes } else { Advances::No },
                };
                propagate::gather(&mut self.shards, request, self.progress)?
            }
        };
        self.statistics.add_pass(stop.part, multiply_adds);
        if stop.then == Then::Stay && !self.keeps_parts {
            // Factors take the place of the stage's weights in memory.
            self.unload();
            if self.hessians_wait {
                gatherer.wait_on_host()?;
            }
        }
        Ok(Some(gatherer))
    }

    /// Lets the samples leave a stop whose layers are stored. `shared` are the layers of text and
    /// time whose Hessians are needed.
    fn leave(&mut self, stop: &Stop, route: Route, shared: &[(PartName, String)], store: Option<&Workspace>) -> Result<()> {
        match stop.then {
            Then::Stay => {}
            Then::Install => self.behind.extend(stop.layers.iter().cloned()),
            Then::Advance => {
                let part = &self.outlines[&stop.part];
                let names = part.layers().iter().map(Layer::name).filter(|name| part.scope_has(stop.scope, name));
                self.behind.extend(names.map(str::to_owned));
            }
        }
        match (route, stop.part) {
            (Route::Rest, _) => Ok(()),
            (Route::Advance(_), PartName::InputBlock) => self.begin(shared, store),
            (Route::Advance(extent), PartName::Stage(_) | PartName::OutputBlock) => {
                self.advance(stop.part, stop.scope, extent, store)
            }
        }
    }

    /// Takes the samples past the input block, and sums text and time for the layers of `shared`.
    pub(super) fn begin(&mut self, shared: &[(PartName, String)], store: Option<&Workspace>) -> Result<()> {
        let devices = self.devices();
        let layers = shared.iter().map(|(part, name)| {
            let mut layers = self.layers(*part).iter();
            layers.find(|layer| layer.name() == name).expect("a stop's layers are those of its part")
        });
        let mut gatherer = Gatherer::new(layers, devices.first())?;
        let joined = self.calibration.joined(self.model.chain, devices.first());
        // A larger batch stands for several of a CPU's.
        let held_out_vectors = HELD_OUT_VECTORS * (joined / self.calibration.joined_on_cpu(self.model.chain)).max(1) as i64;
        let calls = &self.calibration.samples.calls;
        let task = Task::begin(self.progress, "first carries", "samples", calls.len());
        let mut input_blocks = Vec::new();
        for (number, device) in devices.as_slice().iter().enumerate() {
            let mut input_block = CalibratedInputBlock::load(self.model, *device, self.carries.has_teacher)?;
            if let Some(store) = store {
                input_block.install(&self.behind, store)?;
            }
            input_blocks.push(input_block);
            self.shards.push(DeviceShard::new(number, *device, self.carries, held_out_vectors)?);
        }
        let mut multiply_adds = 0.0;
        // Batches go round the devices, but text and time are summed in the order of the samples,
        // so that the sums are those of a single device.
        for (batch, calls) in calls.chunks(joined).enumerate() {
            let device = batch % devices.len();
            // A batch of several samples is one of equal weights.
            let weight = self.calibration.weight(batch * joined);
            let shard = &mut self.shards[device];
            multiply_adds += input_blocks[device].begin(shard, calls, weight, self.machine, &mut gatherer, &task)?;
        }
        gatherer.merge(std::mem::take(&mut self.shared))?;
        self.shared = gatherer;
        self.statistics.add_advance(PartName::InputBlock, multiply_adds);
        Ok(())
    }

    /// Takes the samples past `scope` of a part.
    pub(super) fn advance(&mut self, part: PartName, scope: Scope, extent: Extent, store: Option<&Workspace>) -> Result<()> {
        self.enter(part, store)?;
        self.shards.iter_mut().for_each(|shard| shard.expect(scope));
        let multiply_adds = propagate::advance(&mut self.shards, &part.to_string(), scope, extent, self.progress)?;
        if extent == Extent::All {
            self.statistics.add_advance(part, multiply_adds);
        }
        Ok(())
    }

    /// Loads a part on every device, with the stored weights of the layers that are behind.
    fn enter(&mut self, part: PartName, store: Option<&Workspace>) -> Result<()> {
        if self.loaded != Some(part) {
            let _span = tracing::debug_span!("load").entered();
            self.shards.iter_mut().try_for_each(|shard| shard.load(self.model, part))?;
            self.loaded = Some(part);
        }
        let _span = tracing::debug_span!("install").entered();
        match store {
            Some(store) => self.shards.iter_mut().try_for_each(|shard| shard.install(&self.behind, store)),
            None => Ok(()),
        }
    }

    fn unload(&mut self) {
        self.shards.iter_mut().for_each(DeviceShard::unload);
        self.loaded = None;
    }
}
