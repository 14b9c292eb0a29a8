//! Confidence intervals by the bootstrap: the judged prompts are drawn again, with replacement.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use squeeze_base::error::Result;
use tch::Tensor;

use crate::report::Estimate;

/// The number of resamples.
pub(super) const RESAMPLES: usize = 9999;

/// Half of what an interval leaves out.
const TAIL: f64 = 0.025;

/// A number that depends on which prompts were judged: each index names a prompt, and may come
/// several times.
pub(super) type Statistic<'a> = dyn Fn(&[usize]) -> f64 + 'a;

/// Resamples of `units` prompts. Equal arguments give equal resamples, so that two statistics of
/// one resample are paired.
pub(super) fn resamples(units: usize) -> impl Iterator<Item = Vec<usize>> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    (0..RESAMPLES).map(move |_| (0..units).map(|_| random.random_range(0..units)).collect())
}

/// Every statistic of all `units` prompts, with its 95 % interval: bias corrected and accelerated
/// (Efron 1987), as `scipy.stats.bootstrap(method='BCa')` computes it.
///
/// # Errors
/// If libtorch refuses an operation.
pub(super) fn intervals(
    units: usize,
    statistics: &[Box<Statistic<'_>>],
    resamples: impl Iterator<Item = Vec<usize>>,
) -> Result<Vec<Estimate>> {
    let mut drawn: Vec<Vec<f64>> = statistics.iter().map(|_| Vec::new()).collect();
    for resample in resamples {
        for (values, statistic) in drawn.iter_mut().zip(statistics) {
            values.push(statistic(&resample));
        }
    }
    let all: Vec<usize> = (0..units).collect();
    let without = |left_out: usize| all.iter().copied().filter(|unit| *unit != left_out).collect::<Vec<_>>();
    let jackknife: Vec<Vec<usize>> = all.iter().map(|unit| without(*unit)).collect();
    let estimates = statistics.iter().zip(drawn).map(|(statistic, drawn)| {
        let left_out: Vec<f64> = jackknife.iter().map(|units| statistic(units)).collect();
        interval(statistic(&all), drawn, &left_out)
    });
    estimates.collect()
}

/// The interval of `value` from its values on resamples and without each of the prompts.
fn interval(value: f64, mut drawn: Vec<f64>, left_out: &[f64]) -> Result<Estimate> {
    if value.is_nan() || drawn.iter().chain(left_out).any(|value| value.is_nan()) {
        return Ok(Estimate { value, low: f64::NAN, high: f64::NAN });
    }
    drawn.sort_by(f64::total_cmp);
    let (Some(lowest), Some(highest)) = (drawn.first(), drawn.last()) else {
        return Ok(Estimate { value, low: f64::NAN, high: f64::NAN });
    };
    if lowest == highest {
        return Ok(Estimate { value, low: *lowest, high: *highest });
    }
    let below = drawn.iter().filter(|other| **other < value).count() + drawn.iter().filter(|other| **other <= value).count();
    let bias = quantile_of_normal(below as f64 / (2 * drawn.len()) as f64)?;
    let mean = left_out.iter().sum::<f64>() / left_out.len() as f64;
    let moment = |power: i32| left_out.iter().map(|other| (mean - other).powi(power)).sum::<f64>();
    let acceleration = if moment(2) > 0.0 { moment(3) / (6.0 * moment(2).powf(1.5)) } else { 0.0 };
    let end = |tail: f64| -> Result<f64> {
        let shifted = bias + quantile_of_normal(tail)?;
        let share = share_of_normal(bias + shifted / (1.0 - acceleration * shifted))?;
        Ok(percentile(&drawn, share))
    };
    Ok(Estimate { value, low: end(TAIL)?, high: end(1.0 - TAIL)? })
}

/// The value below which the `share` of `sorted` lies; between two values by a straight line, as
/// `numpy.percentile`. NaN if the share is.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    if share.is_nan() {
        return f64::NAN;
    }
    let place = share.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The value that a unit normal number is below with probability `share`.
fn quantile_of_normal(share: f64) -> Result<f64> {
    Ok(Tensor::from_slice(&[share]).f_special_ndtri()?.f_double_value(&[0])?)
}

/// The probability that a unit normal number is below `value`.
fn share_of_normal(value: f64) -> Result<f64> {
    Ok(Tensor::from_slice(&[value]).f_special_ndtr()?.f_double_value(&[0])?)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The mean of the values at `units`.
    fn mean(values: &[f64], units: &[usize]) -> f64 {
        units.iter().map(|unit| values[*unit]).sum::<f64>() / units.len() as f64
    }

    #[test]
    fn intervals_are_those_of_scipy_on_the_same_resamples() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/bootstrap.json")).unwrap();
        let numbers = |value: &Value| value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 4);
        for case in cases {
            let (x, y) = (numbers(&case["x"]), numbers(&case["y"]));
            let resamples = case["resamples"].as_array().unwrap();
            let resamples = resamples.iter().map(|row| numbers(row).into_iter().map(|unit| unit as usize).collect::<Vec<_>>());
            let sum = |values: &[f64], units: &[usize]| units.iter().map(|unit| values[*unit]).sum::<f64>();
            let (one, two, ratio) = (
                |units: &[usize]| mean(&x, units),
                |units: &[usize]| mean(&x, units) - mean(&y, units),
                |units: &[usize]| sum(&x, units) / sum(&y, units),
            );
            let statistics: Vec<Box<Statistic<'_>>> = vec![Box::new(one), Box::new(two), Box::new(ratio)];
            let found = intervals(x.len(), &statistics, resamples).unwrap();
            for (name, found) in ["mean", "difference", "ratio"].into_iter().zip(found) {
                for (expected, found) in numbers(&case[name]).into_iter().zip([found.low, found.high]) {
                    assert!((expected - found).abs() < 1e-10 * expected.abs().max(1.0), "{name}: {found}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn nine_in_ten_and_more_intervals_cover_the_mean_of_the_population() {
        // Samples of 20 from a skewed population with the mean 1.
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut covered = 0;
        for _ in 0..200 {
            let values: Vec<f64> = (0..20).map(|_| -f64::ln(1.0 - random.random_range(0.0..1.0))).collect();
            let statistics: Vec<Box<Statistic<'_>>> = vec![Box::new(|units: &[usize]| mean(&values, units))];
            let found = intervals(20, &statistics, resamples(20).take(999)).unwrap()[0];
            assert!(found.low < found.value && found.value < found.high);
            covered += usize::from((found.low..found.high).contains(&1.0));
        }
        assert!((170..200).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn equal_values_have_an_interval_of_no_width_and_missing_ones_none() {
        let statistics: Vec<Box<Statistic<'_>>> = vec![Box::new(|_: &[usize]| 2.0), Box::new(|_: &[usize]| f64::NAN)];
        let found = intervals(3, &statistics, resamples(3)).unwrap();
        assert_eq!(found[0], Estimate { value: 2.0, low: 2.0, high: 2.0 });
        assert!(found[1].low.is_nan() && found[1].high.is_nan());
        assert_eq!(resamples(5).take(3).collect::<Vec<_>>(), resamples(5).take(3).collect::<Vec<_>>());
        assert_eq!(resamples(5).count(), RESAMPLES);
    }
}
