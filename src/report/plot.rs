//! Plots as SVG: a grid, and marks on it. Colours and type come from the page's style sheet, so
//! that plots follow its light and dark colours.
//!
//! Marks carry a `title`, which browsers show to those who point at them.

use maud::{Markup, PreEscaped, html};

use super::axis::Axis;
use super::markup::visible;

/// Styles repeat after three times as many series: filled marks, then hollow and dashed ones, then
/// hollow and dotted ones.
const HUES: usize = 6;

/// Room above and on the right of the area between the axes.
const TOP: f64 = 26.0;
const RIGHT: f64 = 14.0;

/// CSS classes of a series' marks.
pub(super) fn style(series: usize) -> String {
    format!("c{} d{}", series % HUES, series / HUES % 3)
}

/// A sample of a series' marks, for legends and tables.
pub(super) fn swatch(series: usize) -> Markup {
    html! {
        svg class={ "swatch " (style(series)) } viewBox="0 0 26 10" width="26" height="10" aria-hidden="true" {
            path d="M1 5H25" {}
            circle cx="13" cy="5" r="3.5" {}
        }
    }
}

/// A plot under construction. Lengths are in its own units, from the upper left corner.
pub(super) struct Plot {
    body: String,
    width: f64,
    height: f64,
    left: f64,
    bottom: f64,
    x: Axis,
    y: Axis,
}

impl Plot {
    /// An empty plot with both grids. `left` and `bottom` are the room for the labels of the
    /// vertical and the horizontal axis.
    pub(super) fn new(width: u32, height: u32, left: u32, bottom: u32, x: Axis, y: Axis) -> Self {
        let mut plot = Self::without_grid(width, height, left, bottom, x, y);
        plot.upright_grid();
        plot.level_grid();
        plot
    }

    /// An empty plot as of [`Plot::new`], without grids and labels.
    pub(super) fn without_grid(width: u32, height: u32, left: u32, bottom: u32, x: Axis, y: Axis) -> Self {
        Plot { body: String::new(), width: width.into(), height: height.into(), left: left.into(), bottom: bottom.into(), x, y }
    }

    /// Grid lines, labels and title of the vertical axis.
    pub(super) fn level_grid(&mut self) {
        let (left, right, ..) = self.edges();
        for (place, label) in self.y.ticks() {
            let y = self.down(place);
            self.rule("grid", (left, y), (right, y));
            self.text("tick end", left - 7.0, y + 4.0, &label);
        }
        let title = self.y.title().to_owned();
        self.text("axis", 2.0, 13.0, &title);
    }

    /// Grid lines, labels and title of the horizontal axis.
    pub(super) fn upright_grid(&mut self) {
        let (_, right, top, bottom) = self.edges();
        for (place, label) in self.x.ticks() {
            let x = self.across(place);
            self.rule("grid", (x, top), (x, bottom));
            self.text("tick middle", x, bottom + 16.0, &label);
        }
        let title = self.x.title().to_owned();
        self.text("axis end", right, self.height - 4.0, &title);
    }

    fn across(&self, place: f64) -> f64 {
        let (left, right, ..) = self.edges();
        left + place * (right - left)
    }

    fn down(&self, place: f64) -> f64 {
        let (.., top, bottom) = self.edges();
        bottom - place * (bottom - top)
    }

    /// Position of a point; none if it is outside of an axis.
    pub(super) fn point(&self, x: f64, y: f64) -> Option<(f64, f64)> {
        Some((self.across(self.x.place(x)?), self.down(self.y.place(y)?)))
    }

    /// Horizontal position of a value; none if it is outside of the axis.
    pub(super) fn position(&self, x: f64) -> Option<f64> {
        Some(self.across(self.x.place(x)?))
    }

    /// Text; `class` has its style and anchor.
    pub(super) fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        self.draw(&html! { text class=(class) x=(tenths(x)) y=(tenths(y)) { (visible(text)) } });
    }

    /// A line through the points; it breaks at points outside of the axes.
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
            self.draw(&html! { path class={ "line " (class) } d=(path) { title { (visible(title)) } } });
        }
    }

    /// A dot.
    pub(super) fn dot(&mut self, class: &str, (x, y): (f64, f64), radius: f64, title: &str) {
        self.draw(&html! {
            circle class={ "dot " (class) } cx=(tenths(x)) cy=(tenths(y)) r=(radius) { title { (visible(title)) } }
        });
    }

    /// A thin straight line.
    pub(super) fn rule(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let path = format!("M{:.1} {:.1}L{:.1} {:.1}", from.0, from.1, to.0, to.1);
        self.draw(&html! { path class=(class) d=(path) {} });
    }

    /// A shaded range of the horizontal axis, from top to bottom; `from` and `to` are 0 to 1.
    pub(super) fn band(&mut self, from: f64, to: f64, title: &str) {
        let (start, end) = (self.across(from), self.across(to));
        let (.., top, bottom) = self.edges();
        self.draw(&html! {
            rect class="band" x=(tenths(start)) y=(tenths(top)) width=(tenths(end - start)) height=(tenths(bottom - top)) {
                title { (visible(title)) }
            }
        });
    }

    /// Left, right, upper and lower edge of the area between the axes.
    pub(super) fn edges(&self) -> (f64, f64, f64, f64) {
        (self.left, self.width - RIGHT, TOP, self.height - self.bottom)
    }

    fn draw(&mut self, mark: &Markup) {
        self.body.push_str(&mark.0);
        self.body.push('\n');
    }

    /// The plot as a file of its own, drawn by the rules of `style`.
    pub(super) fn finish_alone(self, about: &str, style: &str) -> String {
        let (width, height) = (self.width, self.height);
        let markup = html! {
            svg xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (width) " " (height) } width=(width) height=(height)
                role="img" aria-label=(visible(about)) {
                style { (PreEscaped(style)) }
                (PreEscaped(self.body))
            }
        };
        markup.into_string()
    }

    /// The `svg` element; `about` describes it to those who cannot see it.
    pub(super) fn finish(self, about: &str) -> Markup {
        html! {
            div.scroll {
                svg.plot viewBox={ "0 0 " (self.width) " " (self.height) } role="img" aria-label=(visible(about)) {
                    (PreEscaped(self.body))
                }
            }
        }
    }
}

/// A length to a tenth of a unit.
fn tenths(length: f64) -> String {
    format!("{length:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_place_breaks_the_line() {
        let axis = || Axis::of_errors("", [0.001, 0.5].into_iter());
        let mut plot = Plot::without_grid(100, 100, 10, 10, Axis::of_steps("", 5), axis());
        plot.line("", [0.01, 0.02, f64::NAN, 0.0, 0.4].iter().zip(1..).map(|(y, x)| (f64::from(x), *y)), "");
        assert_eq!(plot.body.matches('M').count(), 2);
        assert!(!plot.finish("").into_string().contains("NaN"));
    }
}
