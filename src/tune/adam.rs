//! Adam (Kingma and Ba 2015), with steps relative to the size of what is trained.

use std::collections::BTreeMap;

use squeeze_base::error::Result;
use squeeze_numerics::sum;
use tch::Tensor;

use super::backward::Gradients;
use super::parameters::Parameters;

/// Decay of the mean of gradients.
const FIRST: f64 = 0.9;
/// Decay of the mean of their squares. The runs are short, so that it forgets sooner than usual.
const SECOND: f64 = 0.99;
/// The share of the steps in which the rate rises to its full height.
const WARM_UP: f64 = 0.05;

/// The means of a parameter's gradients.
#[derive(Debug)]
pub(super) struct Moments {
    /// Of the gradients: fp32 `[n]`.
    pub first: Tensor,
    /// Of their squares: fp32 `[n]`.
    pub second: Tensor,
}

/// The state of Adam, and the size of each parameter at the start.
#[derive(Debug)]
pub(super) struct Adam {
    pub moments: BTreeMap<String, Moments>,
    sizes: BTreeMap<String, f64>,
}

impl Adam {
    /// Moments of zero. The sizes are the mean magnitudes of the parameters, which are at their
    /// start.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub(super) fn new(parameters: &Parameters<'_>) -> Result<Self> {
        let mut adam = Adam { moments: BTreeMap::new(), sizes: BTreeMap::new() };
        for (name, parameter) in &parameters.by_name {
            let zeros = || parameter.value.f_zeros_like();
            adam.moments.insert(name.clone(), Moments { first: zeros()?, second: zeros()? });
            let size = sum::sum(&parameter.value.f_abs()?)? / parameter.value.numel().max(1) as f64;
            adam.sizes.insert(name.clone(), size);
        }
        Ok(adam)
    }

    /// Takes step number `step`, counted from 0, with `rate` as the share of a parameter's size by
    /// which it moves at most, about.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub(super) fn step(&mut self, parameters: &mut Parameters<'_>, gradients: &Gradients, step: usize, rate: f64) -> Result<()> {
        // Beyond this, powers of the decays are zero.
        let taken = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let (first_bias, second_bias) = (1.0 - FIRST.powi(taken), 1.0 - SECOND.powi(taken));
        for (name, gradient) in gradients {
            let (Some(parameter), Some(moments)) = (parameters.by_name.get_mut(name), self.moments.get_mut(name)) else {
                continue;
            };
            moments.first = moments.first.f_mul_scalar(FIRST)?.f_add(&gradient.f_mul_scalar(1.0 - FIRST)?)?;
            let squares = gradient.f_mul(gradient)?.f_mul_scalar(1.0 - SECOND)?;
            moments.second = moments.second.f_mul_scalar(SECOND)?.f_add(&squares)?;
            let deviation = moments.second.f_div_scalar(second_bias)?.f_sqrt()?.f_add_scalar(1e-12)?;
            let direction = moments.first.f_div_scalar(first_bias)?.f_div(&deviation)?;
            parameter.value = parameter.value.f_sub(&direction.f_mul_scalar(rate * self.sizes[name])?)?;
        }
        Ok(())
    }
}

/// The factor of the rate at step `step` of `steps`: a rise over the first twentieth, and a cosine
/// down to zero (Loshchilov and Hutter 2017).
pub(super) fn schedule(step: usize, steps: usize) -> f64 {
    let rise = ((step + 1) as f64 / (steps as f64 * WARM_UP).max(1.0)).min(1.0);
    rise * (0.5 + 0.5 * (std::f64::consts::PI * step as f64 / steps.max(1) as f64).cos())
}

#[cfg(test)]
mod tests {
    use super::schedule;

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f64> = (0..100).map(|step| schedule(step, 100)).collect();
        assert!((rates[0] - 0.2).abs() < 1e-12 && (rates[4] - schedule(4, 100)).abs() < 1e-12);
        assert!(rates[..5].is_sorted() && rates[5..].is_sorted_by(|a, b| a >= b));
        assert!(rates[4] > 0.99 && rates[99] < 0.001 && schedule(0, 1) == 1.0);
    }
}
