//! Sending the carries of all devices through the loaded part.

use sdxl_model::unet::Scope;
use sdxl_model::{Layer, LayerInput};
use squeeze_base::allocator;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::finite::is_finite;
use tch::Device;

use super::dense_outputs::DenseOutputs;
use super::each_device::on_each;
use super::forward::{forward, watch};
use super::gather::Gatherer;
use super::owners::Owners;
use super::shard::DeviceShard;
use super::teacher::Advances;
use super::watcher::{BatchUse, Seen, Watched, Watcher};
use crate::calibration::is_held_out;

/// A pass of all carries in which Hessians are gathered.
#[derive(Debug, Clone, Copy)]
pub(super) struct GatherRequest<'a> {
    /// The part's name, for progress.
    pub part: &'a str,
    /// The portion of the part that the carries are sent through.
    pub scope: Scope,
    /// The inputs whose Hessians are summed.
    pub inputs: &'a [LayerInput],
    /// Whether some batches are held out of the Hessians.
    pub holds_out: bool,
    /// Whether the carries of the dense network, if it runs, pass the scope.
    pub teacher_advances: Advances,
}

/// Which carries advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of them.
    All,
    /// The first of each device, to check that it stays finite: no later part needs the carries.
    First,
}

/// Gathers Hessians; returns multiply-adds too. Where layers have a dense target, each carry of the
/// dense network goes before its compressed twin.
///
/// A single device adds to the sums what it sees. Several run in rounds. In a round, each of them
/// runs one batch and keeps what is to be summed, which is the inputs of the layers in the dtype of
/// the activations. Then the sums of each input, which are on one of the devices, take it in the
/// order of the batches. These are the additions of a single device in its order, so the sums are
/// equal to the last bit.
pub(super) fn gather(shards: &mut [DeviceShard], request: GatherRequest<'_>, progress: &dyn Progress) -> Result<(Gatherer, f64)> {
    let _span = tracing::debug_span!("gather").entered();
    let batches = shards.iter().map(|shard| shard.carries.len()).sum();
    let task = Task::begin(progress, "Hessians", "batches", batches);
    let first = shards.first().expect("a walk has at least one shard");
    let has_target = first.teacher.is_some();
    let layers: Vec<&Layer> = first.part().layers().iter().filter(|layer| request.inputs.contains(layer.input())).collect();
    let names: Vec<String> = layers.iter().map(|layer| layer.name().to_owned()).collect();
    let watched = Watched::of(layers.iter().copied(), has_target);
    let watched = if request.inputs.len() == 1 { watched.ending_early() } else { watched };
    let devices: Vec<Device> = shards.iter().map(|shard| shard.device).collect();
    let mut owners = Owners::new(&layers, has_target, &devices)?;
    let pass = Pass { request, names: &names, watched: &watched, batches };
    let multiply_adds = match &mut *shards {
        [only] => pass.run_on_one(only, &mut owners, &task)?,
        several => pass.run_in_rounds(several, &mut owners, &task)?,
    };
    for teacher in shards.iter_mut().filter_map(|shard| shard.teacher.as_mut()) {
        teacher.set_ahead(request.teacher_advances);
    }
    // Activations are not needed any more.
    allocator::give_back();
    Ok((owners.into_gatherer()?, multiply_adds))
}

/// A pass of all carries in which layers are watched.
struct Pass<'a> {
    request: GatherRequest<'a>,
    /// The layers of the inputs.
    names: &'a [String],
    watched: &'a Watched,
    /// The number of batches on all devices.
    batches: usize,
}

impl Pass<'_> {
    /// Adds what a single device sees as soon as it sees it; returns multiply-adds.
    fn run_on_one(&self, shard: &mut DeviceShard, owners: &mut Owners, task: &Task<'_>) -> Result<f64> {
        let mut multiply_adds = 0.0;
        for batch in 0..self.batches {
            multiply_adds += self.run(shard, batch, batch, &mut |seen| owners.add(vec![vec![seen]]))?;
            report(task, self.request.part, 0)?;
        }
        Ok(multiply_adds)
    }

    /// Adds what several devices have seen after each has run a batch; returns multiply-adds.
    fn run_in_rounds(&self, shards: &mut [DeviceShard], owners: &mut Owners, task: &Task<'_>) -> Result<f64> {
        let (devices, mut multiply_adds) = (shards.len(), 0.0);
        for round in 0..self.batches.div_ceil(devices) {
            let ran = on_each(shards, &|device, shard| {
                let (batch, mut seen) = (round * devices + device, Vec::new());
                if batch >= self.batches {
                    return Ok((seen, 0.0));
                }
                let multiply_adds = self.run(shard, round, batch, &mut |one| {
                    seen.push(one);
                    Ok(())
                })?;
                report(task, self.request.part, device)?;
                Ok((seen, multiply_adds))
            })?;
            let (seen, counts): (Vec<Vec<Seen>>, Vec<f64>) = ran.into_iter().unzip();
            owners.add(seen)?;
            multiply_adds += counts.iter().sum::<f64>();
        }
        Ok(multiply_adds)
    }

    /// Sends the carry `index` of a device, which is the batch `batch` of all, through the scope,
    /// and hands what is to be summed to `take`; returns multiply-adds.
    fn run(&self, shard: &mut DeviceShard, index: usize, batch: usize, take: &mut dyn FnMut(Seen) -> Result<()>) -> Result<f64> {
        let GatherRequest { scope, holds_out, teacher_advances, .. } = self.request;
        let (mut targets, mut multiply_adds) = (DenseOutputs::default(), 0.0);
        if let Some(teacher) = &mut shard.teacher {
            (targets, multiply_adds) = teacher.outputs(index, scope, self.names, teacher_advances)?;
        }
        let batch_use = match holds_out && is_held_out(batch, self.batches) {
            true => BatchUse::HeldOut { vectors: shard.held_out_vectors },
            false => BatchUse::Summed { weight: shard.weights[index] },
        };
        let mut watcher = Watcher::new(self.watched, batch_use, targets, take);
        Ok(multiply_adds + watch(shard.part(), scope, shard.carries.get(index)?, &mut watcher, &shard.overflows)?)
    }
}

/// Sends the carries through `scope` of the loaded part, called `part` for people; returns
/// multiply-adds.
pub(super) fn advance(
    shards: &mut [DeviceShard],
    part: &str,
    scope: Scope,
    extent: Extent,
    progress: &dyn Progress,
) -> Result<f64> {
    let count = |shard: &DeviceShard| match extent {
        Extent::All => shard.carries.len(),
        Extent::First => shard.carries.len().min(1),
    };
    let _span = tracing::debug_span!("advance").entered();
    let task = Task::begin(progress, "outputs", "batches", shards.iter().map(count).sum());
    let advanced = on_each(shards, &|device, shard| {
        let teacher_lags = shard.teacher.as_mut().is_some_and(|teacher| teacher.lags());
        let mut multiply_adds = 0.0;
        for index in 0..count(shard) {
            if let Some(teacher) = shard.teacher.as_mut().filter(|_| teacher_lags) {
                multiply_adds += teacher.advance(index, scope)?;
            }
            let (after, more) = forward(shard.part(), scope, shard.carries.get(index)?, &shard.overflows)?;
            multiply_adds += more;
            if !is_finite(after.tokens.as_ref().unwrap_or(&after.hidden_states))? {
                return Err(Error::NotFinite(format!("the output of `{part}`, compressed, has NaN or infinity in it")));
            }
            shard.carries.replace(index, after)?;
            report(&task, part, device)?;
        }
        Ok(multiply_adds)
    })?;
    Ok(advanced.into_iter().sum())
}

/// Reports that a device has done a batch; an error if the run has to stop. Every thread reports
/// each of its batches, so that progress counts them all and all threads stop when the run has to
/// stop.
fn report(task: &Task<'_>, part: &str, device: usize) -> Result<()> {
    task.sample(part, device);
    task.go_on()
}
