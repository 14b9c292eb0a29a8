//! Layers of one shape pruned together, for GPUs without kernels, on which each operation of a
//! single layer would be too small.

use sdxl_model::{Layer, LayerInput};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Task;
use squeeze_codebook::PruneOptions;
use squeeze_solver::{Factor, Hessian, prune_many};
use tch::Tensor;

use super::gather::Gatherer;
use super::layer::Evidence;
use super::one_layer::compress_layer;
use super::problem::Solved;
use super::solve::Compressor;
use super::walk::Walk;
use crate::geometry::input_geometry;
use crate::plan::{Stop, batched_layer_bytes};

/// Layers of one shape, each with its Hessian, that are pruned with the same options.
struct Batch<'a> {
    options: PruneOptions,
    layers: Vec<(&'a Layer, &'a Hessian)>,
}

impl Compressor<'_> {
    /// Compresses the stop's layers that [can be pruned in
    /// batches](crate::recipe::LayerRecipe::batch_options) and leaves the others as they are.
    pub(super) fn solve_batches(&mut self, stop: &Stop, gatherer: &Gatherer, walk: &Walk<'_>, task: &Task<'_>) -> Result<()> {
        for Batch { options, layers } in self.batches(walk.layers_of(stop), gatherer) {
            let (first, _) = layers[0];
            let most = self.team.spare_bytes / batched_layer_bytes(input_geometry(first), &first.weight().size()).max(1);
            for layers in layers.chunks(most.max(1) as usize) {
                self.solve_batch(stop, layers, &options, walk, task)?;
            }
        }
        // Layers count as compressed once they are on their way to the disk.
        self.store.hand_over()
    }

    /// The batches, in the order of their first layers.
    fn batches<'a>(&self, layers: Vec<&'a Layer>, gatherer: &'a Gatherer) -> Vec<Batch<'a>> {
        let mut batches: Vec<Batch<'a>> = Vec::new();
        for layer in layers.into_iter().filter(|layer| self.is_open(layer, true)) {
            let options = self.recipe(layer).batch_options();
            let hessian = gatherer.hessian(layer.input()).filter(|hessian| hessian.groups() == 1);
            let (Some(options), Some(hessian)) = (options, hessian) else { continue };
            let is_alike =
                |batch: &&mut Batch| batch.options == *options && batch.layers[0].0.weight().size() == layer.weight().size();
            match batches.iter_mut().find(is_alike) {
                Some(batch) => batch.layers.push((layer, hessian)),
                None => batches.push(Batch { options: *options, layers: vec![(layer, hessian)] }),
            }
        }
        batches
    }

    fn solve_batch(
        &mut self,
        stop: &Stop,
        layers: &[(&Layer, &Hessian)],
        options: &PruneOptions,
        walk: &Walk<'_>,
        task: &Task<'_>,
    ) -> Result<()> {
        task.go_on()?;
        // Layers of one input share a factor.
        let mut factors: Vec<(&LayerInput, Factor)> = Vec::new();
        for (layer, hessian) in layers {
            if !factors.iter().any(|(input, _)| *input == layer.input()) {
                let factor = Factor::new(hessian, 0, options.dampening).map_err(Error::layer(layer.name()))?;
                factors.push((layer.input(), factor));
            }
        }
        let weights = layers.iter().map(|(layer, _)| walk.dense_weight(layer)).collect::<Result<Vec<Tensor>>>()?;
        let problems = layers.iter().zip(&weights).map(|((layer, hessian), weight)| {
            let factor = factors.iter().find(|(input, _)| *input == layer.input());
            let (_, factor) = factor.expect("a factor was made for every input of the batch");
            (weight, *hessian, factor)
        });
        let pruned = prune_many(&problems.collect::<Vec<_>>(), options).map_err(Error::layer(layers[0].0.name()))?;
        for (((layer, hessian), weight), pruned) in layers.iter().zip(&weights).zip(&pruned) {
            task.go_on()?;
            task.advance(layer.name());
            let evidence = Evidence { pruned: Some(pruned), ..Evidence::of(hessian) };
            let compressed = tracing::debug_span!("layer")
                .in_scope(|| compress_layer(layer.name(), weight, self.recipe(layer), Some(evidence)))?;
            self.add(stop, layer, Solved { compressed, vectors: Some(hessian.vectors()) }, task)?;
        }
        Ok(())
    }
}
