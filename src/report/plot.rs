//! Axes, and marks on them, as SVG. Colours and type come from the page's style sheet.

use super::markup::escape;

/// Styles that repeat after this many series: six hues, each filled, then hollow and dashed, then hollow and dotted.
const HUES: usize = 6;

/// How values are spread over an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Log,
}

/// What ticks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Shares of 1.
    Percent,
    /// The number itself.
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
    /// From zero; logarithmic where the values span more than a factor of 20. Then zeros have no place on it.
    pub(super) fn of_errors(title: &str, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite() && *value > 0.0).collect();
        let high = values.iter().copied().fold(0.0, f64::max);
        let low = values.iter().copied().fold(high, f64::min);
        let axis = |low, high, scale| Axis { title: title.into(), low, high, scale, unit: Unit::Percent };
        if high <= 0.0 {
            axis(0.0, 1.0, Scale::Linear)
        } else if high / low > 20.0 {
            // The ends are ticks.
            axis(round_number(low, f64::floor), round_number(high, f64::ceil), Scale::Log)
        } else {
            let step = step(high);
            axis(0.0, (high / step).ceil() * step, Scale::Linear)
        }
    }

    /// Around the values, or from zero.
    pub(super) fn of_values(title: &str, unit: Unit, from_zero: bool, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let high = values.iter().copied().reduce(f64::max).unwrap_or(1.0);
        let low = if from_zero { 0.0 } else { values.iter().copied().reduce(f64::min).unwrap_or(0.0) };
        let step = step(if high > low { high - low } else { high.abs().max(1.0) });
        let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        let high = if high > low { high } else { low + step };
        Axis { title: title.into(), low, high, scale: Scale::Linear, unit }
    }

    /// Of whole numbers from 1 to `count`, with every one inside.
    pub(super) fn of_steps(title: &str, count: usize) -> Self {
        Axis { title: title.into(), low: 1.0, high: (count as f64).max(2.0), scale: Scale::Linear, unit: Unit::Plain }
    }

    /// Where a value lies, 0 to 1; none where it has no place.
    fn place(&self, value: f64) -> Option<f64> {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        (-1e-6..=1.0 + 1e-6).contains(&place).then_some(place)
    }

    /// Places and labels of the ticks.
    fn ticks(&self) -> Vec<(f64, String)> {
        let values: Vec<f64> = match self.scale {
            Scale::Linear => {
                let step = step(self.high - self.low);
                let first = (self.low / step).ceil() as i64;
                (first..first + 20).map(|i| i as f64 * step).collect()
            }
            Scale::Log => {
                let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
                // The ends are always said.
                let wide = self.high / self.low > 500.0;
                let said = |value: f64, digit: f64| !wide || digit == 1.0 || self.is_end(value);
                let tens = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| (digit * 10f64.powi(decade), digit)));
                tens.filter(|(value, digit)| said(*value, *digit)).map(|(value, _)| value).collect()
            }
        };
        values.into_iter().filter_map(|value| Some((self.place(value)?, self.label(value)))).collect()
    }

    fn is_end(&self, value: f64) -> bool {
        [self.low, self.high].iter().any(|end| (value / end - 1.0).abs() < 1e-6)
    }

    fn label(&self, value: f64) -> String {
        match self.unit {
            Unit::Percent => format!("{}%", short(100.0 * value)),
            Unit::Plain => short(value),
        }
    }
}

/// 1, 2 or 5 times a power of ten, so that a range has at most six steps.
fn step(range: f64) -> f64 {
    let rough = range / 6.0;
    let decade = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|digit| digit * decade).find(|step| *step >= rough * (1.0 - 1e-9)).unwrap_or(decade)
}

/// The next 1, 2 or 5 times a power of ten.
fn round_number(value: f64, round: fn(f64) -> f64) -> f64 {
    let decade = 10f64.powf(value.log10().floor());
    let digits = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * decade);
    let up = round(0.5) > 0.0;
    let fits = |digit: &&f64| if up { **digit >= value * (1.0 - 1e-9) } else { **digit <= value * (1.0 + 1e-9) };
    let found = if up { digits.iter().find(fits) } else { digits.iter().rev().find(fits) };
    found.copied().unwrap_or(value)
}

/// The fewest decimals that say the number.
fn short(value: f64) -> String {
    let fits = |decimals: &usize| (format!("{value:.decimals$}").parse().unwrap_or(0.0) - value).abs() <= 1e-6 * value.abs();
    let decimals = (0..9).find(fits).unwrap_or(9);
    format!("{:.decimals$}", value + 0.0)
}

/// The classes of a series' marks.
pub(super) fn style(series: usize) -> String {
    format!("c{} d{}", series % HUES, series / HUES % 3)
}

/// A sample of a series' marks, for legends and tables.
pub(super) fn swatch(series: usize) -> String {
    format!(
        "<svg class=\"swatch {}\" viewBox=\"0 0 26 10\" width=\"26\" height=\"10\" aria-hidden=\"true\"><path d=\"M1 5H25\"/>\
         <circle cx=\"13\" cy=\"5\" r=\"3.5\"/></svg>",
        style(series)
    )
}

/// A plot under construction.
pub(super) struct Plot {
    body: String,
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: Axis,
    y: Axis,
}

impl Plot {
    /// An empty plot with grid and labels: `left` and `bottom` of it are kept for those of the vertical and horizontal axis.
    pub(super) fn new(width: u32, height: u32, left: u32, bottom: u32, x: Axis, y: Axis) -> Self {
        let mut plot = Self::without_grid(width, height, left, bottom, x, y);
        plot.upright_grid();
        plot.level_grid();
        plot
    }

    /// The same without grid and labels.
    pub(super) fn without_grid(width: u32, height: u32, left: u32, bottom: u32, x: Axis, y: Axis) -> Self {
        let (width, height) = (f64::from(width), f64::from(height));
        Plot { body: String::new(), width, height, left: left.into(), right: 14.0, top: 26.0, bottom: bottom.into(), x, y }
    }

    /// The vertical axis' lines, labels and title.
    pub(super) fn level_grid(&mut self) {
        for (place, label) in self.y.ticks() {
            let y = self.down(place);
            let (left, right) = (self.left, self.width - self.right);
            self.body += &format!("<path class=\"grid\" d=\"M{left:.1} {y:.1}H{right:.1}\"/>\n");
            self.text("tick end", left - 7.0, y + 4.0, &label);
        }
        let title = self.y.title.clone();
        self.text("axis", 2.0, 13.0, &title);
    }

    /// The horizontal axis' lines, labels and title.
    pub(super) fn upright_grid(&mut self) {
        let bottom = self.height - self.bottom;
        for (place, label) in self.x.ticks() {
            let x = self.across(place);
            self.body += &format!("<path class=\"grid\" d=\"M{x:.1} {:.1}V{bottom:.1}\"/>\n", self.top);
            self.text("tick middle", x, bottom + 16.0, &label);
        }
        let title = self.x.title.clone();
        self.text("axis end", self.width - self.right, self.height - 4.0, &title);
    }

    fn across(&self, place: f64) -> f64 {
        self.left + place * (self.width - self.left - self.right)
    }

    fn down(&self, place: f64) -> f64 {
        self.height - self.bottom - place * (self.height - self.top - self.bottom)
    }

    /// Where a point lies; none if it has no place on the axes.
    pub(super) fn point(&self, x: f64, y: f64) -> Option<(f64, f64)> {
        Some((self.across(self.x.place(x)?), self.down(self.y.place(y)?)))
    }

    /// Where a value lies from left to right, and a share of the height from above.
    pub(super) fn point_in_band(&self, x: f64, share: f64) -> Option<(f64, f64)> {
        Some((self.across(self.x.place(x)?), self.down(1.0 - share)))
    }

    /// Text; `class` has its kind and anchor.
    pub(super) fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        self.body += &format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>\n", escape(text));
    }

    /// A line through the points that have a place; it breaks where one has none.
    pub(super) fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>, title: &str) {
        let mut path = String::new();
        let mut pen = 'M';
        for (x, y) in points {
            match self.point(x, y) {
                Some((x, y)) => {
                    path += &format!("{pen}{x:.1} {y:.1}");
                    pen = 'L';
                }
                None => pen = 'M',
            }
        }
        if !path.is_empty() {
            self.body += &format!("<path class=\"line {class}\" d=\"{path}\"><title>{}</title></path>\n", escape(title));
        }
    }

    /// A dot in the plot's own units.
    pub(super) fn dot(&mut self, class: &str, (x, y): (f64, f64), radius: f64, title: &str) {
        self.body += &format!(
            "<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"><title>{}</title></circle>\n",
            escape(title)
        );
    }

    /// A thin line in the plot's own units.
    pub(super) fn rule(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.body += &format!("<path class=\"{class}\" d=\"M{:.1} {:.1}L{:.1} {:.1}\"/>\n", from.0, from.1, to.0, to.1);
    }

    /// A shaded range of the horizontal axis, from top to bottom.
    pub(super) fn band(&mut self, from: f64, to: f64, title: &str) {
        let (x, end) = (self.across(from), self.across(to));
        let (top, height) = (self.top, self.height - self.top - self.bottom);
        self.body += &format!(
            "<rect class=\"band\" x=\"{x:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{}</title></rect>\n",
            end - x,
            escape(title)
        );
    }

    /// Width of the area between the axes.
    pub(super) fn inner_width(&self) -> f64 {
        self.width - self.left - self.right
    }

    /// Left, right, upper and lower edge of the area between the axes.
    pub(super) fn edges(&self) -> (f64, f64, f64, f64) {
        (self.left, self.width - self.right, self.top, self.height - self.bottom)
    }

    /// The whole as an `svg` element; `about` says what it shows to those who cannot see it.
    pub(super) fn finish(self, about: &str) -> String {
        format!(
            "<div class=\"scroll\"><svg class=\"plot\" viewBox=\"0 0 {:.0} {:.0}\" role=\"img\" aria-label=\"{}\">\n{}</svg></div>\n",
            self.width,
            self.height,
            escape(about),
            self.body
        )
    }
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
        assert_eq!(labels(&Axis::of_values("", Unit::Plain, false, [21.0, 38.0].into_iter())), ["20", "25", "30", "35", "40"]);
        assert_eq!(labels(&Axis::of_steps("", 30)), ["5", "10", "15", "20", "25", "30"]);
    }

    #[test]
    fn what_has_no_place_breaks_the_line() {
        let axis = || Axis::of_errors("", [0.001, 0.5].into_iter());
        let mut plot = Plot::without_grid(100, 100, 10, 10, Axis::of_steps("", 5), axis());
        plot.line("", [0.01, 0.02, f64::NAN, 0.0, 0.4].iter().zip(1..).map(|(y, x)| (f64::from(x), *y)), "");
        assert_eq!(plot.body.matches('M').count(), 2);
        assert!(!plot.finish("").contains("NaN"));
    }

    proptest! {
        #[test]
        fn every_finite_value_has_a_place(values in proptest::collection::vec(1e-12f64..1e6, 1..8)) {
            for axis in [Axis::of_errors("", values.iter().copied()), Axis::of_values("", Unit::Plain, false, values.iter().copied())] {
                prop_assert!(values.iter().all(|value| axis.place(*value).is_some()), "{axis:?}");
                let ticks = axis.ticks();
                prop_assert!(!ticks.is_empty() && ticks.len() < 21, "{axis:?} {ticks:?}");
            }
        }

        #[test]
        fn odd_values_never_panic(values in proptest::collection::vec(any::<f64>(), 0..4)) {
            for axis in [Axis::of_errors("", values.iter().copied()), Axis::of_values("", Unit::Plain, true, values.iter().copied())] {
                axis.ticks();
                values.iter().for_each(|value| { axis.place(*value); });
            }
        }
    }
}
