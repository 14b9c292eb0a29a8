//! `sdxl-squeeze inspect`.

use std::path::PathBuf;

use sdxl_squeeze::Result;
use sdxl_squeeze::container::{Container, Network, StoredLayer};
use sdxl_squeeze::inspect::{CheckpointRow, Inspection, inspect};
use sdxl_squeeze::model::ldm::Skipped;
use sdxl_squeeze::number::{count, size as bytes};
use sdxl_squeeze::pipeline::check_architecture;

use super::table::{new as table, right_aligned};
use super::{bundled, container, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A pipeline in diffusers layout, a single-file checkpoint, the folder of a UNet alone, or a
    /// container
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show a container without checking its hashes
    #[arg(long)]
    no_verify: bool,
    /// Show no layers
    #[arg(long)]
    summary: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let args = Args { path: bundled::found(args.path)?, ..args };
    if args.path.is_file() && container::is_container(&args.path) {
        return inspect_container(&container::open(&args.path, args.no_verify)?, args.json, args.summary);
    }
    let mut inspection = inspect(&args.path)?;
    if args.json {
        if args.summary {
            inspection.stages.iter_mut().for_each(|stage| stage.layers.clear());
        }
        return stdout::print_json(&inspection);
    }
    stdout::print(&tables(&inspection, args.summary))
}

fn tables(inspection: &Inspection, summary: bool) -> String {
    let mut text = String::new();
    if !summary {
        let mut layers = table(&["layer", "kind", "shape", "parameters", "bytes"]);
        for layer in inspection.stages.iter().flat_map(|stage| &stage.layers) {
            layers.add_row([
                layer.name.clone(),
                layer.kind.clone(),
                shape(&layer.shape),
                count(layer.parameters),
                count(layer.bytes),
            ]);
        }
        text = format!("{}\n\n", right_aligned(layers, 3));
    }
    let mut stages = table(&["stage", "layers", "parameters", "bytes", ""]);
    for stage in &inspection.stages {
        let layers = stage.layers.len().to_string();
        stages.add_row([stage.name.clone(), layers, count(stage.parameters), count(stage.bytes), bytes(stage.bytes)]);
    }
    let layers: usize = inspection.stages.iter().map(|stage| stage.layers.len()).sum();
    stages.add_row([
        "unet".to_owned(),
        layers.to_string(),
        count(inspection.parameters),
        count(inspection.bytes),
        bytes(inspection.bytes),
    ]);
    for part in &inspection.parts {
        stages.add_row([part.name.clone(), String::new(), count(part.parameters), count(part.bytes), bytes(part.bytes)]);
    }
    let about = inspection.checkpoint.as_ref().map(about).unwrap_or_default();
    let stored = match &inspection.dtype {
        Some(dtype) => format!("stored as {dtype}"),
        None => "no weights here; bytes are those of fp16".to_owned(),
    };
    format!("{text}{}\n\nUNet: {} parameters, {stored}\n{about}", right_aligned(stages, 1), count(inspection.parameters))
}

/// What a single-file checkpoint is, what it lacks, and what of it is not read.
fn about(checkpoint: &CheckpointRow) -> String {
    let CheckpointRow { family, missing, is_told_by_shapes, skipped, scheduler } = checkpoint;
    let mut text = format!("{family}; sampler {}\n", scheduler["_class_name"].as_str().unwrap_or_default());
    if !missing.is_empty() {
        text.push_str(&format!("missing: {}; --base DIR|FILE completes it\n", missing.join(", ")));
    }
    if !is_told_by_shapes {
        text.push_str("the shapes do not tell the architecture; --base DIR|FILE tells it to the other commands\n");
    }
    for Skipped { what, tensors } in skipped {
        const SHOWN: usize = 4;
        let names = tensors.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if tensors.len() > SHOWN { ", …" } else { "" };
        text.push_str(&format!("not read: {} {what} ({names}{more})\n", tensors.len()));
    }
    text
}

fn shape(sizes: &[i64]) -> String {
    sizes.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}

/// The bits of an index; with the output channels that share it if there are several (`8 V2`), or
/// the columns that share a scale if not all of a row do (`4 b64`).
fn bits(layer: &StoredLayer) -> String {
    let of_scale = layer.scale_block.map_or(String::new(), |block| format!(" b{block}"));
    match (layer.bits, layer.vector_length) {
        (None, _) => "16".to_owned(),
        (Some(bits), None | Some(1)) => format!("{bits}{of_scale}"),
        (Some(bits), Some(length)) => format!("{bits} V{length}"),
    }
}

/// Prints a row for each layer: its storage and its error.
fn inspect_container(container: &Container, json: bool, summary: bool) -> Result<()> {
    check_architecture(container)?;
    if json {
        let layers: Vec<_> = container.layers().collect();
        return stdout::print_json(&layers);
    }
    let mut text = String::new();
    if !summary {
        let mut rows =
            table(&["layer", "shape", "bits", "group", "sparsity", "bits a weight", "bytes", "output error", "weight error"]);
        for layer in container.layers() {
            let error = |key: &str| layer.report[key].as_f64().map_or(String::new(), |error| format!("{:.2} %", 100.0 * error));
            rows.add_row([
                layer.name.trim_end_matches(".weight").to_owned(),
                shape(&layer.shape),
                bits(&layer),
                layer.group_size.map_or(String::new(), |size| size.to_string()),
                format!("{:.2} %", 100.0 * layer.sparsity),
                format!("{:.3}", layer.bits_per_weight),
                count(layer.bytes),
                error("output"),
                error("weight"),
            ]);
        }
        text = format!("{}\n\n", right_aligned(rows, 2));
    }
    let network = container.info().network;
    let stored: u64 = container.layers().map(|layer| layer.bytes).sum();
    let (tensors, halves) = container.tensors().fold((0u64, 0u64), |(n, sum), (_, _, bytes)| (n + 1, sum + bytes));
    text.push_str(&format!(
        "{}{} compressed weights, {} ({}); {tensors} tensors in fp16, {}\n",
        if network == Network::Unet { String::new() } else { format!("{network}: ") },
        container.layers().len(),
        bytes(stored),
        count(stored),
        bytes(halves),
    ));
    if network != Network::Unet {
        return stdout::print(&text);
    }
    let predicts = container.info().prediction_type.as_deref().map(|prediction| format!("predicts {prediction}\n"));
    text.push_str(predicts.as_deref().unwrap_or("what it predicts is not recorded; its model's sampler says it\n"));
    stdout::print(&text)
}
