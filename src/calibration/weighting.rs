//! How much each sample counts, by its timestep.

use sdxl_model::scheduler::SchedulerConfig;
use squeeze_base::error::Result;

use super::Samples;
use crate::config::TimestepWeighting;

/// A weight for each call, 1 in the mean, by sigma, the noise to signal ratio at its timestep.
///
/// # Errors
/// If the scheduler's config has no noise schedule.
pub fn weights(samples: &Samples, scheduler: &SchedulerConfig, by: TimestepWeighting) -> Result<Vec<f64>> {
    let timesteps: Vec<f64> = samples.calls.iter().map(|call| call.timestep).collect();
    let weight = |sigma: f64| match by {
        TimestepWeighting::Uniform => 1.0,
        TimestepWeighting::Early => sigma,
        TimestepWeighting::Log => sigma.ln_1p(),
    };
    let weights: Vec<f64> = scheduler.sigmas(&timesteps)?.into_iter().map(weight).collect();
    let mean = weights.iter().sum::<f64>() / weights.len().max(1) as f64;
    Ok(weights.iter().map(|weight| if mean > 0.0 { weight / mean } else { 1.0 }).collect())
}
