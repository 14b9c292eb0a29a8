//! Times SparseGPT and palettes on the layers of a safetensors file, for
//! `benches/coremltools/layers.py`, which compares the times with those of coremltools.
//!
//! The file has tensors `NAME.weight` [o, ...] and `NAME.inputs` [vectors, d] or [samples, c, h, w]
//! for each layer. The program prints one JSON object per line. With `--joint` after the file, it
//! also times the joint solver with several efforts.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::time::Instant;

use half::f16;
use sdxl_squeeze::checkpoint::{SafetensorsFile, read_tensor};
use sdxl_squeeze::codebook::{Effort, Grouping, PaletteOptions, PruneOptions, Sparsity};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::solver::palette::palettize;
use sdxl_squeeze::solver::{Hessian, JointFactors, JointOptions, LayerEvidence, Order, joint, prune};
use sdxl_squeeze::solver::{InputGeometry, Windows};
use sdxl_squeeze::{Error, Result};
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let path: PathBuf = std::env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .ok_or_else(|| Error::Argument("usage: solve_layers FILE [--joint]".into()))?;
    let file = SafetensorsFile::open(&path)?;
    let mut names: Vec<&str> = file.entries().keys().filter_map(|name| name.strip_suffix(".weight")).collect();
    names.sort_by_key(|name| (file.entries()[&format!("{name}.weight")].bytes(), *name));
    for name in names {
        let weight = read_tensor(&file, &format!("{name}.weight"), Placement::CPU)?;
        let inputs = read_tensor(&file, &format!("{name}.inputs"), Placement::CPU)?;
        // The first call warms up; only the second is timed.
        sparsegpt(&weight, &inputs)?;
        report("SparseGPT 40 %", name, sparsegpt(&weight, &inputs)?);
        if std::env::args().nth(2).as_deref() == Some("--joint") {
            joint_solver(name, &weight, &inputs)?;
        }
        for (layer, group_size) in [("1280x1280", 16), ("1280x1280", 4), ("5120x1280", 16)] {
            if layer == name {
                palettes(&weight, group_size)?;
                report("4-bit palettes", &format!("{name} gs{group_size}"), palettes(&weight, group_size)?);
            }
        }
    }
    Ok(())
}

fn report(label: &str, layer: &str, seconds: f64) {
    println!("{}", serde_json::json!({ "what": label, "layer": layer, "seconds": seconds }));
}

fn sparsegpt(weight: &Tensor, inputs: &Tensor) -> Result<f64> {
    let start = Instant::now();
    let hessian = hessian(weight, inputs)?;
    prune(weight, &hessian, &PruneOptions { sparsity: Sparsity::Unstructured(0.4), ..PruneOptions::default() })?;
    Ok(start.elapsed().as_secs_f64())
}

/// Times the joint solver with several efforts, and SparseGPT followed by palettes. The time to
/// compute the Hessian is not included.
fn joint_solver(name: &str, weight: &Tensor, inputs: &Tensor) -> Result<()> {
    let hessian = hessian(weight, inputs)?;
    let prune_options = PruneOptions { sparsity: Sparsity::Unstructured(0.4), ..PruneOptions::default() };
    let options = JointOptions::new(Some(prune_options), Some(grouped(16)));
    let efforts = [
        ("least", Effort::LEAST),
        ("refit", Effort { refit_steps: 8, ..Effort::LEAST }),
        ("refit, sweep", Effort { refit_steps: 8, sweep: true, ..Effort::LEAST }),
        ("without exchanges", Effort { exchange_turns: 0, ..Effort::default() }),
        ("all", Effort::default()),
    ];
    for (label, effort) in efforts {
        let start = Instant::now();
        let factors = JointFactors::new(&hessian, prune_options.dampening, Order::Natural)?;
        let solved = joint(name, weight, &hessian, &factors, &LayerEvidence::default(), &JointOptions { effort, ..options })?;
        let seconds = start.elapsed().as_secs_f64();
        let share = solved.loss / solved.sequential_loss;
        println!("{}", serde_json::json!({ "what": label, "layer": name, "seconds": seconds, "loss": share }));
    }
    let start = Instant::now();
    let pruned = prune(weight, &hessian, &prune_options)?;
    let shape: Vec<usize> = weight.size().iter().map(|n| *n as usize).collect();
    let values: Vec<f16> = Vec::try_from(&pruned.weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?)?;
    let keep: Vec<bool> = Vec::try_from(&pruned.mask.f_flatten(0, -1)?)?;
    palettize(name, &values, &shape, Some(&keep), &grouped(16))?;
    report("SparseGPT, then palettes", name, start.elapsed().as_secs_f64());
    Ok(())
}

fn grouped(group_size: usize) -> PaletteOptions {
    PaletteOptions { grouping: Grouping::PerGroupedChannel { group_size }, ..PaletteOptions::default() }
}

fn hessian(weight: &Tensor, inputs: &Tensor) -> Result<Hessian> {
    let kind = if weight.dim() == 4 { InputGeometry::Windows(Windows::new(1, 1)) } else { InputGeometry::Linear };
    let mut hessian = Hessian::for_weight(kind, &weight.size(), Device::Cpu)?;
    if weight.dim() == 4 {
        for sample in 0..inputs.size()[0] {
            hessian.add(&inputs.f_narrow(0, sample, 1)?)?;
        }
    } else {
        hessian.add(inputs)?;
    }
    Ok(hessian)
}

fn palettes(weight: &Tensor, group_size: usize) -> Result<f64> {
    let shape: Vec<usize> = weight.size().iter().map(|n| *n as usize).collect();
    let start = Instant::now();
    let values: Vec<f16> = Vec::try_from(&weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?)?;
    palettize("layer", &values, &shape, None, &grouped(group_size))?;
    Ok(start.elapsed().as_secs_f64())
}
