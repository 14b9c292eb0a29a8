//! Sending the carries of all devices through the loaded part.

use sdxl_model::unet::Scope;
use sdxl_model::{Layer, LayerInput};
use squeeze_base::allocator;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::finite::is_finite;

use super::forward::{self, forward};
use super::gather::Gatherer;
use super::shard::DeviceShard;
use super::teacher::Advances;
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

/// Gathers Hessians on all devices at once; returns multiply-adds too. Partial sums are added in
/// the order of the devices. Where layers have a dense target, each carry of the dense network goes
/// before its compressed twin.
pub(super) fn gather(shards: &mut [DeviceShard], request: GatherRequest<'_>, progress: &dyn Progress) -> Result<(Gatherer, f64)> {
    let _span = tracing::debug_span!("gather").entered();
    let task = Task::begin(progress, "Hessians", "batches", shards.iter().map(|shard| shard.carries.len()).sum());
    let run = |shard: &mut DeviceShard, batch: Batch<'_>| gather_on(shard, request, batch);
    let mut sums = on_each(shards, &run, &task, request.part)?.into_iter();
    let (mut gatherer, mut multiply_adds) = sums.next().expect("a walk has at least one shard");
    for (other, more) in sums {
        gatherer.merge(other)?;
        multiply_adds += more;
    }
    // Activations are not needed any more.
    allocator::give_back();
    Ok((gatherer, multiply_adds))
}

fn gather_on(shard: &mut DeviceShard, request: GatherRequest<'_>, batch: Batch<'_>) -> Result<(Gatherer, f64)> {
    let is_wanted = |layer: &&Layer| request.inputs.contains(layer.input());
    let layers = shard.part().layers().iter().filter(is_wanted);
    let names: Vec<String> = layers.clone().map(|layer| layer.name().to_owned()).collect();
    let mut gatherer = match shard.teacher {
        Some(_) => Gatherer::with_targets(layers, shard.device)?,
        None => Gatherer::new(layers, shard.device)?,
    };
    if request.inputs.len() == 1 {
        gatherer = gatherer.ending_early();
    }
    let mut multiply_adds = 0.0;
    for index in 0..shard.carries.len() {
        gatherer.hold_out(request.holds_out && is_held_out(index, shard.carries.len()), shard.held_out_vectors);
        gatherer.set_weight(shard.weights[index]);
        if let Some(teacher) = &mut shard.teacher {
            let (outputs, more) = teacher.outputs(index, request.scope, &names, request.teacher_advances)?;
            gatherer.set_targets(outputs);
            multiply_adds += more;
        }
        let carry = shard.carries.get(index)?;
        multiply_adds += forward::gather(shard.part(), request.scope, carry, &mut gatherer, &shard.overflows)?;
        batch.done()?;
    }
    if let Some(teacher) = &mut shard.teacher {
        teacher.set_ahead(request.teacher_advances);
    }
    Ok((gatherer, multiply_adds))
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
    let run = |shard: &mut DeviceShard, batch: Batch<'_>| -> Result<f64> {
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
            batch.done()?;
        }
        Ok(multiply_adds)
    };
    Ok(on_each(shards, &run, &task, part)?.into_iter().sum())
}

/// Where a device reports its batches.
#[derive(Clone, Copy)]
struct Batch<'a> {
    task: &'a Task<'a>,
    part: &'a str,
    /// The device's place in the run's list.
    device: usize,
}

impl Batch<'_> {
    /// Reports that a batch is done; an error if the run has to stop.
    fn done(self) -> Result<()> {
        self.task.sample(self.part, self.device);
        self.task.go_on()
    }
}

/// Runs something on every shard, each in a thread of its own where there are several. Every thread
/// reports each of its batches, so that progress counts them all and all threads stop when the run
/// has to stop.
fn on_each<T: Send>(
    shards: &mut [DeviceShard],
    run: &(dyn Fn(&mut DeviceShard, Batch<'_>) -> Result<T> + Sync),
    task: &Task<'_>,
    part: &str,
) -> Result<Vec<T>> {
    let (first, others) = shards.split_first_mut().expect("a walk has at least one shard");
    std::thread::scope(|scope| {
        let batch = |device| Batch { task, part, device };
        let others = others.iter_mut().zip(1..);
        let threads: Vec<_> = others.map(|(shard, device)| scope.spawn(move || run(shard, batch(device)))).collect();
        let mut results = vec![run(first, batch(0))?];
        for thread in threads {
            results.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(results)
    })
}
