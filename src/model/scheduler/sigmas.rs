//! Noise levels between those of training.

use serde::Deserialize;
use serde_json::json;

use super::spacing::linspace;
use crate::checkpoint::ConfigFile;
use crate::error::Result;

/// `final_sigmas_type`: where the last step ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigma {
    /// Without noise.
    Zero,
    /// With the noise of training's first timestep.
    SigmaMin,
}

/// How noise falls between the first step and the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// As in training, at the timesteps visited.
    Trained,
    /// Karras et al. 2022 (arXiv:2206.00364), equation 5 with ρ = 7.
    Karras,
    /// By a constant factor.
    Exponential,
}

/// `use_karras_sigmas`, `use_exponential_sigmas`, `sigma_min` and `sigma_max`.
#[derive(Debug, Clone, Copy)]
pub(super) struct SigmaCurve {
    shape: Shape,
    min: Option<f64>,
    max: Option<f64>,
}

impl SigmaCurve {
    /// Takes the four keys; refuses the curves that are not implemented.
    ///
    /// diffusers' DPM-Solver has no parameter `sigma_min`, but still looks for it among the keys that it was loaded with, so these
    /// keys are taken for every class.
    pub fn read(file: &mut ConfigFile) -> Result<Self> {
        let karras: bool = file.or("use_karras_sigmas", false)?;
        let exponential: bool = file.or("use_exponential_sigmas", false)?;
        for key in ["use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"] {
            file.only(key, &[json!(false)])?;
        }
        let shape = match (karras, exponential) {
            (true, true) => {
                return Err(file.error("use_exponential_sigmas", "and `use_karras_sigmas` cannot both be true"));
            }
            (true, false) => Shape::Karras,
            (false, true) => Shape::Exponential,
            (false, false) => Shape::Trained,
        };
        Ok(SigmaCurve { shape, min: positive(file, "sigma_min")?, max: positive(file, "sigma_max")? })
    }

    /// Whether the sigmas are Karras's.
    pub fn is_karras(&self) -> bool {
        self.shape == Shape::Karras
    }

    /// `steps` sigmas from `max` down to `min` (or what the config says in their stead); `None` for those of training.
    pub fn sigmas(&self, max: f64, min: f64, steps: usize) -> Option<Vec<f64>> {
        let (max, min) = (self.max.unwrap_or(max), self.min.unwrap_or(min));
        match self.shape {
            Shape::Trained => None,
            Shape::Karras => {
                const RHO: f64 = 7.0;
                let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
                Some(linspace(0.0, 1.0, steps).into_iter().map(|ramp| (max + ramp * (min - max)).powf(RHO)).collect())
            }
            Shape::Exponential => Some(linspace(max.ln(), min.ln(), steps).into_iter().map(f64::exp).collect()),
        }
    }
}

/// A key that is absent or above zero.
fn positive(file: &mut ConfigFile, key: &str) -> Result<Option<f64>> {
    match file.optional::<f64>(key)? {
        Some(value) if value <= 0.0 => Err(file.error(key, format!("= {value} is not above 0"))),
        value => Ok(value),
    }
}

/// The sigma at a fractional timestep: `numpy.interp` on a table with one entry for each timestep, its ends holding beyond it.
pub(super) fn sigma_at(timestep: f64, table: &[f32]) -> f64 {
    let sigma = |i: usize| f64::from(table[i]);
    let last = table.len() - 1;
    if timestep <= 0.0 {
        return sigma(0);
    }
    if timestep >= last as f64 {
        return sigma(last);
    }
    let below = timestep.floor();
    let low = below as usize;
    (sigma(low + 1) - sigma(low)) * (timestep - below) + sigma(low)
}

/// The table's logarithms, for [`timestep_of`].
///
/// numpy's own fp32 logarithm is off by up to two units in the last place on some processors and exact on others. This one is
/// exact, so timesteps found with it differ from diffusers' by at most the last place of an fp32 (6e-5 of 1000).
pub(super) fn logarithms(table: &[f32]) -> Vec<f32> {
    table.iter().map(|sigma| f64::from(*sigma).ln() as f32).collect()
}

/// The fractional timestep that has this sigma, linear in the logarithm; within the table's ends.
pub(super) fn timestep_of(sigma: f64, logarithms: &[f32]) -> f64 {
    let log = sigma.max(1e-10).ln();
    let below = logarithms.iter().rposition(|entry| log >= f64::from(*entry)).unwrap_or(0);
    let low = below.min(logarithms.len() - 2);
    let (lower, upper) = (logarithms[low], logarithms[low + 1]);
    let weight = ((f64::from(lower) - log) / f64::from(lower - upper)).clamp(0.0, 1.0);
    (1.0 - weight) * low as f64 + weight * (low + 1) as f64
}
