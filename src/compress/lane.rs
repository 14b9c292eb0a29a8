//! The samples that go through the chain on one device.

use std::path::Path;

use tch::{Device, Tensor};

use super::carries::Carries;
use super::gather::DenseOutputs;
use super::{Gatherer, Job, Workspace, carries_folder, placement};
use crate::allocator;
use crate::calibration::{Samples, is_held_out};
use crate::checkpoint::TensorSource;
use crate::elementwise::silu;
use crate::error::{Error, Result};
use crate::finite::is_finite;
use crate::model::unet::{Carry, Head, Stage, StageSpec, Tail, UnetChain};
use crate::model::{Layer, LayerInput, Observer, Unobserved};
use crate::plan::CarriesIn;
use crate::progress::{Progress, Task};

/// A device, the part of the network at hand on it, and the carries of its share of the samples.
pub(super) struct Lane {
    device: Device,
    carries: Carries,
    part: Option<Part>,
    /// How much each sample counts.
    weights: Vec<f64>,
    dense: Option<Dense>,
}

/// The dense network's run beside the compressed one's, where layers aim at its outputs.
struct Dense {
    carries: Carries,
    part: Option<Part>,
    /// Whether its carries have gone through the unit at hand already.
    ahead: bool,
}

/// What carries can be sent through.
enum Part {
    Stage(Stage),
    /// One unit, which makes the prediction of the hidden states.
    Tail(Tail),
}

impl Part {
    fn layers(&self) -> &[Layer] {
        match self {
            Part::Stage(stage) => stage.layers(),
            Part::Tail(tail) => tail.layers(),
        }
    }

    fn layers_mut(&mut self) -> &mut [Layer] {
        match self {
            Part::Stage(stage) => stage.layers_mut(),
            Part::Tail(tail) => tail.layers_mut(),
        }
    }

    fn units(&self) -> usize {
        match self {
            Part::Stage(stage) => stage.units(),
            Part::Tail(_) => 1,
        }
    }

    fn unit_has(&self, unit: usize, layer: &str) -> bool {
        match self {
            Part::Stage(stage) => stage.unit_has(unit, layer),
            Part::Tail(_) => true,
        }
    }
}

impl Lane {
    /// Drops the part at hand.
    pub fn unload(&mut self) {
        self.part = None;
        if let Some(dense) = &mut self.dense {
            dense.part = None;
        }
        allocator::give_back();
    }

    /// Loads a stage in the place of the part before.
    pub fn load(&mut self, spec: &StageSpec, source: &dyn TensorSource) -> Result<()> {
        self.load_part(&|source| Ok(Part::Stage(spec.load(source)?)), source)
    }

    /// Loads what comes after the stages.
    pub fn load_tail(&mut self, chain: &UnetChain, source: &dyn TensorSource) -> Result<()> {
        self.load_part(&|source| Ok(Part::Tail(chain.load_tail(source)?)), source)
    }

    fn load_part(&mut self, load: &dyn Fn(&On<'_>) -> Result<Part>, source: &dyn TensorSource) -> Result<()> {
        // The old one goes first: there may not be memory for both.
        self.unload();
        let source = On { source, device: self.device };
        self.part = Some(load(&source)?);
        if let Some(dense) = &mut self.dense {
            dense.part = Some(load(&source)?);
        }
        Ok(())
    }

    /// Whether a layer is in unit `unit` of the part at hand.
    pub fn unit_has(&self, unit: usize, layer: &Layer) -> bool {
        self.part.as_ref().is_some_and(|part| part.unit_has(unit, layer.name()))
    }

    /// How many units the part at hand has.
    pub fn units(&self) -> usize {
        self.part.as_ref().map_or(0, Part::units)
    }

    /// The layers of the part at hand.
    pub fn layers(&self) -> &[Layer] {
        self.part.as_ref().map_or(&[], Part::layers)
    }

    fn part(&self) -> Result<&Part> {
        self.part.as_ref().ok_or_else(|| Error::Failed("no stage is loaded".into()))
    }

    /// Puts the stored weights of the finished layers among `which` in the place of the dense ones.
    pub fn take_over(&mut self, finished: &Workspace, which: &dyn Fn(&Layer) -> bool) -> Result<()> {
        take_over(self.part.as_mut().map_or(&mut [][..], Part::layers_mut), finished, which)
    }
}

/// The same for a list of layers.
pub(super) fn take_over(layers: &mut [Layer], finished: &Workspace, which: &dyn Fn(&Layer) -> bool) -> Result<()> {
    for layer in layers {
        if !finished.has(layer.name()) || !which(layer) {
            continue;
        }
        if let Some(stored) = finished.weight(layer.name())? {
            let decoded = Tensor::f_from_slice(&stored.decode()?)?.f_view(stored.shape.as_slice())?;
            layer.replace_weight(&decoded)?;
        }
    }
    Ok(())
}

/// A source whose tensors are moved to a device.
pub(super) struct On<'a> {
    pub source: &'a dyn TensorSource,
    pub device: Device,
}

impl TensorSource for On<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.source.tensor(name, shape)?.f_to_device(self.device)?)
    }
}

impl Job<'_> {
    /// A lane for each device, without carries. `workspace` is where files go.
    pub(super) fn lanes(&self, workspace: &Path) -> Result<Vec<Lane>> {
        let lane = |(number, device): (usize, &Device)| {
            let carries = |name: String| match self.plan.carries {
                CarriesIn::Files => Carries::in_files(&carries_folder(workspace, &name), *device),
                CarriesIn::Memory | CarriesIn::Nowhere => Ok(Carries::in_memory()),
            };
            let dense =
                || -> Result<Dense> { Ok(Dense { carries: carries(format!("{number}-dense"))?, part: None, ahead: false }) };
            let dense = if self.sequencing.has_dense_target() { Some(dense()) } else { None };
            let carries = carries(number.to_string())?;
            Ok(Lane { device: *device, carries, part: None, weights: Vec::new(), dense: dense.transpose()? })
        };
        self.devices.iter().enumerate().map(lane).collect()
    }

    /// Runs the head on the samples, each on its lane, and gathers what stays the same in all stages: text states and SiLU(temb). What is
    /// `finished` of the head has its stored weights.
    pub(super) fn first_carries<'a>(
        &self,
        lanes: &mut [Lane],
        samples: &Samples,
        layers: impl Iterator<Item = &'a Layer>,
        finished: Option<&Workspace>,
        progress: &dyn Progress,
    ) -> Result<Gatherer> {
        let shared = layers.filter(|layer| !matches!(layer.input(), LayerInput::Features(_)));
        let mut gatherer = Gatherer::new(shared, lanes.first().map_or(Device::Cpu, |lane| lane.device))?;
        let count = lanes.len();
        // Samples that count differently stay apart, and each device has its share.
        let least = samples.calls.len().div_ceil(count);
        let joined = match (self.weights, samples.shape()) {
            ([], Some(calls)) => calls.joined(self.chain.first_carry(calls.height, calls.width).numel()).min(least),
            _ => 1,
        };
        let task = Task::begin(progress, "first carries", "samples", samples.calls.len());
        for (number, lane) in lanes.iter_mut().enumerate() {
            let source = On { source: self.source, device: lane.device };
            let mut head = self.chain.load_head(&source)?;
            if let Some(finished) = finished {
                take_over(head.layers_mut(), finished, &|_| true)?;
            }
            let dense_head = lane.dense.as_ref().map(|_| self.chain.load_head(&source)).transpose()?;
            for (index, calls) in samples.calls.chunks(joined).enumerate().skip(number).step_by(count) {
                let (mut carries, mut dense_carries) = (Vec::new(), Vec::new());
                for call in calls {
                    task.go_on()?;
                    task.advance("head");
                    let call = call.placed(placement(lane.device, self.kind))?;
                    let go = |head: &Head| head.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved);
                    let carry = go(&head)?;
                    gatherer.add(&LayerInput::Text, &carry.encoder_hidden_states)?;
                    gatherer.add(&LayerInput::Time, &silu(&carry.temb)?)?;
                    carries.push(carry);
                    dense_carries.extend(dense_head.as_ref().map(go).transpose()?);
                }
                if let Some(dense) = &mut lane.dense {
                    dense.carries.push(Carry::join(&dense_carries)?)?;
                }
                lane.carries.push(Carry::join(&carries)?)?;
                lane.weights.push(self.weights.get(index).copied().unwrap_or(1.0));
            }
        }
        Ok(gatherer)
    }
}

/// What carries are sent through.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// All of the part at hand.
    Whole,
    /// One of its units.
    Unit(usize),
}

impl Way {
    fn go(self, part: &Part, carry: Carry, observer: &mut dyn Observer) -> Result<Carry> {
        match (part, self) {
            (Part::Stage(stage), Way::Whole) => stage.forward(carry, observer),
            (Part::Stage(stage), Way::Unit(unit)) => stage.forward_unit(unit, carry, observer),
            (Part::Tail(tail), _) => Ok(Carry { hidden_states: tail.forward(&carry, observer)?, ..carry }),
        }
    }

    /// The same as far as the observer wants to see.
    fn observe(self, part: &Part, carry: Carry, observer: &mut dyn Observer) -> Result<()> {
        seen_enough(self.go(part, carry, observer))
    }
}

/// What an observer ended because it had all is no failure.
pub(super) fn seen_enough<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) | Err(Error::SeenEnough) => Ok(()),
        Err(error) => Err(error),
    }
}

/// One pass of the carries, for Hessians.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    pub way: Way,
    /// What is gathered.
    pub inputs: &'a [LayerInput],
    /// Whether one carry of 16 is held out.
    pub hold: bool,
    /// Whether no pass follows on the same way: the dense network's carries, where there are any, go all of it at once.
    pub last: bool,
}

/// Sends all carries on their way and gathers Hessians, on every lane at once; partial sums are added in the order of the lanes. Where
/// layers aim at the dense network's outputs, its carries go first.
pub(super) fn gather(
    lanes: &mut [Lane],
    Pass { way, inputs, hold, last }: Pass<'_>,
    stage: &str,
    progress: &dyn Progress,
) -> Result<Gatherer> {
    let task = Task::begin(progress, "Hessians", "batches", lanes.iter().map(|lane| lane.carries.len()).sum());
    let wanted = |layer: &&Layer| inputs.contains(layer.input());
    let run = |lane: &mut Lane, tick: Tick| -> Result<Gatherer> {
        let layers = lane.layers().iter().filter(wanted);
        let names: Vec<String> = layers.clone().map(|layer| layer.name().to_owned()).collect();
        let mut gatherer = match lane.dense {
            Some(_) => Gatherer::aiming(layers, lane.device)?,
            None => Gatherer::new(layers, lane.device)?,
        };
        if inputs.len() == 1 {
            gatherer = gatherer.hasty();
        }
        for index in 0..lane.carries.len() {
            tick()?;
            gatherer.hold_out(hold && is_held_out(index, lane.carries.len()));
            gatherer.weigh(lane.weights.get(index).copied().unwrap_or(1.0));
            if let Some(Dense { carries, part: Some(part), .. }) = &mut lane.dense {
                let mut outputs = DenseOutputs::of(names.clone(), !last);
                let carry = carries.get(index)?;
                if last {
                    carries.replace(index, way.go(part, carry, &mut outputs)?)?;
                } else {
                    way.observe(part, carry, &mut outputs)?;
                }
                gatherer.aim_at(outputs);
            }
            way.observe(lane.part()?, lane.carries.get(index)?, &mut gatherer)?;
        }
        if let Some(dense) = &mut lane.dense {
            dense.ahead = last;
        }
        Ok(gatherer)
    };
    let tick = || {
        task.advance(stage);
        task.go_on()
    };
    let mut sums = on_each(lanes, &run, &tick)?.into_iter();
    let mut sum = sums.next().unwrap_or_default();
    for other in sums {
        sum.merge(other)?;
    }
    // Of the activations nothing is needed any more.
    allocator::give_back();
    Ok(sum)
}

/// Replaces each carry by what becomes of it on its way; only the first of each lane, as a check, if they need not `go_on`.
pub(super) fn outputs(lanes: &mut [Lane], way: Way, stage: &str, go_on: bool, progress: &dyn Progress) -> Result<()> {
    let count = |lane: &Lane| if go_on { lane.carries.len() } else { lane.carries.len().min(1) };
    let task = Task::begin(progress, "outputs", "batches", lanes.iter().map(count).sum());
    let run = |lane: &mut Lane, tick: Tick| -> Result<()> {
        let ahead = lane.dense.as_mut().is_some_and(|dense| std::mem::take(&mut dense.ahead));
        for index in 0..count(lane) {
            tick()?;
            if let Some(Dense { carries, part: Some(part), .. }) = lane.dense.as_mut().filter(|_| !ahead) {
                let after = way.go(part, carries.get(index)?, &mut Unobserved)?;
                carries.replace(index, after)?;
            }
            let after = way.go(lane.part()?, lane.carries.get(index)?, &mut Unobserved)?;
            let hidden = after.tokens.as_ref().unwrap_or(&after.hidden_states);
            if !is_finite(hidden)? {
                return Err(Error::NotFinite(format!("the output of `{stage}`, compressed, has NaN or infinity in it")));
            }
            lane.carries.replace(index, after)?;
        }
        Ok(())
    };
    let tick = || {
        task.advance(stage);
        task.go_on()
    };
    on_each(lanes, &run, &tick).map(drop)
}

/// Called before each sample, by whichever lane has it.
type Tick<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Runs something on every lane, each in its own thread where there are several. Every lane calls `tick` before each of its samples, so that
/// progress counts all of them, and all of them stop when the work is to stop.
fn on_each<T: Send>(lanes: &mut [Lane], run: &(dyn Fn(&mut Lane, Tick) -> Result<T> + Sync), tick: Tick) -> Result<Vec<T>> {
    let [first, others @ ..] = lanes else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let started: Vec<_> = others.iter_mut().map(|lane| scope.spawn(move || run(lane, tick))).collect();
        let mut results = vec![run(first, tick)?];
        for thread in started {
            results.push(thread.join().map_err(|_| Error::Failed("a device's thread ended in a panic".into()))??);
        }
        Ok(results)
    })
}
