//! The curves of a sweep: the UNet's error against size, as a plot and in numbers.

use std::path::Path;

use maud::{Markup, html};
use squeeze_base::error::Result;
use squeeze_base::number;
use squeeze_base::output::write_file;

use super::axis::{Axis, Unit};
use super::charts::name_points;
use super::comparison::{Comparison, Row};
use super::grid::Grid;
use super::markup::figure;
use super::plot::{Plot, style};

const WIDTH: u32 = 760;
const HEIGHT: u32 = 400;
/// What the plot shows, for those who cannot see it.
const ABOUT: &str = "UNet error of each config against its size, a line for each curve";

/// A config at several sizes.
struct Curve<'a> {
    name: &'a str,
    /// Its rows by their bytes.
    rows: Vec<&'a Row>,
}

/// The curves in the order of their first rows.
fn curves(comparison: &Comparison) -> Vec<Curve<'_>> {
    let mut curves: Vec<Curve> = Vec::new();
    for row in &comparison.rows {
        let Some(name) = &row.curve else { continue };
        match curves.iter_mut().find(|curve| curve.name == name) {
            Some(curve) => curve.rows.push(row),
            None => curves.push(Curve { name, rows: vec![row] }),
        }
    }
    curves.iter_mut().for_each(|curve| curve.rows.sort_by_key(|row| row.bytes));
    curves
}

impl Curve<'_> {
    /// The error at a size: linear in the bytes between two sizes, by its logarithm. `None` outside
    /// of the curve, and between errors that have no logarithm.
    fn error_at(&self, bytes: u64) -> Option<f64> {
        if let Some(row) = self.rows.iter().find(|row| row.bytes == bytes) {
            return Some(row.unet_error);
        }
        let pair = self.rows.windows(2).find(|pair| (pair[0].bytes..pair[1].bytes).contains(&bytes))?;
        let share = (bytes - pair[0].bytes) as f64 / (pair[1].bytes - pair[0].bytes) as f64;
        let [from, to] = [pair[0].unet_error, pair[1].unet_error];
        (from > 0.0 && to > 0.0).then(|| from * (to / from).powf(share))
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A share in percent. Errors of one curve span factors of ten, so it has three decimals.
fn percent(share: f64) -> String {
    number::fixed(100.0 * share, 3)
}

/// The plot; `None` if there are no curves.
fn plot(comparison: &Comparison) -> Option<Plot> {
    let (rows, curves) = (&comparison.rows, curves(comparison));
    if curves.is_empty() {
        return None;
    }
    let interval = |row: &Row| row.intervals.map(|intervals| [intervals.unet_error.low, intervals.unet_error.high]);
    let errors = rows.iter().flat_map(|row| std::iter::once(row.unet_error).chain(interval(row).into_iter().flatten()));
    let x = Axis::of_values("size of the UNet, MiB", Unit::Plain, false, rows.iter().map(|row| mib(row.bytes)));
    let mut plot = Plot::new(WIDTH, HEIGHT, 60, 42, x, Axis::of_errors_by_factor("UNet error", errors));
    for (series, curve) in curves.iter().enumerate() {
        let points = curve.rows.iter().map(|row| (mib(row.bytes), row.unet_error));
        plot.line(&format!("curve d{}", series % 3), points, curve.name);
    }
    let points: Vec<_> = rows.iter().map(|row| plot.point(mib(row.bytes), row.unet_error)).collect();
    for (series, (row, point)) in rows.iter().zip(&points).enumerate() {
        let Some(point) = *point else { continue };
        let ends = interval(row).map(|ends| ends.map(|end| plot.point(mib(row.bytes), end)));
        if let Some([Some(low), Some(high)]) = ends {
            plot.rule(&format!("whisker {}", style(series)), low, high);
        }
        let (size, error) = (number::size(row.bytes), number::percent(row.unet_error));
        plot.dot(&style(series), point, 5.0, &format!("{}: {size}, {error}", row.name));
    }
    // A curve has its name at its smallest size, and its other sizes are told by the axis.
    let names: Vec<&str> = rows
        .iter()
        .map(|row| match &row.curve {
            None => row.name.as_str(),
            Some(name) if curves.iter().any(|curve| std::ptr::eq(curve.rows[0], row)) => name,
            Some(_) => "",
        })
        .collect();
    name_points(&mut plot, &names, &points);
    Some(plot)
}

/// Error against size as a figure of the page; nothing if there are no curves.
pub(super) fn size_and_error(comparison: &Comparison) -> Markup {
    let Some(plot) = plot(comparison) else { return html! {} };
    figure(
        "Error against size",
        "Each line is one config at several sizes; dots off the lines are other configs. Upright lines are 95 % confidence \
         intervals. The scale of the error is logarithmic. Down and left is better.",
        &plot.finish(ABOUT),
    )
}

/// Writes the plot as an SVG file; nothing if there are no curves.
///
/// # Errors
/// [`Error::Write`](squeeze_base::Error::Write).
pub(super) fn write_svg(comparison: &Comparison, path: &Path) -> Result<bool> {
    let Some(plot) = plot(comparison) else { return Ok(false) };
    let drawing = plot.finish_alone(ABOUT, include_str!("curve.css"));
    write_file(path, |out| out.write_all(drawing.as_bytes()))?;
    Ok(true)
}

/// All rows by their bytes, each with the error of every curve at its size; `None` if there are no
/// curves.
#[must_use]
pub fn sizes(comparison: &Comparison) -> Option<Grid> {
    let curves = curves(comparison);
    if curves.is_empty() {
        return None;
    }
    let mut header: Vec<String> = ["config", "bytes", "bits/weight", "PSNR", "UNet error, %"].map(str::to_owned).into();
    header.extend(curves.iter().map(|curve| format!("{} there, %", curve.name)));
    let mut rows: Vec<&Row> = comparison.rows.iter().collect();
    rows.sort_by_key(|row| row.bytes);
    let line = |row: &Row| {
        let mut cells = vec![
            row.name.clone(),
            number::count(row.bytes),
            number::fixed(row.bits_per_weight, 2),
            number::fixed(row.psnr.mean, 2),
            percent(row.unet_error),
        ];
        let there = |curve: &Curve| curve.error_at(row.bytes).map_or_else(|| number::NONE.to_owned(), percent);
        cells.extend(curves.iter().map(there));
        cells
    };
    Some(Grid { title: "Error against size".into(), header, rows: rows.into_iter().map(line).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, curve: Option<&str>, bytes: u64, unet_error: f64) -> Row {
        Row { name: name.into(), curve: curve.map(str::to_owned), bytes, unet_error, bits_per_weight: 3.0, ..Row::default() }
    }

    fn comparison() -> Comparison {
        let rows = vec![
            row("a-3.0-bits", Some("a"), 3 << 20, 0.001),
            row("a-2.0-bits", Some("a"), 2 << 20, 0.1),
            row("b-2.0-bits", Some("b"), 2 << 20, 0.0),
            row("b-3.0-bits", Some("b"), 3 << 20, 0.02),
            row("<point>", None, 5 << 19, 0.06),
        ];
        Comparison { rows, ..Comparison::default() }
    }

    #[test]
    fn points_are_compared_with_curves_at_their_own_sizes() {
        let grid = sizes(&comparison()).unwrap();
        assert_eq!(grid.header[4..], ["UNet error, %", "a there, %", "b there, %"]);
        let names: Vec<&str> = grid.rows.iter().map(|cells| cells[0].as_str()).collect();
        assert_eq!(names, ["a-2.0-bits", "b-2.0-bits", "<point>", "a-3.0-bits", "b-3.0-bits"]);
        // Half-way between 10 % and 0.1 % by logarithms; zero has no logarithm.
        assert_eq!(grid.rows[2][4..], ["6.000", "1.000", number::NONE]);
        assert_eq!(grid.rows[3][5..], ["0.100", "2.000"]);
        let outside = Curve { name: "a", rows: vec![&comparison().rows[0]] }.error_at(4 << 20);
        assert_eq!(outside, None);
        assert_eq!(sizes(&Comparison { rows: vec![row("x", None, 1, 0.1)], ..Comparison::default() }), None);
    }

    #[test]
    fn the_drawing_stands_alone_and_has_a_line_for_each_curve() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curve.svg");
        let mut comparison = comparison();
        assert!(write_svg(&comparison, &path).unwrap());
        let drawing = std::fs::read_to_string(&path).unwrap();
        let document = roxmltree::Document::parse(&drawing).unwrap();
        let svg = document.root_element();
        assert_eq!((svg.tag_name().name(), svg.tag_name().namespace()), ("svg", Some("http://www.w3.org/2000/svg")));
        let lines = document.descendants().filter(|node| node.attribute("class").is_some_and(|class| class.starts_with("line")));
        // One size of `b` has no place on the scale.
        assert_eq!(lines.count(), 2);
        assert_eq!(document.descendants().filter(|node| node.has_tag_name("circle")).count(), 4);
        for text in ["a", "<point>"] {
            assert!(document.descendants().any(|node| node.has_tag_name("text") && node.text() == Some(text)), "{text}");
        }
        assert!(!drawing.contains("var(") && !drawing.contains("NaN"));
        comparison.rows.iter_mut().for_each(|row| row.curve = None);
        assert!(!write_svg(&comparison, &folder.path().join("none.svg")).unwrap());
        assert!(size_and_error(&comparison).into_string().is_empty() && !folder.path().join("none.svg").exists());
    }
}
