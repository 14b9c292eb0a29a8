//! How far an error of the prediction reaches the final latents, step by step.
//!
//! A sampler corrects most of what goes wrong early: the network sees the wrong latents and leads
//! back. How much is left depends on network, sampler and guidance, so that it is measured.

use sdxl_model::unet::{Conditioning, Unet};
use sdxl_pipeline::{Denoised, Guidance};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Task;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::judge::{Drawing, Probe, squared_difference};
use super::lesson::effective;

/// What errors of the prediction do, by the sampler's calls of the UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct Effects {
    /// The timestep of each call.
    pub timesteps: Vec<f64>,
    /// The squared error of the (guided) prediction in each call, ‖e‖².
    pub errors: Vec<f64>,
    /// The squared error of the final latents that comes from the one in each call.
    pub reached: Vec<f64>,
}

/// Measures the effects on `probes`.
///
/// Each picture is drawn by the dense network, and once more for each call: with the prediction of
/// the compressed network in that call, and those of the dense one in all others. Up to that call
/// both pictures are the same, so the dense network runs steps² / 2 times for each.
///
/// # Errors
/// If a network or the sampler cannot run.
pub fn effects(
    (dense, compressed): (&Unet<'_>, &Unet<'_>),
    drawing: Drawing<'_>,
    probes: &[Probe],
    task: &Task<'_>,
) -> Result<Effects> {
    let timesteps = drawing.scheduler.scheduler(drawing.steps)?.timesteps().to_vec();
    let mut effects = Effects { errors: vec![0.0; timesteps.len()], reached: vec![0.0; timesteps.len()], timesteps };
    for probe in probes {
        add((dense, compressed), drawing, probe, task, &mut effects)?;
    }
    Ok(effects)
}

/// Adds the effects on one picture.
fn add(
    (dense, compressed): (&Unet<'_>, &Unet<'_>),
    Drawing { scheduler, steps, shape, joined }: Drawing<'_>,
    Probe { guidance, seed }: &Probe,
    task: &Task<'_>,
    effects: &mut Effects,
) -> Result<()> {
    let calls = effects.timesteps.len();
    let like = &guidance.conditioning.encoder_hidden_states;
    // The last copy is the dense picture.
    let mut samplers = (0..=calls).map(|_| scheduler.scheduler(steps)).collect::<Result<Vec<_>>>()?;
    let mut generators: Vec<Generator> = (0..=calls).map(|_| Generator::new(*seed)).collect();
    let mut pictures = Vec::with_capacity(calls + 1);
    for (sampler, generator) in samplers.iter_mut().zip(&mut generators) {
        let noise = generator.draw(&shape, like.f_kind()?)?.f_to_device(like.device())?;
        pictures.push(Denoised::from_noise(sampler.as_mut(), guidance, &noise, generator)?);
    }
    for call in 0..calls {
        task.go_on()?;
        let timestep = effects.timesteps[call];
        task.advance(&format!("timestep {timestep:.0}"));
        // The copies whose error is behind them, and the dense picture.
        let apart: Vec<usize> = (0..call).chain([calls]).collect();
        let mut predictions = Vec::with_capacity(apart.len());
        for copies in apart.chunks(joined.max(1)) {
            let inputs = copies.iter().map(|copy| pictures[*copy].input(call)).collect::<Result<Vec<_>>>()?;
            predictions.extend(together(dense, &inputs, timestep, &guidance.conditioning)?);
        }
        let prediction = predictions.last().ok_or_else(|| Error::internal("the dense picture has a prediction"))?.shallow_clone();
        let wrong = compressed.predict(&pictures[calls].input(call)?, timestep, &guidance.conditioning)?;
        effects.errors[call] += squared_difference(&of(guidance, &wrong)?, &of(guidance, &prediction)?)?;
        for (copy, prediction) in apart.into_iter().zip(&predictions) {
            pictures[copy].step(call, prediction)?;
        }
        pictures[call].step(call, &wrong)?;
        for picture in &mut pictures[call + 1..calls] {
            picture.step(call, &prediction)?;
        }
    }
    for call in 0..calls {
        effects.reached[call] += squared_difference(pictures[call].latents(), pictures[calls].latents())?;
    }
    Ok(())
}

/// The predictions for several inputs of one conditioning.
fn together(unet: &Unet<'_>, inputs: &[Tensor], timestep: f64, conditioning: &Conditioning) -> Result<Vec<Tensor>> {
    if let [input] = inputs {
        return Ok(vec![unet.predict(input, timestep, conditioning)?]);
    }
    let each = vec![conditioning; inputs.len()];
    let joined = Conditioning::join(&each)?.ok_or_else(|| Error::internal("equal conditionings can be joined"))?;
    let rows = inputs[0].size4()?.0;
    let all = unet.predict(&Tensor::f_cat(inputs, 0)?, timestep, &joined)?;
    (0..inputs.len() as i64).map(|input| Ok(all.f_narrow(0, input * rows, rows)?)).collect()
}

/// The prediction that moves the latents.
fn of(guidance: &Guidance, prediction: &Tensor) -> Result<Tensor> {
    effective(prediction, prediction.size4()?.0, guidance.scale.unwrap_or(1.0))
}

impl Effects {
    /// How much the squared error of a call counts, by timestep: so that the sum over a trajectory
    /// is the error of the final latents, but for a `share`, in which the relative error of each
    /// call counts alike. Both are 1 at the start.
    ///
    /// The share keeps calls whose errors reach nothing on this sampler's timesteps from getting
    /// worse: another number of steps has others.
    #[must_use]
    pub fn weights(&self, share: f64) -> Vec<Weight> {
        let calls = self.errors.len() as f64;
        let total: f64 = self.reached.iter().sum();
        let least = self.errors.iter().copied().filter(|error| *error > 0.0).fold(f64::INFINITY, f64::min);
        let each = self.timesteps.iter().zip(self.errors.iter().zip(&self.reached)).map(|(timestep, (error, reached))| {
            // A call without an error has nothing to be measured by.
            let error = error.max(if least.is_finite() { least } else { 1.0 });
            let of_latents = if total > 0.0 { reached / (error * total) } else { 0.0 };
            Weight { timestep: *timestep, weight: (1.0 - share) * of_latents + share / (calls * error), error }
        });
        // Some samplers call the UNet twice at a timestep; these calls have the mean.
        let mut weights: Vec<(Weight, f64)> = Vec::new();
        for one in each {
            match weights.iter_mut().find(|(other, _)| other.timestep == one.timestep) {
                Some((sum, count)) => {
                    (sum.weight, sum.error, *count) = (sum.weight + one.weight, sum.error + one.error, *count + 1.0);
                }
                None => weights.push((one, 1.0)),
            }
        }
        let mean = |(sum, count): (Weight, f64)| Weight { weight: sum.weight / count, error: sum.error / count, ..sum };
        weights.into_iter().map(mean).collect()
    }
}

/// How much calls at a timestep count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weight {
    /// The timestep.
    pub timestep: f64,
    /// The factor of the squared error.
    pub weight: f64,
    /// The squared error at the start.
    pub error: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_to_the_error_of_the_latents_and_a_share_for_every_call() {
        let effects = Effects {
            timesteps: vec![900.0, 500.0, 500.0, 1.0],
            errors: vec![1.0, 2.0, 2.0, 4.0],
            reached: vec![0.0, 1.0, 1.0, 6.0],
        };
        for share in [0.0, 0.3, 1.0] {
            let weights = effects.weights(share);
            assert_eq!(weights.iter().map(|one| one.timestep).collect::<Vec<_>>(), [900.0, 500.0, 1.0]);
            assert_eq!(weights.iter().map(|one| one.error).collect::<Vec<_>>(), [1.0, 2.0, 4.0]);
            let all = weights[0].weight * 1.0 + weights[1].weight * 4.0 + weights[2].weight * 4.0;
            assert!((all - 1.0).abs() < 1e-12, "{all}");
            assert!((weights[0].weight - share / 4.0).abs() < 1e-12);
        }
        let exact = Effects { timesteps: vec![1.0], errors: vec![0.0], reached: vec![0.0] };
        assert!(exact.weights(0.3)[0].weight.is_finite());
    }
}
