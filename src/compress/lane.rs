//! The samples that go through the chain on one device.

use std::path::Path;

use tch::{Device, Tensor};

use super::carries::Carries;
use super::{Gatherer, Job, Workspace, carries_folder, placement};
use crate::allocator;
use crate::calibration::Samples;
use crate::checkpoint::TensorSource;
use crate::error::{Error, Result};
use crate::model::unet::{Stage, StageSpec};
use crate::model::{Layer, LayerInput, Unobserved};
use crate::plan::CarriesIn;
use crate::progress::{Progress, Task};

/// A device, the stage at hand on it, and the carries of its share of the samples.
pub(super) struct Lane {
    device: Device,
    carries: Carries,
    stage: Option<Stage>,
}

impl Lane {
    /// Loads a stage in the place of the one before.
    pub fn load(&mut self, spec: &StageSpec, source: &dyn TensorSource) -> Result<()> {
        // The old one goes first: there may not be memory for both.
        self.stage = None;
        allocator::give_back();
        self.stage = Some(spec.load(&On { source, device: self.device })?);
        Ok(())
    }

    /// The layers of the stage at hand.
    pub fn layers(&self) -> &[Layer] {
        self.stage.as_ref().map_or(&[], Stage::layers)
    }

    fn stage(&self) -> Result<&Stage> {
        self.stage.as_ref().ok_or_else(|| Error::Argument("no stage is loaded".into()))
    }

    /// Puts the finished layers' stored weights in the place of the dense ones.
    pub fn take_over(&mut self, finished: &Workspace) -> Result<()> {
        for layer in self.stage.as_mut().map_or(&mut [][..], Stage::layers_mut) {
            if !finished.has(layer.name()) {
                continue;
            }
            if let Some(stored) = finished.weight(layer.name())? {
                let decoded = Tensor::f_from_slice(&stored.decode()?)?.f_view(stored.shape.as_slice())?;
                layer.replace_weight(&decoded)?;
            }
        }
        Ok(())
    }
}

/// A source whose tensors are moved to a device.
struct On<'a> {
    source: &'a dyn TensorSource,
    device: Device,
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
            let carries = match self.plan.carries {
                CarriesIn::Files => Carries::in_files(&carries_folder(workspace, number), *device)?,
                CarriesIn::Memory | CarriesIn::Nowhere => Carries::in_memory(),
            };
            Ok(Lane { device: *device, carries, stage: None })
        };
        self.devices.iter().enumerate().map(lane).collect()
    }

    /// Runs the head on the samples, each on its lane, and gathers what stays the same in all stages: text states and SiLU(temb).
    pub(super) fn first_carries<'a>(
        &self,
        lanes: &mut [Lane],
        samples: &Samples,
        layers: impl Iterator<Item = &'a Layer>,
        progress: &dyn Progress,
    ) -> Result<Gatherer> {
        let shared = layers.filter(|layer| !matches!(layer.input(), LayerInput::Features(_)));
        let mut gatherer = Gatherer::new(shared, lanes.first().map_or(Device::Cpu, |lane| lane.device))?;
        let count = lanes.len();
        let task = Task::begin(progress, "first carries", "samples", samples.calls.len());
        for (number, lane) in lanes.iter_mut().enumerate() {
            let head = self.chain.load_head(&On { source: self.source, device: lane.device })?;
            for call in samples.calls.iter().skip(number).step_by(count) {
                task.go_on()?;
                task.advance("head");
                let call = call.placed(placement(lane.device, self.kind))?;
                let carry = head.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved)?;
                gatherer.add(&LayerInput::Text, &carry.encoder_hidden_states)?;
                gatherer.add(&LayerInput::Time, &carry.temb.f_silu()?)?;
                lane.carries.push(carry)?;
            }
        }
        Ok(gatherer)
    }
}

/// Sends all carries through the stage at hand and gathers the Hessians of `inputs`, on every lane at once; partial sums are added in the
/// order of the lanes.
pub(super) fn gather(lanes: &mut [Lane], inputs: &[LayerInput], stage: &str, progress: &dyn Progress) -> Result<Gatherer> {
    let task = Task::begin(progress, "Hessians", "samples", lanes.iter().map(|lane| lane.carries.len()).sum());
    let wanted = |layer: &&Layer| inputs.contains(layer.input());
    let run = |lane: &mut Lane, tick: Tick| -> Result<Gatherer> {
        let mut gatherer = Gatherer::new(lane.layers().iter().filter(wanted), lane.device)?;
        for index in 0..lane.carries.len() {
            tick()?;
            lane.stage()?.forward(lane.carries.get(index)?, &mut gatherer)?;
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

/// Replaces each carry by what the stage at hand makes of it; only the first of each lane, as a check, if they need not `go_on`.
pub(super) fn outputs(lanes: &mut [Lane], stage: &str, go_on: bool, progress: &dyn Progress) -> Result<()> {
    let count = |lane: &Lane| if go_on { lane.carries.len() } else { lane.carries.len().min(1) };
    let task = Task::begin(progress, "outputs", "samples", lanes.iter().map(count).sum());
    let run = |lane: &mut Lane, tick: Tick| -> Result<()> {
        for index in 0..count(lane) {
            tick()?;
            let after = lane.stage()?.forward(lane.carries.get(index)?, &mut Unobserved)?;
            if after.hidden_states.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
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

/// Called before each sample.
type Tick<'a> = &'a dyn Fn() -> Result<()>;

/// Runs something on every lane, each in its own thread where there are several. `tick` is called before each sample, by one lane alone.
fn on_each<T: Send>(lanes: &mut [Lane], run: &(dyn Fn(&mut Lane, Tick) -> Result<T> + Sync), tick: Tick) -> Result<Vec<T>> {
    let [first, others @ ..] = lanes else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let started: Vec<_> = others.iter_mut().map(|lane| scope.spawn(|| run(lane, &|| Ok(())))).collect();
        let mut results = vec![run(first, tick)?];
        for thread in started {
            results.push(thread.join().map_err(|_| Error::Argument("a device's thread ended in a panic".into()))??);
        }
        Ok(results)
    })
}
