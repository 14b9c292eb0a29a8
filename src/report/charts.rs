//! The report's plots.

use super::comparison::{Comparison, LayerRow, Row};
use super::markup::{figure, said};
use super::plot::{Axis, Plot, Unit, style, swatch};
use crate::number;

const WIDTH: u32 = 760;
/// How wide a letter of a label is, at most, in a plot's units.
const LETTER: f64 = 7.2;

/// Size against closeness: what each byte buys.
pub(super) fn size_and_psnr(comparison: &Comparison) -> String {
    let rows = &comparison.rows;
    let mib = |row: &Row| row.bytes as f64 / f64::from(1 << 20);
    let spread = rows.iter().flat_map(|row| [row.psnr.mean, row.psnr.worst]);
    let x = Axis::of_values("size of the UNet, MiB", Unit::Plain, true, rows.iter().map(mib));
    let y = Axis::of_values("PSNR to the dense picture, dB", Unit::Plain, false, spread);
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
    name_points(&mut plot, rows, &points);
    figure(
        "Closeness against size",
        "Dots are means over the judged pictures; a line leads down to the worst one. Up and left is better.",
        &plot.finish("PSNR of each config against its size"),
    )
}

/// Writes names beside points where there is room; the others are in the legend, and say their names when pointed at.
fn name_points(plot: &mut Plot, rows: &[Row], points: &[Option<(f64, f64)>]) {
    let (left, right, top, bottom) = plot.edges();
    let mut taken: Vec<[f64; 4]> = points.iter().flatten().map(|(x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0]).collect();
    for (row, point) in rows.iter().zip(points) {
        let Some((x, y)) = *point else { continue };
        let wide = row.name.chars().count() as f64 * LETTER;
        let beside = [("start", x + 10.0, y + 4.0, 0.0), ("end", x - 10.0, y + 4.0, wide)];
        let over =
            [("start", x, y - 11.0, 0.0), ("end", x, y - 11.0, wide), ("start", x, y + 19.0, 0.0), ("end", x, y + 19.0, wide)];
        for (anchor, at, base, back) in beside.into_iter().chain(over) {
            let room = [at - back, base - 11.0, at - back + wide, base + 3.0];
            let inside = room[0] >= left && room[2] <= right && room[1] >= top && room[3] <= bottom;
            let free = |other: &[f64; 4]| room[0] > other[2] || other[0] > room[2] || room[1] > other[3] || other[1] > room[3];
            if inside && taken.iter().all(free) {
                plot.text(&format!("name {anchor}"), at, base, &row.name);
                taken.push(room);
                break;
            }
        }
    }
}

/// How the error grows, or heals, while a picture is drawn.
pub(super) fn latents_by_step(comparison: &Comparison) -> String {
    let rows = &comparison.rows;
    let steps = rows.iter().map(|row| row.latent_error_by_step.len()).max().unwrap_or(0);
    if steps == 0 {
        return String::new();
    }
    let y =
        Axis::of_errors("relative error of the latents", rows.iter().flat_map(|row| row.latent_error_by_step.iter().copied()));
    let mut plot = Plot::new(WIDTH, 340, 52, 42, Axis::of_steps("denoising step", steps), y);
    for (series, row) in rows.iter().enumerate() {
        let points = row.latent_error_by_step.iter().zip(1u32..).map(|(error, step)| (f64::from(step), *error));
        plot.line(&style(series), points, &row.name);
        if steps <= 60 {
            for (error, step) in row.latent_error_by_step.iter().zip(1u32..) {
                if let Some(point) = plot.point(step.into(), *error) {
                    plot.dot(&style(series), point, 2.4, &format!("{}, step {step}: {}", row.name, number::percent(*error)));
                }
            }
        }
    }
    let last = |row: &Row| row.latent_error_by_step.last().copied();
    let body = plot.finish("Latent error by step, a line for each config") + &legend(rows, "after the last step", last);
    figure(
        "Error of the latents by step",
        "The same noise and prompt, drawn by the dense and the compressed UNet, compared after every step; mean over the judged pictures.",
        &body,
    )
}

/// Which part of the UNet an error comes from.
pub(super) fn error_by_stage(comparison: &Comparison) -> String {
    let rows = &comparison.rows;
    let mut stages: Vec<&str> = Vec::new();
    for stage in rows.iter().flat_map(|row| &row.stages) {
        if !stages.contains(&stage.name.as_str()) {
            stages.push(&stage.name);
        }
    }
    if stages.is_empty() {
        return String::new();
    }
    let lane = 7.0;
    let band = rows.len() as f64 * lane + 14.0;
    let names = stages.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64 * LETTER + 12.0;
    let x =
        Axis::of_errors("relative error of the stage's output", rows.iter().flat_map(|row| &row.stages).map(|stage| stage.error));
    let height = 26.0 + 42.0 + band * stages.len() as f64;
    let left = names.clamp(60.0, 260.0) as u32;
    let mut plot = Plot::without_grid(WIDTH, height as u32, left, 42, x, Axis::of_steps("", 2));
    plot.upright_grid();
    let (start, end, top, _) = plot.edges();
    for (i, stage) in stages.iter().enumerate() {
        let above = top + i as f64 * band;
        plot.rule("grid", (start, above), (end, above));
        plot.text("name end", start - 8.0, above + band / 2.0 + 4.0, stage);
        for (series, row) in rows.iter().enumerate() {
            let y = above + 7.0 + (series as f64 + 0.5) * lane;
            for found in row.stages.iter().filter(|found| found.name == **stage) {
                if let Some((x, _)) = plot.point_in_band(found.error, 0.0) {
                    plot.rule(&format!("stem {}", style(series)), (start, y), (x, y));
                    let title = format!("{}, {stage}: {}", row.name, number::percent(found.error));
                    plot.dot(&style(series), (x, y), 3.4, &title);
                }
            }
        }
    }
    let last = |row: &Row| row.stages.last().map(|stage| stage.error);
    let body = plot.finish("Output error of each stage and config") + &legend(rows, "of the last stage", last);
    figure(
        "Error by stage",
        "How far each stage's output is from the dense one's, with all stages before it compressed too.",
        &body,
    )
}

/// A strip a config: every layer's error, in execution order.
pub(super) fn error_by_layer(comparison: &Comparison) -> String {
    let rows: Vec<&Row> = comparison.rows.iter().filter(|row| !row.layers.is_empty()).collect();
    if rows.is_empty() {
        return String::new();
    }
    let all = || rows.iter().flat_map(|row| row.layers.iter().map(LayerRow::error));
    let strips: String = rows.iter().map(|row| strip(row, Axis::of_errors("", all()))).collect();
    let key = "<ul class=\"legend\"><li><span class=\"key k0\"></span>Linear</li><li><span class=\"key k1\"></span>Conv2d</li>\
               <li><span class=\"key hollow\"></span>hollow: error of the weight, where no calibration input was seen</li></ul>\n";
    figure(
        "Error by layer",
        "Relative error of each layer's output on its calibration inputs, in execution order, stages shaded by turns; one scale for all. \
         Point at a dot for its name.",
        &format!("{key}{strips}"),
    )
}

fn strip(row: &Row, y: Axis) -> String {
    let count = row.layers.len();
    let mut plot = Plot::without_grid(WIDTH, 168, 52, 24, Axis::of_steps("", count), y);
    let place = |index: usize| index as f64 / count as f64;
    let (left, _, _, bottom) = plot.edges();
    let mut from = 0;
    for (i, stage) in row.layers.chunk_by(|a, b| a.stage == b.stage).enumerate() {
        let (to, name) = (from + stage.len(), stage.first().map_or("", |layer| &layer.stage));
        let width = (place(to) - place(from)) * plot.inner_width();
        if i % 2 == 0 {
            plot.band(place(from), place(to), name);
        }
        if name.chars().count() as f64 * 6.0 < width {
            let middle = left + (place(from) + place(to)) / 2.0 * plot.inner_width();
            plot.text("tick middle", middle, bottom + 15.0, name);
        }
        from = to;
    }
    plot.level_grid();
    let radius = if count > 300 { 1.8 } else { 2.8 };
    for (i, layer) in row.layers.iter().enumerate() {
        let Some((_, y)) = plot.point(1.0, layer.error()) else { continue };
        let x = left + (i as f64 + 0.5) / count as f64 * plot.inner_width();
        let hue = if layer.kind.starts_with("Conv") { "k1" } else { "k0" };
        let hollow = if layer.output_error.is_none() { " hollow" } else { "" };
        let of = if layer.output_error.is_none() { " of the weight" } else { "" };
        plot.dot(&format!("{hue}{hollow}"), (x, y), radius, &format!("{}: {}{of}", layer.name, number::percent(layer.error())));
    }
    plot.text("strip", left, 15.0, &row.name);
    plot.finish(&format!("Error of each layer of {}", row.name))
}

/// Which mark is whose, with a number for each.
fn legend(rows: &[Row], about: &str, value: impl Fn(&Row) -> Option<f64>) -> String {
    let items = rows.iter().enumerate().map(|(series, row)| {
        let value = value(row).map(|value| format!(" <b>{}</b>", number::percent(value))).unwrap_or_default();
        format!("<li>{}{}{value}</li>", swatch(series), said(&row.name))
    });
    format!("<ul class=\"legend\">{}<li class=\"about\">numbers: {about}</li></ul>\n", items.collect::<String>())
}
