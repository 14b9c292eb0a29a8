//! The report's plots.

use maud::{Markup, html};
use squeeze_base::number;

use super::axis::{Axis, Unit};
use super::comparison::{Comparison, LayerRow, Row};
use super::markup::{figure, isolated};
use super::plot::{Plot, style, swatch};

const WIDTH: u32 = 760;
/// Upper bound for the width of a label's letter, in a plot's units.
const LETTER: f64 = 7.2;
/// Denoising steps up to which each step has a dot with its number.
const MOST_DOTS: usize = 60;

/// Closeness to the dense pictures against size.
pub(super) fn size_and_psnr(comparison: &Comparison) -> Markup {
    let rows = &comparison.rows;
    let mib = |row: &Row| row.bytes as f64 / f64::from(1 << 20);
    let closeness = rows.iter().flat_map(|row| [row.psnr.mean, row.psnr.worst]);
    let x = Axis::of_values("size of the UNet, MiB", Unit::Plain, true, rows.iter().map(mib));
    let y = Axis::of_values("PSNR to the dense picture, dB", Unit::Plain, false, closeness);
    let mut plot = Plot::new(WIDTH, 340, 44, 42, x, y);
    let points: Vec<_> = rows.iter().map(|row| plot.point(mib(row), row.psnr.mean)).collect();
    for (series, (row, point)) in rows.iter().zip(&points).enumerate() {
        let Some(mean) = *point else { continue };
        if let Some(worst) = plot.point(mib(row), row.psnr.worst) {
            plot.rule(&format!("whisker {}", style(series)), mean, worst);
        }
        let size = number::size(row.bytes);
        let title = format!("{}: {size}, {:.2} dB, worst {:.2} dB", row.name, row.psnr.mean, row.psnr.worst);
        plot.dot(&style(series), mean, 5.0, &title);
    }
    let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    name_points(&mut plot, &names, &points);
    figure(
        "Closeness against size",
        "Dots are means over the judged pictures; a line leads down to the worst one. Up and left is better.",
        &plot.finish("PSNR of each config against its size"),
    )
}

/// Writes names beside points where there is room. The colours of the others are in the table of
/// results, and their dots have titles. An empty name is none.
pub(super) fn name_points(plot: &mut Plot, names: &[&str], points: &[Option<(f64, f64)>]) {
    let (left, right, top, bottom) = plot.edges();
    let mut taken: Vec<[f64; 4]> = points.iter().flatten().map(|(x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0]).collect();
    for (name, point) in names.iter().zip(points).filter(|(name, _)| !name.is_empty()) {
        let Some((x, y)) = *point else { continue };
        let wide = name.chars().count() as f64 * LETTER;
        let beside = [("start", x + 10.0, y + 4.0, 0.0), ("end", x - 10.0, y + 4.0, wide)];
        let above = [("start", x, y - 11.0, 0.0), ("end", x, y - 11.0, wide)];
        let below = [("start", x, y + 19.0, 0.0), ("end", x, y + 19.0, wide)];
        for (anchor, at, base, back) in [beside, above, below].concat() {
            let room = [at - back, base - 11.0, at - back + wide, base + 3.0];
            let inside = room[0] >= left && room[2] <= right && room[1] >= top && room[3] <= bottom;
            let free = |used: &[f64; 4]| room[0] > used[2] || used[0] > room[2] || room[1] > used[3] || used[1] > room[3];
            if inside && taken.iter().all(free) {
                plot.text(&format!("name {anchor}"), at, base, name);
                taken.push(room);
                break;
            }
        }
    }
}

/// Error of the latents after each denoising step.
pub(super) fn latents_by_step(comparison: &Comparison) -> Markup {
    let rows = &comparison.rows;
    let steps = rows.iter().map(|row| row.latent_error_by_step.len()).max().unwrap_or(0);
    if steps == 0 {
        return html! {};
    }
    let errors = rows.iter().flat_map(|row| row.latent_error_by_step.iter().copied());
    let y = Axis::of_errors("relative error of the latents", errors);
    let mut plot = Plot::new(WIDTH, 340, 52, 42, Axis::of_steps("denoising step", steps), y);
    for (series, row) in rows.iter().enumerate() {
        let points = || (1u32..).map(f64::from).zip(row.latent_error_by_step.iter().copied());
        plot.line(&style(series), points(), &row.name);
        for (step, error) in points().filter(|_| steps <= MOST_DOTS) {
            if let Some(point) = plot.point(step, error) {
                plot.dot(&style(series), point, 2.4, &format!("{}, step {step}: {}", row.name, number::percent(error)));
            }
        }
    }
    let last = |row: &Row| row.latent_error_by_step.last().copied();
    let plot = plot.finish("Latent error by step, a line for each config");
    figure(
        "Error of the latents by step",
        "The dense and the compressed UNet draw each prompt from the same noise, and their latents are compared after every \
         step; mean over the judged pictures.",
        &html! { (plot) (legend(rows, "after the last step", last)) },
    )
}

/// Height of a row's mark within the band of a stage.
const LANE: f64 = 7.0;

/// Output error of each stage.
pub(super) fn error_by_stage(comparison: &Comparison) -> Markup {
    let rows = &comparison.rows;
    let mut stages: Vec<&str> = Vec::new();
    for stage in rows.iter().flat_map(|row| &row.stages) {
        if !stages.contains(&stage.name.as_str()) {
            stages.push(&stage.name);
        }
    }
    let Some(longest) = stages.iter().map(|name| name.chars().count()).max() else { return html! {} };
    let band = rows.len() as f64 * LANE + 14.0;
    let errors = rows.iter().flat_map(|row| &row.stages).map(|stage| stage.error);
    let x = Axis::of_errors("relative error of the stage's output", errors);
    let height = 26.0 + 42.0 + band * stages.len() as f64;
    let left = (longest as f64 * LETTER + 12.0).clamp(60.0, 260.0) as u32;
    let mut plot = Plot::without_grid(WIDTH, height as u32, left, 42, x, Axis::of_steps("", 2));
    plot.upright_grid();
    let (start, end, top, _) = plot.edges();
    for (i, name) in stages.iter().enumerate() {
        let above = top + i as f64 * band;
        plot.rule("grid", (start, above), (end, above));
        plot.text("name end", start - 8.0, above + band / 2.0 + 4.0, name);
        for (series, row) in rows.iter().enumerate() {
            let y = above + 7.0 + (series as f64 + 0.5) * LANE;
            for stage in row.stages.iter().filter(|stage| stage.name == **name) {
                if let Some(x) = plot.position(stage.error) {
                    plot.rule(&format!("stem {}", style(series)), (start, y), (x, y));
                    let title = format!("{}, {name}: {}", row.name, number::percent(stage.error));
                    plot.dot(&style(series), (x, y), 3.4, &title);
                }
            }
        }
    }
    let last = |row: &Row| row.stages.last().map(|stage| stage.error);
    let plot = plot.finish("Output error of each stage and config");
    figure(
        "Error by stage",
        "Relative error of each stage's output on the dense model's calls, with all stages before it compressed too.",
        &html! { (plot) (legend(rows, "of the last stage", last)) },
    )
}

/// One strip for each config: the error of every layer, in execution order.
pub(super) fn error_by_layer(comparison: &Comparison) -> Markup {
    let rows: Vec<&Row> = comparison.rows.iter().filter(|row| !row.layers.is_empty()).collect();
    if rows.is_empty() {
        return html! {};
    }
    let errors = || rows.iter().flat_map(|row| row.layers.iter().map(LayerRow::error));
    let body = html! {
        ul.legend {
            li { span.key.k0 {} "Linear" }
            li { span.key.k1 {} "Conv2d" }
            li { span.key.hollow {} "hollow: error of the weight, where no calibration input was seen" }
        }
        @for row in &rows { (strip(row, Axis::of_errors("", errors()))) }
    };
    figure(
        "Error by layer",
        "Relative error of each layer's output on its calibration inputs, in execution order; every second stage is shaded, and \
         all strips have one scale. Point at a dot for the layer's name.",
        &body,
    )
}

fn strip(row: &Row, y: Axis) -> Markup {
    let count = row.layers.len();
    let mut plot = Plot::without_grid(WIDTH, 168, 52, 24, Axis::of_steps("", count), y);
    let (left, right, _, bottom) = plot.edges();
    let place = |index: usize| index as f64 / count as f64;
    let across = |place: f64| left + place * (right - left);
    let mut from = 0;
    for (i, stage) in row.layers.chunk_by(|a, b| a.stage == b.stage).enumerate() {
        let (to, name) = (from + stage.len(), &stage[0].stage);
        if i % 2 == 0 {
            plot.band(place(from), place(to), name);
        }
        if name.chars().count() as f64 * 6.0 < across(place(to)) - across(place(from)) {
            plot.text("tick middle", across((place(from) + place(to)) / 2.0), bottom + 15.0, name);
        }
        from = to;
    }
    plot.level_grid();
    let radius = if count > 300 { 1.8 } else { 2.8 };
    for (i, layer) in row.layers.iter().enumerate() {
        let Some((_, y)) = plot.point(1.0, layer.error()) else { continue };
        let hue = if layer.kind.starts_with("Conv") { "k1" } else { "k0" };
        let (hollow, of) = if layer.output_error.is_none() { (" hollow", " of the weight") } else { ("", "") };
        let title = format!("{}: {}{of}", layer.name, number::percent(layer.error()));
        plot.dot(&format!("{hue}{hollow}"), (across((i as f64 + 0.5) / count as f64), y), radius, &title);
    }
    plot.text("strip", left, 15.0, &row.name);
    plot.finish(&format!("Error of each layer of {}", row.name))
}

/// The marks of the configs with their names, and a number for each.
fn legend(rows: &[Row], about: &str, value: impl Fn(&Row) -> Option<f64>) -> Markup {
    html! {
        ul.legend {
            @for (series, row) in rows.iter().enumerate() {
                li {
                    (swatch(series)) (isolated(&row.name))
                    @if let Some(value) = value(row) { " " b { (number::percent(value)) } }
                }
            }
            li.about { "numbers: " (about) }
        }
    }
}
