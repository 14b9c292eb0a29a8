//! Axes: the ranges, ticks and labels of plots.

/// Spread of the values over an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Log,
}

/// Unit of the tick labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Shares of 1, labelled in percent.
    Percent,
    /// Numbers as they are.
    Plain,
}

/// An axis from `low` to `high`.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    title: String,
    low: f64,
    high: f64,
    scale: Scale,
    unit: Unit,
}

impl Axis {
    /// An axis of errors: linear from zero, or logarithmic if the values span more than a factor of
    /// 20. Zeros have no place on a logarithmic axis.
    pub(super) fn of_errors(title: &str, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite() && *value > 0.0).collect();
        let high = values.iter().copied().fold(0.0, f64::max);
        let low = values.iter().copied().fold(high, f64::min);
        let axis = |low, high, scale| Axis { title: title.into(), low, high, scale, unit: Unit::Percent };
        if high <= 0.0 {
            axis(0.0, 1.0, Scale::Linear)
        } else if high / low > 20.0 {
            // Both ends are ticks.
            axis(round_down(low), round_up(high), Scale::Log)
        } else {
            let step = step(high);
            axis(0.0, (high / step).ceil() * step, Scale::Linear)
        }
    }

    /// A logarithmic axis of errors, however near they are to each other; linear if there is none
    /// above zero.
    pub(super) fn of_errors_by_factor(title: &str, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite() && *value > 0.0).collect();
        let axis = Self::of_errors(title, values.iter().copied());
        let (Some(least), Some(most)) = (values.iter().copied().reduce(f64::min), values.into_iter().reduce(f64::max)) else {
            return axis;
        };
        let (low, high) = (round_down(least), round_up(most));
        // One round number alone is no range.
        let high = if high > low { high } else { (2.0 * low).min(f64::MAX) };
        Axis { low, high, scale: Scale::Log, ..axis }
    }

    /// A linear axis around the values, or from zero.
    pub(super) fn of_values(title: &str, unit: Unit, from_zero: bool, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let high = values.iter().copied().reduce(f64::max).unwrap_or(1.0);
        let low = if from_zero { 0.0 } else { values.iter().copied().reduce(f64::min).unwrap_or(0.0) };
        let step = step(if high > low { high - low } else { high.abs().max(1.0) });
        let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        let high = if high > low { high } else { low + step };
        Axis { title: title.into(), low, high, scale: Scale::Linear, unit }
    }

    /// A linear axis of whole numbers from 1 to `count`, or to 2 if `count` is less.
    pub(super) fn of_steps(title: &str, count: usize) -> Self {
        Axis { title: title.into(), low: 1.0, high: (count as f64).max(2.0), scale: Scale::Linear, unit: Unit::Plain }
    }

    /// The axis' title.
    pub(super) fn title(&self) -> &str {
        &self.title
    }

    /// Position of a value on the axis, 0 to 1; none for values outside of it.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        (-1e-6..=1.0 + 1e-6).contains(&place).then_some(place)
    }

    /// Positions and labels of the ticks.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let values: Vec<f64> = match self.scale {
            Scale::Linear => {
                let step = step(self.high - self.low);
                let first = (self.low / step).ceil() as i64;
                (first..first + 20).map(|i| i as f64 * step).collect()
            }
            Scale::Log => {
                let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
                // On wide axes only powers of ten are labelled, and both ends.
                let wide = self.high / self.low > 500.0;
                let labelled = |value: f64, digit: f64| !wide || digit == 1.0 || self.is_end(value);
                let round = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| (digit * 10f64.powi(decade), digit)));
                round.filter(|(value, digit)| labelled(*value, *digit)).map(|(value, _)| value).collect()
            }
        };
        values.into_iter().filter_map(|value| Some((self.place(value)?, self.label(value)))).collect()
    }

    fn is_end(&self, value: f64) -> bool {
        [self.low, self.high].iter().any(|end| (value / end - 1.0).abs() < 1e-6)
    }

    fn label(&self, value: f64) -> String {
        match self.unit {
            Unit::Percent => format!("{}%", shortest(100.0 * value)),
            Unit::Plain => shortest(value),
        }
    }
}

/// A round step that divides `range` into at most six.
fn step(range: f64) -> f64 {
    round_up(range / 6.0)
}

/// The next round number at or above `value`; `value` itself if none is positive and finite.
fn round_up(value: f64) -> f64 {
    round_numbers(value).find(|round| *round >= value * (1.0 - 1e-9)).unwrap_or(value)
}

/// The next round number at or below `value`; `value` itself if none is positive and finite.
fn round_down(value: f64) -> f64 {
    round_numbers(value).rev().find(|round| *round <= value * (1.0 + 1e-9)).unwrap_or(value)
}

/// Round numbers around `value`, ascending.
fn round_numbers(value: f64) -> impl DoubleEndedIterator<Item = f64> {
    let decade = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(move |digit| digit * decade).filter(|round| *round > 0.0 && round.is_finite())
}

/// The number with the fewest decimals that still express it.
fn shortest(value: f64) -> String {
    let rounded = |decimals: i32| (value * 10f64.powi(decimals)).round() / 10f64.powi(decimals);
    let decimals = (0..9).find(|decimals| (rounded(*decimals) - value).abs() <= 1e-6 * value.abs()).unwrap_or(9) as usize;
    // Adding zero turns -0 into 0.
    format!("{:.decimals$}", value + 0.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(labels(&Axis::of_errors("", [0.01, 0.04].into_iter())), ["0%", "1%", "2%", "3%", "4%"]);
        assert_eq!(labels(&Axis::of_errors("", [0.0015, 0.04].into_iter())), ["0.1%", "0.2%", "0.5%", "1%", "2%", "5%"]);
        assert_eq!(labels(&Axis::of_errors("", [1e-5, 0.04].into_iter())), ["0.001%", "0.01%", "0.1%", "1%", "5%"]);
        assert_eq!(labels(&Axis::of_errors_by_factor("", [0.004, 0.011].into_iter())), ["0.2%", "0.5%", "1%", "2%"]);
        assert_eq!(labels(&Axis::of_errors_by_factor("", [0.01].into_iter())), ["1%", "2%"]);
        assert_eq!(labels(&Axis::of_values("", Unit::Plain, false, [21.0, 38.0].into_iter())), ["20", "25", "30", "35", "40"]);
        assert_eq!(labels(&Axis::of_steps("", 30)), ["5", "10", "15", "20", "25", "30"]);
    }

    /// An end of zero or infinity would give an axis billions of decades.
    #[test]
    fn axes_reach_from_the_least_to_the_greatest_number() {
        for values in [[5e-324, 1.0], [1.0, f64::MAX], [5e-324, f64::MAX]] {
            let axis = Axis::of_errors("", values.into_iter());
            assert!(axis.low > 0.0 && axis.high.is_finite() && axis.ticks().len() < 1000, "{axis:?}");
        }
    }

    proptest! {
        #[test]
        fn every_finite_value_has_a_place(values in proptest::collection::vec(1e-12f64..1e6, 1..8)) {
            let errors = [Axis::of_errors("", values.iter().copied()), Axis::of_errors_by_factor("", values.iter().copied())];
            for axis in errors.into_iter().chain([Axis::of_values("", Unit::Plain, false, values.iter().copied())]) {
                prop_assert!(values.iter().all(|value| axis.place(*value).is_some()), "{axis:?}");
                let ticks = axis.ticks();
                prop_assert!(!ticks.is_empty() && ticks.len() < 21, "{axis:?} {ticks:?}");
            }
        }

        #[test]
        fn odd_values_never_panic(values in proptest::collection::vec(any::<f64>(), 0..4)) {
            let errors = [Axis::of_errors("", values.iter().copied()), Axis::of_errors_by_factor("", values.iter().copied())];
            for axis in errors.into_iter().chain([Axis::of_values("", Unit::Plain, true, values.iter().copied())]) {
                axis.ticks();
                values.iter().for_each(|value| { axis.place(*value); });
            }
        }
    }
}
