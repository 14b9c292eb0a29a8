//! The noise level of each training timestep.

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::ConfigFile;

/// The betas of training: one fp32 for each timestep, the share of noise that it adds.
#[derive(Debug)]
pub(super) struct NoiseSchedule {
    betas: Vec<f32>,
    /// Whether the last timestep is pure noise (`rescale_betas_zero_snr`; algorithm 1 of Lin et al.
    /// 2023, arXiv:2305.08891).
    zero_snr: bool,
    /// Whether `beta_schedule` is the cosine one. DPM-Solver uses this even where `trained_betas`
    /// replace the schedule.
    pub cosine: bool,
}

/// The largest number of training timesteps, far above any in use. It bounds the size of the
/// tables.
const MOST_TIMESTEPS: usize = 1_000_000;

/// What a class makes of the keys that describe training.
#[derive(Debug, Clone, Copy)]
pub(super) struct Training {
    /// Defaults of `beta_start`, `beta_end` and `beta_schedule`.
    pub start: f64,
    pub end: f64,
    pub schedule: &'static str,
    /// The values of `beta_schedule` that not every class has.
    pub more: &'static [&'static str],
    /// Whether the class has `rescale_betas_zero_snr`.
    pub rescales: bool,
}

impl NoiseSchedule {
    /// Takes the number of training timesteps alone.
    pub(super) fn count(file: &mut ConfigFile) -> Result<usize> {
        let count: usize = file.or("num_train_timesteps", 1000)?;
        if !(2..=MOST_TIMESTEPS).contains(&count) {
            return Err(file.error("num_train_timesteps", format!("= {count} is not between 2 and {MOST_TIMESTEPS}")));
        }
        Ok(count)
    }

    /// Takes the keys that describe training.
    pub(super) fn read(file: &mut ConfigFile, class: Training) -> Result<Self> {
        let count = NoiseSchedule::count(file)?;
        let start = fraction(file, "beta_start", class.start)?;
        let end = fraction(file, "beta_end", class.end)?;
        let schedule: String = file.or("beta_schedule", class.schedule.to_owned())?;
        let trained: Option<Vec<f32>> = file.optional("trained_betas")?;
        let betas = match (trained, schedule.as_str()) {
            (Some(betas), _) => {
                if betas.len() != count {
                    let problem = format!("has {} values for {count} `num_train_timesteps`", betas.len());
                    return Err(file.error("trained_betas", problem));
                }
                if let Some(beta) = betas.iter().find(|beta| !(**beta > 0.0 && **beta <= 1.0)) {
                    return Err(file.error("trained_betas", format!("has {beta}, which is not above 0 and at most 1")));
                }
                betas
            }
            (None, "linear") => linspace(start, end, count)?,
            (None, "scaled_linear") => linspace(start.sqrt(), end.sqrt(), count)?.iter().map(|root| root * root).collect(),
            (None, "squaredcos_cap_v2") => capped(count, cosine),
            (None, "exp") if class.more.contains(&"exp") => capped(count, |time| (-12.0 * time).exp()),
            (None, "laplace") if class.more.contains(&"laplace") => capped(count, laplace),
            (None, "sigmoid") if class.more.contains(&"sigmoid") => sigmoid(start, end, count)?,
            (None, other) => {
                let known = [&["linear", "scaled_linear", "squaredcos_cap_v2"], class.more].concat().join(", ");
                let problem = format!("= \"{other}\" is not supported ({known} are)");
                return Err(file.error("beta_schedule", problem));
            }
        };
        let zero_snr = class.rescales && file.or("rescale_betas_zero_snr", false)?;
        let betas = if zero_snr { without_terminal_signal(&betas)? } else { betas };
        Ok(NoiseSchedule { betas, zero_snr, cosine: schedule == "squaredcos_cap_v2" })
    }

    /// The number of training timesteps.
    pub(super) fn len(&self) -> usize {
        self.betas.len()
    }

    /// Whether the last timestep is pure noise.
    pub(super) fn ends_in_pure_noise(&self) -> bool {
        self.zero_snr
    }

    /// ᾱ of every timestep: the share of the picture (as a variance) that is left.
    pub(super) fn signal(&self) -> Result<Vec<f32>> {
        cumulative(&self.betas)
    }

    /// [`signal`](Self::signal) for samplers that divide by it: a last value of zero is replaced by
    /// 2⁻²⁴, as in diffusers.
    pub(super) fn positive_signal(&self, file: &ConfigFile) -> Result<Vec<f32>> {
        let mut signal = self.signal()?;
        if let (Some(last), true) = (signal.last_mut(), self.zero_snr) {
            *last = 0.5_f32.powi(24);
        }
        if let Some(index) = signal.iter().position(|alpha| *alpha <= 0.0) {
            let problem = format!("leaves nothing of the picture at timestep {index}, where this sampler cannot start");
            return Err(file.error("beta_schedule", problem));
        }
        Ok(signal)
    }
}

/// σ of every timestep, √((1-ᾱ)/ᾱ): the noise relative to the picture.
pub(super) fn sigmas(signal: &[f32]) -> Result<Vec<f32>> {
    let ratios: Vec<f32> = signal.iter().map(|alpha| (1.0 - alpha) / alpha).collect();
    roots(&ratios)
}

/// libtorch's fp32 square roots.
fn roots(values: &[f32]) -> Result<Vec<f32>> {
    Ok(Vec::try_from(&Tensor::f_from_slice(values)?.f_sqrt()?)?)
}

/// Takes a key whose value must be above 0 and below 1.
fn fraction(file: &mut ConfigFile, key: &str, default: f64) -> Result<f64> {
    let value = file.or(key, default)?;
    if value > 0.0 && value < 1.0 {
        return Ok(value);
    }
    Err(file.error(key, format!("= {value} is not between 0 and 1")))
}

/// libtorch's fp32 linspace, which, unlike numpy's, counts back from the end in its second half.
fn linspace(start: f64, end: f64, count: usize) -> Result<Vec<f32>> {
    Ok(Vec::try_from(&Tensor::f_linspace(start, end, count as i64, (Kind::Float, Device::Cpu))?)?)
}

/// Betas by which ᾱ follows `signal` from time 0 to 1, capped at 0.999.
fn capped(count: usize, signal: impl Fn(f64) -> f64) -> Vec<f32> {
    let time = |i: usize| i as f64 / count as f64;
    (0..count).map(|i| (1.0 - signal(time(i + 1)) / signal(time(i))).min(0.999) as f32).collect()
}

/// The cosine schedule of Nichol & Dhariwal 2021 (arXiv:2102.09672).
fn cosine(time: f64) -> f64 {
    ((time + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2)
}

/// A Laplace distribution of the logarithm of the signal-to-noise ratio, as in diffusers'
/// `betas_for_alpha_bar`.
fn laplace(time: f64) -> f64 {
    let ratio = (-0.5 * (0.5 - time).signum() * (1.0 - 2.0 * (0.5 - time).abs() + 1e-6).ln()).exp();
    (ratio / (1.0 + ratio)).sqrt()
}

/// GeoDiff's schedule: a sigmoid from `start` to `end`.
fn sigmoid(start: f64, end: f64, count: usize) -> Result<Vec<f32>> {
    let line = Tensor::f_linspace(-6.0, 6.0, count as i64, (Kind::Float, Device::Cpu))?;
    Ok(Vec::try_from(&line.f_sigmoid()?.f_mul_scalar(end - start)?.f_add_scalar(start)?)?)
}

/// ᾱ: the cumulative product of 1 - β. libtorch computes it in double precision.
fn cumulative(betas: &[f32]) -> Result<Vec<f32>> {
    let alphas: Vec<f32> = betas.iter().map(|beta| 1.0 - beta).collect();
    Ok(Vec::try_from(&Tensor::f_from_slice(&alphas)?.f_cumprod(0, None)?)?)
}

/// Betas whose √ᾱ is shifted and scaled to end at zero, with its first value unchanged.
fn without_terminal_signal(betas: &[f32]) -> Result<Vec<f32>> {
    let roots = roots(&cumulative(betas)?)?;
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Ok(Vec::new()) };
    let scale = first / (first - last);
    let signal: Vec<f32> = roots.iter().map(|root| (root - last) * scale).map(|root| root * root).collect();
    let alphas = signal.iter().take(1).copied().chain(signal.windows(2).map(|pair| pair[1] / pair[0]));
    Ok(alphas.map(|alpha| 1.0 - alpha).collect())
}
