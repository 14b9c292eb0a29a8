//! The report as one page that needs nothing else: no scripts, no other files, well-formed as XML.

use crate::error::Result;
use crate::picture::Picture;

use super::charts;
use super::comparison::{Comparison, LayerRow, Row, Spread};
use super::markup::{escape, facts, image, list, said};
use super::plot::swatch;
use crate::number;

/// Even if something of a prompt were to get out of its element, nothing can run and nothing can be loaded.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

/// The page.
///
/// # Errors
/// If a picture is not as large as it says.
pub fn page(comparison: &Comparison) -> Result<String> {
    let mut page = String::new();
    page += "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n";
    page += &format!("<meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\"/>\n");
    page += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n";
    page += &format!("<title>{}</title>\n<style>\n{}</style>\n</head>\n", escape(&comparison.title), include_str!("report.css"));
    page += "<body>\n<main>\n";
    page += &head(comparison);
    page += &results(comparison)?;
    page += &pictures(comparison)?;
    if !comparison.rows.is_empty() {
        page += "<section>\n<h2>Where the error is</h2>\n";
        page += &charts::size_and_psnr(comparison);
        page += &charts::latents_by_step(comparison);
        page += &charts::error_by_stage(comparison);
        page += &charts::error_by_layer(comparison);
        page += "</section>\n<section>\n<h2>Every config</h2>\n";
        page.extend(comparison.rows.iter().enumerate().map(|(index, row)| config(index, row)));
        page += "</section>\n";
    }
    page += &how(comparison);
    page += &format!("<footer>Made by {} {}.</footer>\n", said(&comparison.created_by), said(&comparison.version));
    page += "</main>\n</body>\n</html>\n";
    Ok(page)
}

fn head(comparison: &Comparison) -> String {
    let plural = |count: usize, what: &str| if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") };
    let (configs, pictures) = (plural(comparison.rows.len(), "config"), plural(comparison.judged.len(), "picture"));
    let (model, dense) = (said(&comparison.model), number::size(comparison.dense.bytes));
    format!(
        "<header>\n<h1>{}</h1>\n<p>{configs} of {model}, whose UNet takes {dense} uncompressed. \
         Judged by how close {pictures} stay to the ones that the uncompressed model draws from the same noise.</p>\n</header>\n{}",
        said(&comparison.title),
        list("warnings", &comparison.warnings)
    )
}

fn results(comparison: &Comparison) -> Result<String> {
    let dense = &comparison.dense;
    let mut body = format!(
        "<tr class=\"dense\">{}<th class=\"name\" scope=\"row\">{}</th>{}{}{}",
        thumbnail(dense.pictures.first(), &dense.name)?,
        said(&dense.name),
        size(dense.bytes, dense.bytes),
        cell("Sparsity", number::NONE),
        cell("Bits a weight", &number::fixed(dense.bits_per_weight, 2)),
    );
    for label in ["UNet error", "PSNR mean", "PSNR worst", "SSIM mean", "SSIM worst", "Time", "Memory"] {
        body += &cell(label, number::NONE);
    }
    body += "</tr>\n";
    for (index, row) in comparison.rows.iter().enumerate() {
        let notes = match row.warnings.len() {
            0 => String::new(),
            1 => format!("<span class=\"note\"><a href=\"#config-{index}\">1 warning</a></span>"),
            many => format!("<span class=\"note\"><a href=\"#config-{index}\">{many} warnings</a></span>"),
        };
        body += &format!(
            "<tr>{}<th class=\"name\" scope=\"row\">{}{}{notes}</th>{}{}{}{}{}{}{}{}{}{}</tr>\n",
            thumbnail(row.pictures.first(), &row.name)?,
            swatch(index),
            said(&row.name),
            size(row.bytes, dense.bytes),
            cell("Sparsity", &number::percent(row.sparsity_stored)),
            cell("Bits a weight", &number::fixed(row.bits_per_weight, 2)),
            cell("UNet error", &number::percent(row.unet_error)),
            cell("PSNR mean", &number::fixed(row.psnr.mean, 2)),
            cell("PSNR worst", &number::fixed(row.psnr.worst, 2)),
            cell("SSIM mean", &number::fixed(row.ssim.mean, 4)),
            cell("SSIM worst", &number::fixed(row.ssim.worst, 4)),
            cell("Time", &number::time(row.seconds)),
            cell("Memory", &row.peak_bytes.map_or_else(|| number::NONE.into(), number::size)),
        );
    }
    Ok(format!(
        "<section>\n<h2>Results</h2>\n<div class=\"results scroll\"><table>\n<thead>\
         <tr><th rowspan=\"2\"></th><th class=\"name\" rowspan=\"2\" scope=\"col\">Config</th><th rowspan=\"2\" scope=\"col\">Size</th>\
         <th rowspan=\"2\" scope=\"col\">Sparsity</th><th rowspan=\"2\" scope=\"col\">Bits a<br/>weight</th>\
         <th rowspan=\"2\" scope=\"col\">UNet<br/>error</th><th class=\"span\" colspan=\"2\" scope=\"colgroup\">PSNR, dB</th>\
         <th class=\"span\" colspan=\"2\" scope=\"colgroup\">SSIM</th><th rowspan=\"2\" scope=\"col\">Time</th>\
         <th rowspan=\"2\" scope=\"col\">Peak<br/>memory</th></tr>\n\
         <tr><th scope=\"col\">mean</th><th scope=\"col\">worst</th><th scope=\"col\">mean</th><th scope=\"col\">worst</th></tr></thead>\n\
         <tbody>\n{body}</tbody>\n</table></div>\n</section>\n"
    ))
}

fn cell(label: &str, value: &str) -> String {
    let class = if value == number::NONE { " class=\"none\"" } else { "" };
    format!("<td data-label=\"{label}\"{class}>{value}</td>")
}

/// MiB large, the exact bytes and GiB small, and a bar for the share of the dense model's.
fn size(bytes: u64, dense: u64) -> String {
    let share = if dense == 0 { 0.0 } else { (100.0 * bytes as f64 / dense as f64).min(100.0) };
    format!(
        "<td data-label=\"Size\">{}<span class=\"bar\"><i style=\"width:{share:.1}%\"></i></span>\
         <small>{}</small><small>{} bytes</small></td>",
        number::mib(bytes),
        number::gib(bytes),
        number::count(bytes)
    )
}

fn thumbnail(picture: Option<&Picture>, about: &str) -> Result<String> {
    let image = picture.map(|picture| image(picture, about)).transpose()?.unwrap_or_default();
    Ok(format!("<td class=\"picture\">{image}</td>"))
}

/// Rows of configs, columns of prompts.
fn pictures(comparison: &Comparison) -> Result<String> {
    if comparison.dense.pictures.is_empty() && comparison.rows.iter().all(|row| row.pictures.is_empty()) {
        return Ok(String::new());
    }
    let mut table = "<thead><tr><td></td>".to_owned();
    for judged in &comparison.judged {
        table += &format!("<th scope=\"col\">{}</th>", said(&judged.prompt));
    }
    table += "</tr></thead>\n<tbody>\n";
    let dense = (&comparison.dense.name, &comparison.dense.pictures, None);
    let rows = comparison.rows.iter().map(|row| (&row.name, &row.pictures, Some(&row.psnr)));
    for (name, pictures, psnr) in std::iter::once(dense).chain(rows) {
        table += &format!("<tr><th scope=\"row\">{}</th>", said(name));
        for (i, picture) in pictures.iter().enumerate() {
            let about = comparison
                .judged
                .get(i)
                .map_or_else(String::new, |judged| format!("{name}: {}, seed {}", judged.prompt, judged.seed));
            let decibel = psnr
                .and_then(|psnr: &Spread| psnr.each.get(i))
                .map(|value| format!("<small>{} dB</small>", number::fixed(*value, 1)));
            table += &format!("<td>{}{}</td>", image(picture, &about)?, decibel.unwrap_or_default());
        }
        table += "</tr>\n";
    }
    Ok(format!(
        "<section>\n<h2>Pictures</h2>\n<div class=\"scroll\"><table class=\"pictures\">\n{table}</tbody>\n</table></div>\n</section>\n"
    ))
}

/// A config's warnings, numbers, YAML and layers, folded.
fn config(index: usize, row: &Row) -> String {
    let asked = row.sparsity_asked.map_or_else(|| "none".into(), number::percent);
    let numbers = facts(&[
        ("File", format!("{} bytes", number::count(row.bytes))),
        ("Compressed weights in it", format!("{} bytes", number::count(row.compressed_weight_bytes))),
        ("Bits a compressed weight", number::fixed(row.bits_per_weight, 4)),
        ("Sparsity asked, stored", format!("{asked}, {}", number::percent(row.sparsity_stored))),
        ("UNet error", number::percent(row.unet_error)),
        ("Layers compressed", row.layers.len().to_string()),
    ]);
    let yaml = match row.config_yaml.trim_end() {
        "" => String::new(),
        yaml => format!("<h4>Config as resolved</h4>\n<pre>{}</pre>\n", escape(yaml)),
    };
    format!(
        "<details id=\"config-{index}\"><summary>{}<span>{} · {} bits a weight</span></summary>\n<div>\n{}{numbers}{yaml}{}</div>\n</details>\n",
        said(&row.name),
        number::size(row.bytes),
        number::fixed(row.bits_per_weight, 2),
        list("warnings", &row.warnings),
        layers(&row.layers)
    )
}

fn layers(layers: &[LayerRow]) -> String {
    if layers.is_empty() {
        return String::new();
    }
    let line = |layer: &LayerRow| {
        let numbers = [
            number::shape(&layer.shape),
            number::fixed(layer.bits_per_weight, 2),
            number::percent(layer.sparsity),
            number::count(layer.bytes),
            layer.vectors.map_or_else(|| number::NONE.into(), number::count),
            number::percent(layer.weight_error),
            number::maybe_percent(layer.pruned_error),
            number::maybe_percent(layer.output_error),
        ];
        let numbers: String = numbers.iter().map(|number| format!("<td>{number}</td>")).collect();
        format!(
            "<tr><td class=\"left\">{}</td><td class=\"left\">{}</td>{numbers}</tr>\n",
            escape(&layer.name),
            escape(&layer.kind)
        )
    };
    let header =
        ["shape", "bits a weight", "sparsity", "bytes", "vectors", "weight error", "output error, pruned", "output error"];
    let header: String = header.iter().map(|name| format!("<th scope=\"col\">{name}</th>")).collect();
    format!(
        "<h4>Layers</h4>\n<div class=\"layers\"><table>\n<thead><tr><th class=\"left\" scope=\"col\">layer</th>\
         <th class=\"left\" scope=\"col\">kind</th>{header}</tr></thead>\n<tbody>\n{}</tbody>\n</table></div>\n",
        layers.iter().map(line).collect::<String>()
    )
}

fn how(comparison: &Comparison) -> String {
    let judged: String = comparison
        .judged
        .iter()
        .map(|judged| format!("<li>{} <small>seed {}</small></li>", said(&judged.prompt), judged.seed))
        .collect();
    let judged = if judged.is_empty() { judged } else { format!("<h4>Judged on</h4>\n<ul class=\"prompts\">{judged}</ul>\n") };
    let calibrated = match comparison.calibration.len() {
        0 => String::new(),
        count => format!("<h4>Calibrated on {count} prompts</h4>\n{}", list("prompts", &comparison.calibration)),
    };
    let run = facts(&[("Model", said(&comparison.model)), ("Device", said(&comparison.device))]);
    format!("<section>\n<h2>How it was measured</h2>\n{}{run}{judged}{calibrated}</section>\n", list("how", &comparison.how))
}
