//! Noise levels at fractional timesteps.

use serde::Deserialize;
use squeeze_base::error::Result;
use statrs::function::beta::inv_beta_reg;

use super::spacing::linspace;
use crate::checkpoint::ConfigFile;

/// `final_sigmas_type`: the noise level at which the last step ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigma {
    /// No noise.
    Zero,
    /// The noise of training's first timestep.
    SigmaMin,
}

/// The course of the noise from the first step to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// As in training, at the timesteps visited.
    Trained,
    /// Karras et al. 2022 (arXiv:2206.00364), equation 5 with ρ = 7.
    Karras,
    /// A geometric progression.
    Exponential,
    /// The quantiles of the Beta distribution with α = β = 0.6 (Lee et al. 2024,
    /// arXiv:2407.12173).
    Beta,
    /// Evenly spaced logarithms, over the whole range of training (Lu et al. 2022,
    /// arXiv:2206.00927).
    Lu,
}

/// `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`, `sigma_min` and `sigma_max`.
#[derive(Debug, Clone, Copy)]
pub(super) struct SigmaCurve {
    shape: Shape,
    min: Option<f64>,
    max: Option<f64>,
}

impl SigmaCurve {
    /// Takes the five keys.
    ///
    /// diffusers' DPM-Solver has no parameter `sigma_min`, but reads it from the config all the
    /// same, so these keys are taken for every class.
    pub(super) fn read(file: &mut ConfigFile) -> Result<Self> {
        const SHAPES: [(&str, Shape); 3] = [
            ("use_karras_sigmas", Shape::Karras),
            ("use_exponential_sigmas", Shape::Exponential),
            ("use_beta_sigmas", Shape::Beta),
        ];
        let mut chosen: Option<(&str, Shape)> = None;
        for (key, shape) in SHAPES {
            if !file.or(key, false)? {
                continue;
            }
            if let Some((other, _)) = chosen {
                return Err(file.error(key, format!("and `{other}` cannot both be true")));
            }
            chosen = Some((key, shape));
        }
        let shape = chosen.map_or(Shape::Trained, |(_, shape)| shape);
        Ok(SigmaCurve { shape, min: positive(file, "sigma_min")?, max: positive(file, "sigma_max")? })
    }

    /// The curve with `use_lu_lambdas`, which one class has. As in diffusers, Karras's sigmas come
    /// before it, and it before the others.
    pub(super) fn or_lu(self, file: &mut ConfigFile) -> Result<Self> {
        let is_lu: bool = file.or("use_lu_lambdas", false)? && !self.is_karras();
        Ok(if is_lu { SigmaCurve { shape: Shape::Lu, min: None, max: None } } else { self })
    }

    /// Whether the sigmas are those of training.
    pub(super) fn is_trained(&self) -> bool {
        self.shape == Shape::Trained
    }

    /// Whether the sigmas are Karras's.
    pub(super) fn is_karras(&self) -> bool {
        self.shape == Shape::Karras
    }

    /// Whether diffusers' DPM-Solver rounds the timesteps of these sigmas, and does not truncate
    /// them.
    pub(super) fn is_rounded(&self) -> bool {
        matches!(self.shape, Shape::Karras | Shape::Lu)
    }

    /// The curve without `sigma_min` and `sigma_max` where it is Karras's: a class that has neither
    /// key uses them, in diffusers, for the exponential curve alone.
    pub(super) fn with_karras_of_training(self, file: &ConfigFile) -> Self {
        if !self.is_karras() || self.min.is_none() && self.max.is_none() {
            return self;
        }
        tracing::warn!(
            "{}: `sigma_min` and `sigma_max` have no effect on this class, in diffusers neither",
            file.path().display()
        );
        SigmaCurve { min: None, max: None, ..self }
    }

    /// `steps` sigmas from `max` down to `min`, or from `sigma_max` to `sigma_min` of the config;
    /// `None` if the sigmas are those of training.
    pub(super) fn sigmas(&self, max: f64, min: f64, steps: usize) -> Option<Vec<f64>> {
        let (max, min) = (self.max.unwrap_or(max), self.min.unwrap_or(min));
        match self.shape {
            Shape::Trained => None,
            Shape::Karras => {
                const RHO: f64 = 7.0;
                let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
                Some(linspace(0.0, 1.0, steps).into_iter().map(|ramp| (max + ramp * (min - max)).powf(RHO)).collect())
            }
            Shape::Exponential => Some(linspace(max.ln(), min.ln(), steps).into_iter().map(f64::exp).collect()),
            Shape::Beta => {
                const ALPHA: f64 = 0.6;
                let quantile = |ramp: f64| inv_beta_reg(ALPHA, ALPHA, 1.0 - ramp);
                Some(linspace(0.0, 1.0, steps).into_iter().map(|ramp| min + quantile(ramp) * (max - min)).collect())
            }
            // diffusers has these logarithms in fp32.
            Shape::Lu => {
                let logarithm = |sigma: f64| f64::from(numpy_log(sigma as f32));
                let (max, min) = (logarithm(max), logarithm(min));
                Some(linspace(0.0, 1.0, steps).into_iter().map(|ramp| (max + ramp * (min - max)).exp()).collect())
            }
        }
    }
}

/// Takes a key whose value must be above zero if it is present.
fn positive(file: &mut ConfigFile, key: &str) -> Result<Option<f64>> {
    match file.optional::<f64>(key)? {
        Some(value) if value <= 0.0 => Err(file.error(key, format!("= {value} is not above 0"))),
        value => Ok(value),
    }
}

/// The sigma at a fractional timestep: `numpy.interp` on a table with one entry for each timestep.
/// Beyond the table's ends its first and last entries are used.
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
pub(super) fn logarithms(table: &[f32]) -> Vec<f32> {
    table.iter().map(|sigma| numpy_log(*sigma)).collect()
}

/// numpy's fp32 logarithm on x86: x = m·2ᵉ with m about 1, a ratio of polynomials for log m, in
/// fused multiply-adds.
///
/// Its error is up to two units in the last place. They matter because diffusers' DPM-Solver
/// truncates the timesteps that it computes from these logarithms: the noisiest timestep becomes
/// 998 instead of 999 where an error makes it 998.99999.
fn numpy_log(x: f32) -> f32 {
    const NUMERATOR: [f32; 6] = [2.589_979_2e-2, 0.380_883_78, 1.480_000_6, 2.112_677_6, 1.0, 0.0];
    const DENOMINATOR: [f32; 6] = [5.875_095_3e-3, 0.154_647_63, 0.986_494_3, 2.453_006, 2.612_677_6, 1.0];
    if !x.is_normal() || x < 0.0 {
        return x.ln();
    }
    let bits = x.to_bits();
    let mut exponent = (bits >> 23) as f32 - 126.0;
    let mut mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    if mantissa <= std::f32::consts::FRAC_1_SQRT_2 {
        mantissa *= 2.0;
        exponent -= 1.0;
    }
    let y = mantissa - 1.0;
    let polynomial = |coefficients: [f32; 6]| coefficients.into_iter().fold(0.0_f32, |sum, next| sum.mul_add(y, next));
    exponent.mul_add(std::f32::consts::LN_2, polynomial(NUMERATOR) / polynomial(DENOMINATOR))
}

/// The fractional timestep with this sigma, by linear interpolation in the logarithm, clamped to
/// the table.
pub(super) fn timestep_of(sigma: f64, logarithms: &[f32]) -> f64 {
    let log = sigma.max(1e-10).ln();
    let below = logarithms.iter().rposition(|entry| log >= f64::from(*entry)).unwrap_or(0);
    let low = below.min(logarithms.len() - 2);
    let (lower, upper) = (logarithms[low], logarithms[low + 1]);
    let weight = ((f64::from(lower) - log) / f64::from(lower - upper)).clamp(0.0, 1.0);
    (1.0 - weight) * low as f64 + weight * (low + 1) as f64
}
