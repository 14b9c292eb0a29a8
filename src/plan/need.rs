//! An input whose Hessian is needed.

use sdxl_model::{Layer, LayerInput};
use squeeze_solver::{Hessian, OutputResidual};
use tch::Device;

use super::memory::{Memory, triangles, working_set};
use super::work::Work;
use crate::geometry::input_geometry;
use crate::recipe::LayerRecipe;

/// An input whose Hessian is needed, with the layers that share it.
#[derive(Debug)]
pub(super) struct Need<'a> {
    pub input: &'a LayerInput,
    /// At least one layer, in execution order.
    pub layers: Vec<(&'a Layer, &'a LayerRecipe)>,
    /// Bytes of the Hessian, and of the output residuals where layers have a dense target.
    pub bytes: u64,
}

impl<'a> Need<'a> {
    /// The inputs of `layers` whose Hessians are needed, in the order of their first layers.
    pub(super) fn of(layers: impl Iterator<Item = (&'a Layer, &'a LayerRecipe)>, has_dense_target: bool) -> Vec<Self> {
        let mut needs: Vec<Need> = Vec::new();
        for (layer, recipe) in layers.filter(|(_, recipe)| recipe.needs_hessian()) {
            let size = layer.weight().size();
            let residual = if has_dense_target { OutputResidual::bytes(&size) } else { 0 };
            match needs.iter_mut().find(|need| need.input == layer.input()) {
                Some(need) => {
                    need.layers.push((layer, recipe));
                    need.bytes += residual;
                }
                None => needs.push(Need {
                    input: layer.input(),
                    layers: vec![(layer, recipe)],
                    bytes: Hessian::bytes(input_geometry(layer), &size) + residual,
                }),
            }
        }
        needs
    }

    /// The layer that is first given the input.
    pub(super) fn first(&self) -> &'a Layer {
        self.layers[0].0
    }

    /// The names of the layers.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.layers.iter().map(|(layer, _)| layer.name().to_owned())
    }

    /// Whether the samples have to run for this input alone.
    pub(super) fn is_gathered(&self) -> bool {
        match self.input {
            LayerInput::Features(_) => true,
            LayerInput::Text | LayerInput::Time => false,
        }
    }

    /// Bytes that solving the layers takes besides the Hessian, whose factor is made once for all
    /// of them.
    pub(super) fn solving_bytes(&self, device: Device) -> u64 {
        let set = self.layers.iter().map(|(layer, recipe)| working_set(&layer.weight().size(), recipe.joint.is_some(), device));
        set.max().unwrap_or(0) + self.factor_bytes(device)
    }

    /// Bytes of the factors that solving the layers takes.
    fn factor_bytes(&self, device: Device) -> u64 {
        let dimension = self.first().weight().size().iter().skip(1).product();
        let triangles = self.layers.iter().map(|(_, recipe)| triangles(recipe, device, dimension)).max().unwrap_or(0);
        triangles * Hessian::factor_bytes(input_geometry(self.first()), &self.first().weight().size())
    }

    /// Bytes of the input whose layers come next while others are solved: the Hessian, and the
    /// factors that its layers share.
    fn next_bytes(&self, device: Device) -> u64 {
        self.bytes + if self.layers.len() > 1 { self.factor_bytes(device) } else { 0 }
    }

    /// Work of summing the Hessian over `items` samples, each with a layer input of height and
    /// width `grid`, and of solving the layers.
    pub(super) fn work(&self, items: f64, grid: [i64; 2]) -> Work {
        let mut work = Work::default();
        let size = self.first().weight().size();
        let d = size.iter().skip(1).product::<i64>() as f64;
        if self.is_gathered() {
            work.hessians += items * Hessian::work(input_geometry(self.first()), &size, grid);
        }
        // The joint solver needs the diagonal of the inverse, too.
        let is_joint = self.layers.iter().any(|(_, recipe)| recipe.joint.is_some());
        work.factors += if is_joint { 2.0 } else { 1.0 } * d.powi(3) / 6.0;
        let rows = |layer: &Layer| layer.weight().size()[0] as f64;
        work.sweeps += 1.5 * self.layers.iter().map(|(layer, _)| rows(layer)).sum::<f64>() * d * d;
        for (layer, effort) in self.layers.iter().filter_map(|(layer, recipe)| Some((layer, recipe.joint?))) {
            work.sweeps += effort.products() * rows(layer) * d * d;
        }
        work
    }
}

/// Bytes in use at once where a stop gathers and solves, given what is there in any case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Bytes of the program, the carries and the samples under way.
    pub fixed: u64,
    /// Bytes of the part and its activations while samples run.
    pub running: u64,
    /// Bytes of the part that stay loaded while its layers are solved.
    pub resting: u64,
    /// The device that solves.
    pub device: Device,
    /// Whether Hessians leave the device after the pass, and come back when they are solved with.
    pub hessians_wait: bool,
}

impl Room {
    /// Bytes in use at once for `needs` gathered in one pass.
    pub(super) fn gathered(&self, needs: &[&Need<'_>]) -> u64 {
        let hessians = needs.iter().map(|need| need.bytes).sum::<u64>();
        let solving = |need: &&Need<'_>| need.solving_bytes(self.device);
        if self.hessians_wait {
            let one = needs.iter().map(|need| need.bytes + solving(need)).max().unwrap_or(0);
            let next = needs.iter().map(|need| need.next_bytes(self.device)).max().unwrap_or(0);
            return self.fixed + (self.running + hessians).max(self.resting + one + next);
        }
        self.at_once(hessians, needs.iter().map(solving).max().unwrap_or(0))
    }

    /// Bytes in use at once while samples run, and while layers are solved in `solving` bytes
    /// beside `hessians`.
    pub(super) fn at_once(&self, hessians: u64, solving: u64) -> u64 {
        self.fixed + hessians + self.running.max(self.resting + solving)
    }

    /// Whether `needs` can be gathered in one pass.
    pub(super) fn fits(&self, needs: &[&Need<'_>], memory: &Memory) -> bool {
        self.gathered(needs) <= memory.usable()
    }
}
