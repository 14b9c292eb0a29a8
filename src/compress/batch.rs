//! Layers of one shape pruned together, for devices that have too little to do with one at a time.

use tch::Tensor;

use super::{Evidence, Gatherer, Job, Workspace, finish};
use crate::error::{Error, Result};
use crate::model::{Layer, LayerInput};
use crate::plan::of_batch;
use crate::progress::Task;
use crate::solver::{Factor, Hessian, PruneOptions, prune_many};

/// Layers of one shape, each with its Hessian, that are pruned in the same way.
struct Batch<'a> {
    options: PruneOptions,
    layers: Vec<(&'a Layer, &'a Hessian)>,
}

impl Job<'_> {
    /// Treats those of `layers` whose inputs were gathered in this wave and that [can go in batches](super::LayerRecipe::in_batches); the others
    /// are left as they are.
    pub(super) fn treat_batches(
        &self,
        part: &str,
        layers: &[&Layer],
        wave: &[LayerInput],
        gatherer: &Gatherer,
        finished: &mut Workspace,
        task: &Task,
    ) -> Result<()> {
        for Batch { options, layers } in self.batches(layers, wave, gatherer, finished) {
            let (first, _) = layers[0];
            let most = self.plan.batch_bytes / of_batch(first.kind(), &first.weight().size()).max(1);
            for layers in layers.chunks(most.max(1) as usize) {
                self.treat_batch(part, layers, &options, finished, task)?;
            }
        }
        // So that it is known what is left.
        finished.flush()
    }

    /// What goes together, in the order of the layers.
    fn batches<'a>(
        &self,
        layers: &[&'a Layer],
        wave: &[LayerInput],
        gatherer: &'a Gatherer,
        finished: &Workspace,
    ) -> Vec<Batch<'a>> {
        let mut batches: Vec<Batch<'a>> = Vec::new();
        for layer in layers.iter().filter(|layer| wave.contains(layer.input()) && !finished.has(layer.name())) {
            let options = self.recipes.get(layer.name()).and_then(|recipe| recipe.batch_options());
            let hessian = gatherer.hessian(layer.input()).filter(|hessian| hessian.groups() == 1);
            let (Some(options), Some(hessian)) = (options, hessian) else { continue };
            let same =
                |batch: &&mut Batch| batch.options == *options && batch.layers[0].0.weight().size() == layer.weight().size();
            match batches.iter_mut().find(same) {
                Some(batch) => batch.layers.push((layer, hessian)),
                None => batches.push(Batch { options: *options, layers: vec![(layer, hessian)] }),
            }
        }
        batches
    }

    fn treat_batch(
        &self,
        part: &str,
        layers: &[(&Layer, &Hessian)],
        options: &PruneOptions,
        finished: &mut Workspace,
        task: &Task,
    ) -> Result<()> {
        task.go_on()?;
        // Layers of the same input share a factor.
        let mut factors: Vec<(&LayerInput, Factor)> = Vec::new();
        for (layer, hessian) in layers {
            if !factors.iter().any(|(input, _)| *input == layer.input()) {
                let factor = Factor::new(hessian, 0, options.dampening).map_err(Error::layer(layer.name()))?;
                factors.push((layer.input(), factor));
            }
        }
        let weights = layers.iter().map(|(layer, _)| self.weight_of(layer, false)).collect::<Result<Vec<Tensor>>>()?;
        let with_factor = layers.iter().zip(&weights).filter_map(|((layer, hessian), weight)| {
            let (_, factor) = factors.iter().find(|(input, _)| *input == layer.input())?;
            Some((weight, *hessian, factor))
        });
        let pruned = prune_many(&with_factor.collect::<Vec<_>>(), options).map_err(Error::layer(layers[0].0.name()))?;
        for (((layer, hessian), weight), pruned) in layers.iter().zip(&weights).zip(&pruned) {
            task.go_on()?;
            task.advance(layer.name());
            let Some(recipe) = self.recipes.get(layer.name()) else { continue };
            let calibrated =
                Evidence { hessian, pruned: Some(pruned), factors: None, joint: None, correction: None, held_out: None };
            finish(part, layer.name(), weight, recipe, Some(calibrated), finished, task)?;
        }
        Ok(())
    }
}
