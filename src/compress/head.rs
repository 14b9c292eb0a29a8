//! The layers before the first stage: calibrated like those of stages, though nothing but they has to run for it.

use tch::{Kind, Tensor};

use super::gather::DenseOutputs;
use super::lane::{On, seen_enough, take_over};
use super::{Gathered, Gatherer, Job, Workspace, placement};
use crate::calibration::{Samples, is_held_out};
use crate::checkpoint::Blueprint;
use crate::error::Result;
use crate::model::unet::{Conditioning, Head, HeadInput};
use crate::model::{Layer, Observer};
use crate::progress::{Progress, Task};

/// The head with its weights as they are stored so far, and the dense one, where layers aim at its outputs.
struct Heads {
    stored: Head,
    dense: Option<Head>,
}

impl Job<'_> {
    /// Treats the layers before the first stage, each on what has become of those before it.
    pub(super) fn head(&self, samples: &Samples, finished: &mut Workspace, progress: &dyn Progress) -> Result<()> {
        const NAME: &str = "head";
        let outline = self.chain.load_head(&Blueprint::default())?;
        self.treat_alone(NAME, outline.layers(), finished, progress)?;
        // What is sent into the first stage has to go through all of them as they are stored.
        finished.flush()?;
        if outline.layers().iter().all(|layer| !self.needs_hessian(layer) || finished.has(layer.name())) {
            return Ok(());
        }
        let source = On { source: self.source, device: self.devices[0] };
        let load = || self.chain.load_head(&source);
        let mut heads = Heads { stored: load()?, dense: self.sequencing.has_dense_target().then(load).transpose()? };
        for layer in outline.layers().iter().filter(|layer| self.needs_hessian(layer)) {
            take_over(heads.stored.layers_mut(), finished, &|_| true)?;
            if finished.has(layer.name()) {
                continue;
            }
            let gatherer = self.gather_head(&heads, layer, samples, progress)?;
            let task = Task::begin(progress, "layers", "layers", 1);
            self.treat_input(NAME, (&[layer], false), layer.input(), Gathered::all(&gatherer, layer.input()), finished, &task)?;
            finished.flush()?;
        }
        Ok(())
    }

    /// What a layer of the head is given: of timesteps all there are, of conditionings each once, of latents those of the samples.
    fn gather_head(&self, heads: &Heads, layer: &Layer, samples: &Samples, progress: &dyn Progress) -> Result<Gatherer> {
        let device = self.devices[0];
        let only = std::iter::once(layer);
        let gatherer = match heads.dense {
            Some(_) => Gatherer::aiming(only, device)?,
            None => Gatherer::new(only, device)?,
        };
        let mut gatherer = gatherer.hasty();
        let sees = heads.stored.sees(layer.name());
        if sees == HeadInput::Time {
            // All that SDXL has go at once; a model trained on many more would take much memory so.
            const AT_ONCE: i64 = 1000;
            for first in (0..self.timesteps as i64).step_by(AT_ONCE as usize) {
                let end = (first + AT_ONCE).min(self.timesteps as i64);
                let times = Tensor::f_arange_start(first, end, (Kind::Float, device))?;
                heads.show(layer, &mut gatherer, &|head, observer| head.embed_times(&times, self.kind, observer))?;
            }
            return Ok(gatherer);
        }
        let mut calls: Vec<usize> = (0..samples.calls.len()).collect();
        if sees == HeadInput::Conditioning {
            let told = |index: &usize| &samples.calls[*index].conditioning;
            calls.dedup_by(|call, before| same(told(call), told(before)));
        }
        let task = Task::begin(progress, "Hessians", "samples", calls.len());
        for (number, index) in calls.iter().enumerate() {
            task.go_on()?;
            task.advance(layer.name());
            gatherer.hold_out(self.guards() && is_held_out(number, calls.len()));
            gatherer.weigh(self.weights.get(*index).copied().unwrap_or(1.0));
            let call = samples.calls[*index].placed(placement(device, self.kind))?;
            heads.show(layer, &mut gatherer, &|head, observer| {
                head.forward(&call.sample, call.timestep, &call.conditioning, observer).map(|carry| carry.hidden_states)
            })?;
        }
        Ok(gatherer)
    }
}

impl Heads {
    /// Runs both as far as the layer's outputs, the dense one first.
    fn show(
        &self,
        layer: &Layer,
        gatherer: &mut Gatherer,
        run: &dyn Fn(&Head, &mut dyn Observer) -> Result<Tensor>,
    ) -> Result<()> {
        if let Some(dense) = &self.dense {
            let mut outputs = DenseOutputs::of(vec![layer.name().to_owned()], true);
            seen_enough(run(dense, &mut outputs))?;
            gatherer.aim_at(outputs);
        }
        seen_enough(run(&self.stored, gatherer))
    }
}

/// Whether two calls are told the same.
fn same(a: &Conditioning, b: &Conditioning) -> bool {
    let equal = |a: &Tensor, b: &Tensor| a == b;
    equal(&a.text_embeds, &b.text_embeds) && equal(&a.time_ids, &b.time_ids)
}
