//! `sdxl-squeeze inspect`.

use std::path::PathBuf;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use sdxl_squeeze::Result;
use sdxl_squeeze::inspect::{Inspection, inspect};

use super::units::{bytes, count};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A pipeline in diffusers layout, or the folder of a UNet alone
    #[arg(value_name = "DIR")]
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Leave out the layers
    #[arg(long)]
    summary: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut found = inspect(&args.path)?;
    if args.json {
        if args.summary {
            found.stages.iter_mut().for_each(|stage| stage.layers.clear());
        }
        let text = serde_json::to_string_pretty(&found).unwrap_or_default();
        return super::print(&format!("{text}\n"));
    }
    super::print(&tables(&found, args.summary))
}

fn tables(found: &Inspection, summary: bool) -> String {
    let mut text = String::new();
    if !summary {
        let mut layers = table(&["layer", "kind", "shape", "parameters", "bytes"]);
        for layer in found.stages.iter().flat_map(|stage| &stage.layers) {
            layers.add_row([
                layer.name.clone(),
                layer.kind.clone(),
                shape(&layer.shape),
                count(layer.parameters),
                count(layer.bytes),
            ]);
        }
        text = format!("{}\n\n", right_align(layers, 3));
    }
    let mut stages = table(&["stage", "layers", "parameters", "bytes", ""]);
    for stage in &found.stages {
        let layers = stage.layers.len().to_string();
        stages.add_row([stage.name.clone(), layers, count(stage.parameters), count(stage.bytes), bytes(stage.bytes)]);
    }
    let layers: usize = found.stages.iter().map(|stage| stage.layers.len()).sum();
    stages.add_row(["unet".to_owned(), layers.to_string(), count(found.parameters), count(found.bytes), bytes(found.bytes)]);
    for part in &found.parts {
        stages.add_row([part.name.clone(), String::new(), count(part.parameters), count(part.bytes), bytes(part.bytes)]);
    }
    let stored = match &found.dtype {
        Some(dtype) => format!("stored as {dtype}"),
        None => "no weights here; bytes are those of fp16".to_owned(),
    };
    format!("{text}{}\n\nUNet: {} parameters, {stored}\n", right_align(stages, 1), count(found.parameters))
}

fn shape(sizes: &[i64]) -> String {
    sizes.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table
}

/// Numbers end below each other.
fn right_align(mut table: Table, from: usize) -> String {
    for column in table.column_iter_mut().skip(from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}
