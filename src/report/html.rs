//! The report as one page that needs no scripts and no other files.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use sdxl_pipeline::picture::Picture;
use squeeze_base::error::Result;
use squeeze_base::number;

use super::comparison::{Comparison, LayerRow, Row, Spread};
use super::intervals::intervals;
use super::markup::{facts, image, isolated, list, visible};
use super::plot::swatch;
use super::{charts, curve};

/// Even if text from a prompt escaped from its element, it could neither run nor load anything.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

/// Widths at which the page shows pictures, in pixels: smaller ones are enlarged to at least the
/// first by a whole number, larger ones reduced to the second.
const PICTURE_WIDTHS: (u32, u32) = (128, 256);

/// The page.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::Error::Argument) if a picture's bytes do not match its size.
pub fn page(comparison: &Comparison) -> Result<String> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (visible(&comparison.title)) }
                style { (PreEscaped(include_str!("report.css"))) }
            }
            body {
                main {
                    (header(comparison))
                    (results(comparison)?)
                    (sizes(comparison))
                    (confidence(comparison))
                    (pictures(comparison)?)
                    @if !comparison.rows.is_empty() {
                        section {
                            h2 { "Where the error is" }
                            (charts::size_and_psnr(comparison))
                            (charts::latents_by_step(comparison))
                            (charts::error_by_stage(comparison))
                            (charts::error_by_layer(comparison))
                        }
                        section {
                            h2 { "Every config" }
                            @for (index, row) in comparison.rows.iter().enumerate() { (config(index, row)) }
                        }
                    }
                    (how(comparison))
                    footer { "Made by " (isolated(&comparison.created_by)) " " (isolated(&comparison.version)) "." }
                }
            }
        }
    };
    Ok(page.into_string())
}

fn header(comparison: &Comparison) -> Markup {
    html! {
        header {
            h1 { (isolated(&comparison.title)) }
            p {
                (plural(comparison.rows.len(), "config")) " of " (isolated(&comparison.model)) ", whose UNet takes "
                (number::size(comparison.dense.bytes)) " uncompressed. Judged by how close "
                (plural(comparison.judged.len(), "picture"))
                " stay to the ones that the uncompressed model draws from the same noise."
            }
        }
        (list("warnings", &comparison.warnings))
    }
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

fn results(comparison: &Comparison) -> Result<Markup> {
    let dense = &comparison.dense;
    let unmeasured = ["UNet error", "PSNR mean", "PSNR worst", "SSIM mean", "SSIM worst", "Time", "Memory"];
    Ok(html! {
        section {
            h2 { "Results" }
            div.results.scroll {
                table {
                    (results_head())
                    tbody {
                        tr.dense {
                            (thumbnail(dense.pictures.first(), &dense.name)?)
                            th.name scope="row" { (isolated(&dense.name)) }
                            (size(dense.bytes, dense.bytes))
                            (cell("Sparsity", number::NONE))
                            (cell("Bits a weight", &number::fixed(dense.bits_per_weight, 2)))
                            @for label in unmeasured { (cell(label, number::NONE)) }
                        }
                        @if let Some(floor) = &comparison.noise_floor { (noise_floor(floor)) }
                        @for (index, row) in comparison.rows.iter().enumerate() {
                            (result(index, row, dense.bytes)?)
                        }
                    }
                }
            }
        }
    })
}

fn results_head() -> Markup {
    html! {
        thead {
            tr {
                th rowspan="2" {}
                th.name rowspan="2" scope="col" { "Config" }
                th rowspan="2" scope="col" { "Size" }
                th rowspan="2" scope="col" { "Sparsity" }
                th rowspan="2" scope="col" { "Bits a" br; "weight" }
                th rowspan="2" scope="col" { "UNet" br; "error" }
                th.span colspan="2" scope="colgroup" { "PSNR, dB" }
                th.span colspan="2" scope="colgroup" { "SSIM" }
                th rowspan="2" scope="col" { "Time" }
                th rowspan="2" scope="col" { "Peak" br; "memory" }
            }
            tr {
                @for measure in ["mean", "worst", "mean", "worst"] { th scope="col" { (measure) } }
            }
        }
    }
}

fn result(index: usize, row: &Row, dense_bytes: u64) -> Result<Markup> {
    Ok(html! {
        tr {
            (thumbnail(row.pictures.first(), &row.name)?)
            th.name scope="row" {
                (swatch(index)) (isolated(&row.name))
                @if !row.warnings.is_empty() {
                    span.note { a href={ "#config-" (index) } { (plural(row.warnings.len(), "warning")) } }
                }
            }
            (size(row.bytes, dense_bytes))
            (cell("Sparsity", &number::percent(row.sparsity_stored)))
            (cell("Bits a weight", &number::fixed(row.bits_per_weight, 2)))
            (closeness(row))
            (cell("Time", &number::time(row.seconds)))
            (cell("Memory", &row.peak_bytes.map_or_else(|| number::NONE.into(), number::size)))
        }
    })
}

/// The dense model in another dtype, which has no file and was not compressed.
fn noise_floor(row: &Row) -> Markup {
    html! {
        tr.dense {
            td.picture {}
            th.name scope="row" { (isolated(&row.name)) }
            @for label in ["Size", "Sparsity", "Bits a weight"] { (cell(label, number::NONE)) }
            (closeness(row))
            @for label in ["Time", "Memory"] { (cell(label, number::NONE)) }
        }
    }
}

/// The cells of a row's measures.
fn closeness(row: &Row) -> Markup {
    html! {
        (cell("UNet error", &number::percent(row.unet_error)))
        (cell("PSNR mean", &number::fixed(row.psnr.mean, 2)))
        (cell("PSNR worst", &number::fixed(row.psnr.worst, 2)))
        (cell("SSIM mean", &number::fixed(row.ssim.mean, 4)))
        (cell("SSIM worst", &number::fixed(row.ssim.worst, 4)))
    }
}

/// The curves of a sweep, or nothing if there are none.
fn sizes(comparison: &Comparison) -> Markup {
    curve::sizes(comparison).map_or_else(|| html! {}, |grid| grid.section("Sizes", &curve::size_and_error(comparison)))
}

/// The table of intervals, or nothing if there are none.
fn confidence(comparison: &Comparison) -> Markup {
    intervals(comparison).map_or_else(|| html! {}, |grid| grid.section("Confidence", &html! {}))
}

fn cell(label: &str, value: &str) -> Markup {
    html! { td data-label=(label) .none[value == number::NONE] { (value) } }
}

/// MiB in large type, GiB and the exact bytes in small type, and a bar for the share of the dense
/// model's bytes.
fn size(bytes: u64, dense: u64) -> Markup {
    let share = if dense == 0 { 0.0 } else { (100.0 * bytes as f64 / dense as f64).min(100.0) };
    html! {
        td data-label="Size" {
            (number::mib(bytes))
            span.bar { i style=(format!("width:{share:.1}%")) {} }
            small { (number::gib(bytes)) }
            small { (number::count(bytes)) " bytes" }
        }
    }
}

fn thumbnail(picture: Option<&Picture>, about: &str) -> Result<Markup> {
    Ok(html! {
        td.picture {
            @if let Some(picture) = picture { (image(picture, about)?) }
        }
    })
}

/// One column for each prompt, with every model's picture below the other. Columns wrap, so that
/// the page never scrolls sideways.
fn pictures(comparison: &Comparison) -> Result<Markup> {
    let dense = (&comparison.dense.name, &comparison.dense.pictures, None);
    let rows = comparison.rows.iter().map(|row| (&row.name, &row.pictures, Some(&row.psnr)));
    let models: Vec<(&String, &Vec<Picture>, Option<&Spread>)> = std::iter::once(dense).chain(rows).collect();
    let columns = models.iter().map(|(_, pictures, _)| pictures.len()).max().unwrap_or(0);
    if columns == 0 {
        return Ok(html! {});
    }
    let widest = models.iter().flat_map(|(_, pictures, _)| pictures.iter()).map(|picture| picture.width).max();
    let width = widest.map_or(PICTURE_WIDTHS.0, shown_width);
    Ok(html! {
        section {
            h2 { "Pictures" }
            @if columns < comparison.judged.len() {
                p { "The first " (columns) " of " (comparison.judged.len()) "." }
            }
            div.pictures style=(format!("--width:{width}px;--rows:{}", models.len() + 1)) {
                @for index in 0..columns {
                    @let judged = comparison.judged.get(index);
                    div.prompt {
                        h3 { @if let Some(judged) = judged { (isolated(&judged.prompt)) } }
                        @for (name, pictures, psnr) in &models {
                            div.shot {
                                @if let Some(picture) = pictures.get(index) {
                                    @let about = judged.map_or_else(String::new, |judged| {
                                        format!("{name}: {}, seed {}", judged.prompt, judged.seed)
                                    });
                                    (image(picture, &about)?)
                                    small {
                                        (isolated(name))
                                        @if let Some(psnr) = psnr.and_then(|psnr| psnr.each.get(index)) {
                                            b { (number::fixed(*psnr, 1)) " dB" }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    })
}

/// Width in the page of a picture that is `width` pixels wide.
fn shown_width(width: u32) -> u32 {
    let (least, most) = PICTURE_WIDTHS;
    width.saturating_mul(least.div_ceil(width.max(1)).max(1)).min(most)
}

/// A config's warnings, numbers, YAML and layers, folded.
fn config(index: usize, row: &Row) -> Markup {
    let asked = row.sparsity_asked.map_or_else(|| "none".into(), number::percent);
    let numbers = facts(&[
        ("File", html! { (number::count(row.bytes)) " bytes" }),
        ("Compressed weights in it", html! { (number::count(row.compressed_weight_bytes)) " bytes" }),
        ("Bits a compressed weight", html! { (number::fixed(row.bits_per_weight, 4)) }),
        ("Sparsity asked, stored", html! { (asked) ", " (number::percent(row.sparsity_stored)) }),
        ("UNet error", html! { (number::percent(row.unet_error)) }),
        ("Latent error: mean, median, worst", spread(&row.latent_error, number::percent)),
        ("PSNR: mean, median, worst", spread(&row.psnr, |value| number::fixed(value, 2))),
        ("SSIM: mean, median, worst", spread(&row.ssim, |value| number::fixed(value, 4))),
        (
            "LPIPS: mean, median, worst",
            row.lpips.as_ref().map_or_else(|| html! { (number::NONE) }, |lpips| spread(lpips, |value| number::fixed(value, 4))),
        ),
        ("Layers compressed", html! { (row.layers.len()) }),
    ]);
    let yaml = row.config_yaml.trim_end();
    html! {
        details id={ "config-" (index) } {
            summary {
                (isolated(&row.name))
                span { (number::size(row.bytes)) " · " (number::fixed(row.bits_per_weight, 2)) " bits a weight" }
            }
            div {
                (list("warnings", &row.warnings))
                (numbers)
                @if !yaml.is_empty() {
                    h4 { "Config as resolved" }
                    pre { (visible(yaml)) }
                }
                (layers(&row.layers))
            }
        }
    }
}

/// Mean, median and worst of a measure.
fn spread(spread: &Spread, text: impl Fn(f64) -> String) -> Markup {
    html! { (text(spread.mean)) ", " (text(spread.median)) ", " (text(spread.worst)) }
}

/// Columns of numbers in the table of layers.
const LAYER_COLUMNS: [&str; 8] =
    ["shape", "bits a weight", "sparsity", "bytes", "vectors", "weight error", "output error, pruned", "output error"];

fn layers(layers: &[LayerRow]) -> Markup {
    html! {
        @if !layers.is_empty() {
            h4 { "Layers" }
            div.layers {
                table {
                    thead {
                        tr {
                            th.left scope="col" { "layer" }
                            th.left scope="col" { "kind" }
                            @for column in LAYER_COLUMNS { th scope="col" { (column) } }
                        }
                    }
                    tbody {
                        @for layer in layers {
                            tr {
                                td.left { (visible(&layer.name)) }
                                td.left { (visible(&layer.kind)) }
                                @for number in layer_numbers(layer) { td { (number) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn layer_numbers(layer: &LayerRow) -> [String; LAYER_COLUMNS.len()] {
    [
        number::shape(&layer.shape),
        number::fixed(layer.bits_per_weight, 2),
        number::percent(layer.sparsity),
        number::count(layer.bytes),
        layer.vectors.map_or_else(|| number::NONE.into(), number::count),
        number::percent(layer.weight_error),
        number::maybe_percent(layer.pruned_error),
        number::maybe_percent(layer.output_error),
    ]
}

fn how(comparison: &Comparison) -> Markup {
    html! {
        section {
            h2 { "How it was measured" }
            (list("how", &comparison.how))
            (facts(&[("Model", isolated(&comparison.model)), ("Device", isolated(&comparison.device))]))
            @if !comparison.judged.is_empty() {
                h4 { "Judged on" }
                ul.prompts {
                    @for judged in &comparison.judged {
                        li { (isolated(&judged.prompt)) " " small { "seed " (judged.seed) } }
                    }
                }
            }
            @if !comparison.calibration.is_empty() {
                h4 { "Calibrated on " (comparison.calibration.len()) " prompts" }
                (list("prompts", &comparison.calibration))
            }
        }
    }
}
