//! The input block: its calibration, and the first carries that it makes of samples.
//!
//! Nothing but the input block itself has to run to calibrate its layers. Layers that depend on the
//! timestep alone see every timestep, layers of text and sizes see each of them once, and conv_in
//! sees the latents of all samples.

use std::collections::BTreeSet;

use sdxl_model::unet::{Carry, Conditioning, InputBlock, InputBlockDependency};
use sdxl_model::{Layer, LayerInput, Observer, Unobserved};
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::elementwise::silu;
use tch::{Device, Kind, Tensor};

use super::dense_outputs::DenseOutputs;
use super::forward::unless_ended_early;
use super::gather::{Gatherer, HELD_OUT_VECTORS};
use super::job::{Calibration, Machine, Model};
use super::shard::{DeviceShard, OnDevice, install};
use super::statistics::Counter;
use super::watcher::{BatchUse, Watched, Watcher};
use super::workspace::Workspace;
use crate::calibration::{Sample, is_held_out};

/// The input block with its weights as stored so far, and the dense one where it is the target.
pub(super) struct CalibratedInputBlock {
    stored: InputBlock,
    dense: Option<InputBlock>,
    device: Device,
}

impl CalibratedInputBlock {
    /// Loads the input block on `device`.
    pub(super) fn load(model: Model<'_>, device: Device, has_teacher: bool) -> Result<Self> {
        let source = OnDevice { source: model.source, device };
        let load = || model.chain.load_input_block(&source);
        let dense = if has_teacher { Some(load()?) } else { None };
        Ok(CalibratedInputBlock { stored: load()?, dense, device })
    }

    /// Gives `layers` their stored weights, as far as `store` has them.
    pub(super) fn install(&mut self, layers: &BTreeSet<String>, store: &Workspace) -> Result<()> {
        install(self.stored.layers_mut(), store, &mut |name| layers.contains(name))
    }

    /// Gathers the Hessian of the input of `layer`; returns multiply-adds too.
    pub(super) fn gather(
        &self,
        layer: &Layer,
        calibration: Calibration<'_>,
        machine: Machine<'_>,
        holds_out: bool,
        progress: &dyn Progress,
    ) -> Result<(Gatherer, f64)> {
        let only = std::iter::once(layer);
        let mut gatherer = match self.dense {
            Some(_) => Gatherer::with_targets(only, self.device)?,
            None => Gatherer::new(only, self.device)?,
        };
        let mut multiply_adds = 0.0;
        let dependency = self.stored.dependency_of(layer.name());
        if dependency == InputBlockDependency::Time {
            // All timesteps of SDXL at once; a model trained on many more would take too much
            // memory.
            const AT_ONCE: usize = 1000;
            // All calls have one guidance scale.
            let call = calibration.samples.calls.first();
            let guidance = call.and_then(|call| call.conditioning.timestep_cond.as_ref());
            let guidance = match guidance {
                Some(rows) => Some(rows.f_narrow(0, 0, 1)?.f_to_device(self.device)?),
                None => None,
            };
            for times in calibration.timesteps.chunks(AT_ONCE) {
                let times = Tensor::f_from_slice(times)?.f_to_kind(Kind::Float)?.f_to_device(self.device)?;
                let all_alike = BatchUse::Summed { weight: 1.0 };
                multiply_adds += self.run_twins(layer, &mut gatherer, all_alike, &|input_block, observer| {
                    input_block.embed_times(&times, guidance.as_ref(), machine.kind, observer)
                })?;
            }
            return Ok((gatherer, multiply_adds));
        }
        let calls = &calibration.samples.calls;
        let mut chosen: Vec<usize> = (0..calls.len()).collect();
        if dependency == InputBlockDependency::Conditioning {
            chosen.dedup_by(|call, before| embeds_same(&calls[*call].conditioning, &calls[*before].conditioning));
        }
        let task = Task::begin(progress, "Hessians", "samples", chosen.len());
        for (number, index) in chosen.iter().enumerate() {
            task.go_on()?;
            task.advance(layer.name());
            let batch_use = match holds_out && is_held_out(number, chosen.len()) {
                true => BatchUse::HeldOut { vectors: HELD_OUT_VECTORS },
                false => BatchUse::Summed { weight: calibration.weight(*index) },
            };
            let call = calls[*index].placed(machine.placement(self.device))?;
            multiply_adds += self.run_twins(layer, &mut gatherer, batch_use, &|input_block, observer| {
                Ok(first_carry(input_block, &call, observer)?.hidden_states)
            })?;
        }
        Ok((gatherer, multiply_adds))
    }

    /// Runs the dense block, if there is one, and then the stored one, each as far as the output of
    /// `layer`.
    fn run_twins(
        &self,
        layer: &Layer,
        gatherer: &mut Gatherer,
        batch_use: BatchUse,
        run: &dyn Fn(&InputBlock, &mut dyn Observer) -> Result<Tensor>,
    ) -> Result<f64> {
        let (mut targets, mut multiply_adds) = (DenseOutputs::default(), 0.0);
        if let Some(dense) = &self.dense {
            targets = DenseOutputs::of(vec![layer.name().to_owned()]).ending_early();
            let mut counter = Counter::of(&mut targets);
            unless_ended_early(run(dense, &mut counter))?;
            multiply_adds += counter.multiply_adds;
        }
        let watched = Watched::of([layer], self.dense.is_some()).ending_early();
        let mut take = |seen| gatherer.add_seen(seen);
        let mut watcher = Watcher::new(&watched, batch_use, targets, &mut take);
        let mut counter = Counter::of(&mut watcher);
        unless_ended_early(run(&self.stored, &mut counter))?;
        Ok(multiply_adds + counter.multiply_adds)
    }

    /// Makes the first carry of a batch of `calls` of equal `weight` for `shard`, and adds text
    /// states and SiLU(temb) to `shared`, which may be on another device. Returns multiply-adds.
    pub(super) fn begin(
        &self,
        shard: &mut DeviceShard,
        calls: &[Sample],
        weight: f64,
        machine: Machine<'_>,
        shared: &mut Gatherer,
        task: &Task<'_>,
    ) -> Result<f64> {
        let mut counted = Unobserved;
        let mut counter = Counter::of(&mut counted);
        let (mut carries, mut dense_carries) = (Vec::new(), Vec::new());
        for call in calls {
            task.go_on()?;
            task.advance("head");
            let call = call.placed(machine.placement(self.device))?;
            let carry = first_carry(&self.stored, &call, &mut counter)?;
            shared.add(&LayerInput::Text, &carry.encoder_hidden_states)?;
            shared.add(&LayerInput::Time, &silu(&carry.temb)?)?;
            carries.push(carry);
            if let Some(dense) = &self.dense {
                dense_carries.push(first_carry(dense, &call, &mut counter)?);
            }
        }
        let dense = if dense_carries.is_empty() { None } else { Some(Carry::join(&dense_carries)?) };
        shard.push(Carry::join(&carries)?, dense, weight)?;
        Ok(counter.multiply_adds)
    }
}

fn first_carry(input_block: &InputBlock, call: &Sample, observer: &mut dyn Observer) -> Result<Carry> {
    input_block.forward(&call.sample, call.timestep, &call.conditioning, observer)
}

/// Whether two calls have the same pooled text, time ids and guidance scale.
fn embeds_same(a: &Conditioning, b: &Conditioning) -> bool {
    let is_equal = |a: &Tensor, b: &Tensor| a == b;
    is_equal(&a.text_embeds, &b.text_embeds)
        && is_equal(&a.time_ids, &b.time_ids)
        && a.timestep_cond.as_ref() == b.timestep_cond.as_ref()
}
