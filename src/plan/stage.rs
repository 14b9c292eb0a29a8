//! One stage: which Hessians are gathered together, what that takes and what it computes.

use serde::Serialize;

use super::memory::{Memory, working_set};
use super::size::stored_bytes;
use super::work::Work;
use crate::calibration::Calls;
use crate::error::{Error, Result};
use crate::model::unet::{CarryShape, Stage, StageName};
use crate::model::{Layer, LayerInput, LayerKind};
use crate::number;
use crate::recipe::{LayerRecipe, LayerRecipes, Sequencing};
use crate::solver::{Correction, Hessian};

/// What will happen in a stage.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    /// The stage's name.
    pub name: String,
    /// Its Conv2d and Linear layers.
    pub layers: usize,
    /// Of these, pruned.
    pub pruned: usize,
    /// Of these, palettized.
    pub palettized: usize,
    /// Elements of its weights.
    pub elements: u64,
    /// Bytes of its treated weights in the container.
    pub stored_bytes: u64,
    /// Bytes of its weights in memory while it runs.
    pub resident_bytes: u64,
    /// Bytes of all its Hessians.
    pub hessian_bytes: u64,
    /// The inputs whose Hessians are gathered in one pass over the samples, pass by pass.
    #[serde(skip)]
    pub waves: Vec<Vec<LayerInput>>,
    /// How many passes that are.
    pub passes: usize,
    /// The most bytes at once.
    pub peak_bytes: u64,
    /// What it computes.
    pub work: Work,
}

/// Triangles of a Hessian's size that treating a layer takes besides it: the factor; for the joint solver the damped Hessian too, and
/// while its columns are put in another order a whole matrix.
fn triangles(recipe: &LayerRecipe) -> u64 {
    match (recipe.joint.is_some(), &recipe.prune) {
        (false, _) => 1,
        (true, Some(_)) => 2,
        (true, None) => 4,
    }
}

/// A stage to plan.
pub(super) struct Outline<'a> {
    pub name: StageName,
    /// Built without weights.
    pub stage: &'a Stage,
    pub layers: &'a [Layer],
    pub sequencing: Sequencing,
    /// How many calls are in one batch.
    pub joined: i64,
    pub resident_bytes: u64,
    pub before: CarryShape,
    pub after: CarryShape,
}

/// A layer that needs a Hessian, with those that share it.
struct Need<'a> {
    input: &'a LayerInput,
    layers: Vec<(&'a Layer, &'a LayerRecipe)>,
    bytes: u64,
}

impl Outline<'_> {
    /// Height and width of what a layer is given, or 1 and the number of vectors; for each item of the batch.
    fn places(&self, layer: &Layer, calls: &Calls) -> [i64; 2] {
        match layer.input() {
            LayerInput::Text => [1, calls.text],
            LayerInput::Time => [1, 1],
            // Features are upsampled before the convolution.
            LayerInput::Features(name) if name.contains(".upsamplers.") => self.after.grid(),
            LayerInput::Features(_) => self.before.grid(),
        }
    }

    /// Multiply-adds of running the stage once.
    fn forward<'b>(&self, layers: impl Iterator<Item = &'b Layer>, calls: &Calls) -> f64 {
        let one = |layer: &Layer| {
            let [height, width] = self.places(layer, calls);
            let places = match layer.kind() {
                LayerKind::Linear => height * width,
                LayerKind::Conv2d(geometry) => (height / geometry.stride[0]).max(1) * (width / geometry.stride[1]).max(1),
            };
            let weight = layer.weight().size();
            let dense = places as f64 * weight.iter().product::<i64>() as f64;
            // Queries meet keys and values.
            let others = match layer.name() {
                name if name.ends_with("attn1.to_q") => height * width,
                name if name.ends_with("attn2.to_q") => calls.text,
                _ => 0,
            };
            dense + 2.0 * (height * width * others * weight.first().copied().unwrap_or(0)) as f64
        };
        calls.batch as f64 * layers.map(one).sum::<f64>()
    }

    /// The same for each sample, all passes together.
    fn forwards(&self, needs: &[Need<'_>], waves: usize, calls: &Calls) -> f64 {
        let Sequencing::Sublayer { dense_target } = self.sequencing else {
            return (waves + 1) as f64 * self.forward(self.layers.iter(), calls);
        };
        let of_unit = |unit: usize| {
            let here = |layer: &&Layer| self.stage.unit_has(unit, layer.name());
            let gathered = |need: &&Need| matches!(need.input, LayerInput::Features(_)) && here(&need.layers[0].0);
            // A pass ends with the last layer of its input.
            let until = |need: &Need| {
                let last = need.layers.last().map_or("", |(layer, _)| layer.name());
                let at = self.layers.iter().position(|layer| layer.name() == last).map_or(0, |at| at + 1);
                self.forward(self.layers[..at].iter().filter(here), calls)
            };
            let passes: Vec<f64> = needs.iter().filter(gathered).map(until).collect();
            let all = passes.iter().sum::<f64>() + self.forward(self.layers.iter().filter(here), calls);
            // The dense network's last pass goes all the way.
            if dense_target { 2.0 * all - passes.last().unwrap_or(&0.0) } else { all }
        };
        (0..self.stage.units()).map(of_unit).sum::<f64>()
    }

    fn needs<'a>(&'a self, recipes: &'a LayerRecipes) -> Vec<Need<'a>> {
        let mut needs: Vec<Need> = Vec::new();
        for layer in self.layers {
            let Some(recipe) = recipes.get(layer.name()).filter(|recipe| recipe.needs_hessian()) else { continue };
            match needs.iter_mut().find(|need| need.input == layer.input()) {
                Some(need) => need.layers.push((layer, recipe)),
                None => needs.push(Need {
                    input: layer.input(),
                    layers: vec![(layer, recipe)],
                    bytes: Hessian::bytes(layer.kind(), &layer.weight().size()),
                }),
            }
            if let (Some(need), true) =
                (needs.iter_mut().find(|need| need.input == layer.input()), self.sequencing.has_dense_target())
            {
                need.bytes += Correction::bytes(&layer.weight().size());
            }
        }
        needs
    }

    /// Bytes of the largest activations of one call, with what a convolution makes of them.
    fn activations(&self, calls: &Calls, memory: &Memory) -> u64 {
        let largest = self.layers.iter().map(|layer| {
            let [height, width] = self.places(layer, calls);
            let size = layer.weight().size();
            let channels: i64 = size.iter().take(2).sum();
            let weight: i64 = size.iter().product();
            4 * calls.batch * height * width * channels + 2 * weight
        });
        memory.element_bytes * largest.max().unwrap_or(0).unsigned_abs()
    }

    /// Plans the stage; `carries` are the bytes of recorded carries that lie in memory.
    pub fn plan(&self, recipes: &LayerRecipes, calls: Option<&Calls>, memory: &Memory, carries: u64) -> Result<StagePlan> {
        let treated = || self.layers.iter().filter_map(|layer| Some((layer, recipes.get(layer.name())?)));
        let needs = if calls.is_some() { self.needs(recipes) } else { Vec::new() };
        let mut plan = StagePlan {
            name: self.name.to_string(),
            layers: self.layers.len(),
            pruned: treated().filter(|(_, recipe)| recipe.prune.is_some()).count(),
            palettized: treated().filter(|(_, recipe)| recipe.palettize.is_some()).count(),
            elements: self.layers.iter().map(|layer| layer.weight().numel() as u64).sum(),
            stored_bytes: treated().map(|(layer, recipe)| stored_bytes(&layer.weight().size(), recipe)).sum(),
            resident_bytes: self.resident_bytes,
            hessian_bytes: needs.iter().map(|need| need.bytes).sum(),
            waves: Vec::new(),
            passes: 0,
            peak_bytes: 0,
            work: Work::default(),
        };
        for (layer, recipe) in treated() {
            if recipe.palettize.is_some() {
                plan.work.palettized += layer.weight().numel() as f64;
            }
        }
        let largest = |layers: &mut dyn Iterator<Item = (&Layer, &LayerRecipe)>| {
            layers.map(|(layer, recipe)| working_set(&layer.weight().size(), recipe.joint.is_some())).max().unwrap_or(0)
        };
        let Some(calls) = calls else {
            plan.peak_bytes = memory.fixed() + largest(&mut treated());
            return Ok(plan);
        };

        // What is there in any case: the stage, the carries, one call under way.
        let calls = &Calls { batch: calls.batch * self.joined, ..*calls };
        let carry = 2 * memory.element_bytes * (calls.batch * self.before.numel().max(self.after.numel())).unsigned_abs();
        let runs = if self.sequencing.has_dense_target() { 2 } else { 1 };
        let loaded = runs * self.resident_bytes;
        // While layers are treated the stage is not loaded, unless others wait for what becomes of them.
        let resting = if self.sequencing == Sequencing::Stage { 0 } else { loaded };
        let fixed = memory.fixed() + carries + carry;
        let activations = self.activations(calls, memory);
        let calls = &Calls { batch: calls.batch / self.joined, ..*calls };
        // A factor stands beside the wave's Hessians while its layers are treated.
        let treating = |need: &Need| {
            let (layer, _) = need.layers[0];
            let set = largest(&mut need.layers.iter().copied());
            let triangles = need.layers.iter().map(|(_, recipe)| triangles(recipe)).max().unwrap_or(0);
            set + triangles * Hessian::factor_bytes(layer.kind(), &layer.weight().size())
        };
        let at_once = |bytes: u64, treating: u64| fixed + bytes + (loaded + activations).max(resting + treating);
        let mut wave = (0, 0);
        let mut peak = fixed + loaded + activations;
        let mut waves: Vec<Vec<LayerInput>> = Vec::new();
        for need in needs.iter().filter(|need| matches!(need.input, LayerInput::Features(_))) {
            let alone = at_once(need.bytes, treating(need));
            if alone > memory.usable() {
                return Err(Error::Argument(format!(
                    "{} of memory are too little for stage `{}`: {} needs {}",
                    number::size(memory.budget),
                    self.name,
                    need.layers[0].0.name(),
                    number::size(alone)
                )));
            }
            let (bytes, most) = (wave.0 + need.bytes, treating(need).max(wave.1));
            match waves.last_mut() {
                Some(inputs) if self.sequencing == Sequencing::Stage && at_once(bytes, most) <= memory.usable() => {
                    inputs.push(need.input.clone());
                    wave = (bytes, most);
                }
                _ => {
                    waves.push(vec![need.input.clone()]);
                    wave = (need.bytes, treating(need));
                }
            }
            peak = peak.max(at_once(wave.0, wave.1));
        }
        // Text and time have their Hessians all along.
        for need in needs.iter().filter(|need| !matches!(need.input, LayerInput::Features(_))) {
            peak = peak.max(at_once(0, treating(need)));
        }
        for need in &needs {
            let (layer, _) = need.layers[0];
            let size = layer.weight().size();
            let d = size.iter().skip(1).product::<i64>() as f64;
            let of_this_input = match need.input {
                // Summed once for the whole UNet.
                LayerInput::Text | LayerInput::Time => 0.0,
                LayerInput::Features(_) => Hessian::work(layer.kind(), &size, self.places(layer, calls)),
            };
            plan.work.hessians += calls.count as f64 * calls.batch as f64 * of_this_input;
            // The joint solver wants the inverse's diagonal, too.
            let factors = if need.layers.iter().any(|(_, recipe)| recipe.joint.is_some()) { 2.0 } else { 1.0 };
            plan.work.factors += factors * d.powi(3) / 6.0;
            let rows: i64 = need.layers.iter().filter_map(|(layer, _)| layer.weight().size().first().copied()).sum();
            plan.work.sweeps += 1.5 * rows as f64 * d * d;
            for (layer, effort) in need.layers.iter().filter_map(|(layer, recipe)| Some((layer, recipe.joint?))) {
                let rows = layer.weight().size().first().copied().unwrap_or(0);
                plan.work.sweeps += effort.products() * rows as f64 * d * d;
            }
        }
        // Also where nothing in it is calibrated: the samples go through.
        if peak > memory.usable() {
            let (budget, needed) = (number::size(memory.budget), number::size(peak));
            return Err(Error::Argument(format!(
                "{budget} of memory are too little for stage `{}`, which needs {needed}",
                self.name
            )));
        }
        plan.work.forward = calls.count as f64 * self.forwards(&needs, waves.len(), calls);
        plan.passes = waves.len();
        plan.waves = waves;
        plan.peak_bytes = peak;
        Ok(plan)
    }
}
