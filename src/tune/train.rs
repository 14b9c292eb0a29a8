//! The loop: draws calls, takes steps, judges by the held-out prompts, keeps the best state.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use half::f16;
use sdxl_model::checkpoint::TensorSource;
use sdxl_model::unet::UnetChain;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::CompressedWeight;
use squeeze_numerics::device::Placement;
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::one_thread::OneThread;
use tch::{Kind, Tensor};

use super::adam::{Adam, schedule};
use super::backward::{Gradients, add_gradient};
use super::chances::Chances;
use super::judge::Judge;
use super::lesson::{Lesson, squared_errors};
use super::parameters::Parameters;
use super::state::{Log, State};
use crate::calibration::Sample;
use crate::config::TuneSection;
use crate::plan::JUDGED;

/// Judgements without a new best state after which training ends early.
const PATIENCE: usize = 3;
/// The longest time between two states that are kept.
const KEPT: Duration = Duration::from_secs(60);
/// The factor of the loss in fp16 at the start. It is halved where a gradient overflows, and
/// doubled after so many steps without (Micikevicius et al. 2018).
const LOSS_SCALE: f64 = 65_536.0;
const GROWS_AFTER: usize = 200;

/// What is trained, and how.
pub struct Training<'a> {
    /// The UNet's parts.
    pub chain: &'a UnetChain,
    /// What is learned.
    pub lessons: &'a [Lesson],
    /// What it is judged by.
    pub judge: &'a Judge<'a>,
    /// The guidance scale with which the two rows of a call become one prediction.
    pub guidance: f64,
    /// The settings.
    pub section: &'a TuneSection,
    /// Calls that go through the network together.
    pub joined: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// The result: what is stored, and how it came to be.
#[derive(Debug)]
pub struct Trained {
    /// By name: the values of palettes and vectors in the best state.
    pub values: BTreeMap<String, Vec<f16>>,
    /// What happened.
    pub log: Log,
}

/// Trains what `weight` and `fixed` store: the palettes of each tensor for which `weight` has a
/// palettized weight, and all vectors of `fixed`. Training goes on from `state` if there is one;
/// `keep` is given the bytes of states, for [`State::read`].
///
/// # Errors
/// If there is no lesson, a gradient is not finite, `keep` fails, or libtorch refuses, usually for
/// want of memory; [`Error::Stopped`].
pub fn tune(
    training: &Training<'_>,
    weight: &dyn Fn(&str) -> Result<Option<CompressedWeight>>,
    fixed: &dyn TensorSource,
    placement: Placement,
    state: Option<State>,
    keep: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Progress,
) -> Result<Trained> {
    // Gradients of some operations depend on the number of threads.
    let _one = OneThread::begin();
    let parameters = Parameters::new(training.chain.tensors()?, weight, fixed, placement)?;
    train(training, parameters, state, keep, progress)
}

fn train(
    training: &Training<'_>,
    mut parameters: Parameters<'_>,
    state: Option<State>,
    keep: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Progress,
) -> Result<Trained> {
    let Training { chain, lessons, judge, section, .. } = *training;
    if lessons.is_empty() {
        return Err(Error::Argument("`tune` has no calls to learn from".into()));
    }
    let task = Task::begin(progress, "tuning", "steps", section.steps);
    let mut adam = Adam::new(&parameters)?;
    let chances = Chances::new(lessons);
    let judged = |parameters: &Parameters<'_>| judge.error(chain, parameters, &|_| task.go_on());
    let (mut log, mut best) = match state {
        Some(state) => state.restore(&mut parameters, &mut adam)?,
        None => {
            let loss_scale = if parameters.placement().kind == Kind::Half { LOSS_SCALE } else { 1.0 };
            let error = judged(&parameters)?;
            let log = Log { steps: 0, judged: vec![(0, error)], best: 0, loss_scale, since: 0, skipped: 0 };
            (log, parameters.stored()?)
        }
    };
    let every = section.steps.div_ceil(JUDGED);
    let mut kept = Instant::now();
    while log.steps < section.steps && !has_no_hope(&log) {
        task.go_on()?;
        task.advance(&format!("error {:.3e}", log.judged.last().map_or(f64::NAN, |(_, error)| *error)));
        let mut gradients = Gradients::new();
        let drawn = chances.draw(training.seed, log.steps, section.batch);
        for calls in drawn.chunks(training.joined) {
            learn(training, &parameters, &chances, calls, log.loss_scale, &mut gradients)?;
        }
        advance(&mut parameters, &mut adam, gradients, section, &mut log)?;
        let is_last = log.steps == section.steps;
        let is_judged = is_last || log.steps.is_multiple_of(every);
        if is_judged {
            let error = judged(&parameters)?;
            let least = log.errors().map_or(f64::INFINITY, |(best, _)| best);
            log.judged.push((log.steps, error));
            if error < least {
                log.best = log.steps;
                best = parameters.stored()?;
            }
        }
        if is_judged || kept.elapsed() > KEPT {
            keep(&State::to_bytes(&log, &parameters, &adam, &best)?)?;
            kept = Instant::now();
        }
    }
    Ok(Trained { values: best, log })
}

/// Whether the last judgements were all worse than one before them.
fn has_no_hope(log: &Log) -> bool {
    log.judged.iter().rev().take_while(|(step, _)| *step > log.best).count() >= PATIENCE
}

/// Adds the gradient of the lessons `calls` to `gradients`.
fn learn(
    training: &Training<'_>,
    parameters: &Parameters<'_>,
    chances: &Chances,
    calls: &[usize],
    loss_scale: f64,
    gradients: &mut Gradients,
) -> Result<()> {
    let Training { chain, lessons, guidance, section, .. } = *training;
    let placement = parameters.placement();
    let placed = calls.iter().map(|call| lessons[*call].call.placed(placement)).collect::<Result<Vec<_>>>()?;
    let target = targets(calls.iter().map(|call| &lessons[*call]), parameters)?;
    let factors: Vec<f32> = calls.iter().map(|call| (chances.factor(*call) / section.batch as f64) as f32).collect();
    let factors = Tensor::f_from_slice(&factors)?.f_to_device(placement.device)?;
    let rows = lessons[calls[0]].call.sample.size()[0];
    let loss = |prediction: &Tensor| -> Result<Tensor> {
        Ok(squared_errors(prediction, &target, rows, guidance)?.f_mul(&factors)?.f_sum(Kind::Float)?)
    };
    let calls: Vec<&Sample> = placed.iter().collect();
    add_gradient(chain, parameters, &calls, &loss, loss_scale, gradients)?;
    Ok(())
}

/// Takes a step, unless a gradient is not finite, which in fp16 lowers the factor of the loss.
fn advance(
    parameters: &mut Parameters<'_>,
    adam: &mut Adam,
    mut gradients: Gradients,
    section: &TuneSection,
    log: &mut Log,
) -> Result<()> {
    let mut finite = true;
    for gradient in gradients.values_mut() {
        *gradient = gradient.f_div_scalar(log.loss_scale)?;
        finite = finite && is_finite(gradient)?;
    }
    let is_scaled = parameters.placement().kind == Kind::Half;
    if finite {
        adam.step(parameters, &gradients, log.steps, section.learning_rate * schedule(log.steps, section.steps))?;
        log.since += 1;
    } else if is_scaled && log.loss_scale > 1.0 {
        (log.loss_scale, log.since, log.skipped) = (log.loss_scale / 2.0, 0, log.skipped + 1);
    } else {
        return Err(Error::NotFinite("a gradient is NaN or infinite; another `dtype` may help".into()));
    }
    if is_scaled && log.since >= GROWS_AFTER {
        (log.loss_scale, log.since) = (log.loss_scale * 2.0, 0);
    }
    log.steps += 1;
    Ok(())
}

/// The dense predictions of some lessons, one after the other.
fn targets<'a>(lessons: impl Iterator<Item = &'a Lesson>, parameters: &Parameters<'_>) -> Result<Tensor> {
    let targets: Vec<&Tensor> = lessons.map(|lesson| &lesson.target).collect();
    Ok(Tensor::f_cat(&targets, 0)?.f_to_device(parameters.placement().device)?)
}
