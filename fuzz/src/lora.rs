//! Opens a LoRA, binds it to the networks of a small model, and merges what it changes.

use std::path::Path;

use sdxl_squeeze::checkpoint::TensorSource;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::{LoraFile, ModelFiles, PipelineFolder};

use crate::choices::Choices;
use crate::{layout, scratch};

/// Modules of the small model, with the shape of the weight.
const MODULES: [(&str, [u64; 2]); 4] = [
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", [16, 16]),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", [24, 40]),
    ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", [128, 16]),
    ("down_blocks.0.resnets.0.conv1", [8, 8]),
];

const PIECES: [&str; 24] = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_A.weight",
    "lora_B.weight",
    "alpha",
    "dora_scale",
    "lora_magnitude_vector",
    "lora_mid.weight",
    "diff",
    "diff_b",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "x",
];

/// The pieces that make a LoRA, a LoHa, a LoKr or a difference.
const FORMS: [&[&str]; 8] = [
    &[],
    &["lora_down.weight", "lora_up.weight"],
    &["lora_A.weight", "lora_B.weight", "alpha"],
    &["lora_down.weight", "lora_up.weight", "dora_scale"],
    &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    &["lokr_w1", "lokr_w2"],
    &["lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha"],
    &["diff"],
];

/// Runs one input: a file, a header and data, or decisions for building a LoRA.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let scale = [1.0, 0.0, -2.5, 1e30, f64::INFINITY][choices.below(5)];
    let file = match choices.below(4) {
        0 => choices.rest().to_vec(),
        1 => {
            let header = usize::from(choices.short());
            let rest = choices.rest();
            let (header, data) = rest.split_at(header.min(rest.len()));
            layout::with_header(header, data)
        }
        _ => made(&mut choices),
    };
    let path = scratch::file("lora.safetensors", &file);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/base-like");
    let loras = vec![LoraFile { path, scale }];
    let Ok(folder) = PipelineFolder::open_files(&ModelFiles { loras, ..ModelFiles::of(&model) }) else { return };
    let _ = folder.lora_files();
    let Ok(weights) = folder.unet_weights() else { return };
    let source = weights.source(Placement::CPU);
    for (module, _) in MODULES {
        for kind in ["weight", "bias"] {
            let name = format!("{module}.{kind}");
            let Some(shape) = weights.shape(&name) else { continue };
            if let Ok(merged) = source.tensor(&name, shape) {
                assert_eq!(merged.size(), shape, "{name}");
                assert!(bool::try_from(merged.isfinite().all()).unwrap_or(false), "{name} is not finite");
            }
        }
    }
}

/// The shape that a piece has for a linear layer.
fn fitting(piece: &str, outputs: u64, inputs: u64, rank: u64) -> Vec<u64> {
    match piece {
        "lora_down.weight" | "lora_A.weight" | "hada_w1_b" | "hada_w2_b" => vec![rank, inputs],
        "lora_up.weight" | "lora_B.weight" | "hada_w1_a" | "hada_w2_a" => vec![outputs, rank],
        "diff" => vec![outputs, inputs],
        "diff_b" | "lora_magnitude_vector" => vec![outputs],
        "dora_scale" => vec![outputs, 1],
        "lokr_w1" => vec![2, 2],
        "lokr_w1_a" => vec![2, rank],
        "lokr_w1_b" => vec![rank, 2],
        "lokr_w2" => vec![outputs / 2, inputs / 2],
        "lokr_w2_a" => vec![outputs / 2, rank],
        "lokr_w2_b" => vec![rank, inputs / 2],
        "lora_mid.weight" | "hada_t1" | "hada_t2" | "lokr_t2" => vec![rank, rank, 3, 3],
        _ => vec![],
    }
}

/// A file with tensors of a few modules, most of them of a shape that fits.
fn made(choices: &mut Choices) -> Vec<u8> {
    let mut tensors = Vec::new();
    for _ in 0..=choices.below(3) {
        let (module, [outputs, inputs]) = choices.of(&MODULES);
        let module = match choices.below(4) {
            0 => format!("lora_unet_{}", module.replace('.', "_")),
            1 => format!("unet.{module}"),
            2 => format!("diffusion_model.{module}"),
            _ => format!("lora_te1_{module}"),
        };
        let rank = choices.below(5) as u64;
        // A whole form and more, or pieces by chance.
        let form = choices.of(&FORMS);
        let chance: Vec<&str> = (0..choices.below(4)).map(|_| choices.of(&PIECES)).collect();
        for piece in form.iter().copied().chain(chance) {
            let shape: Vec<u64> = match choices.rarely(6) {
                true => (0..choices.below(5)).map(|_| choices.number() % 100).collect(),
                false => fitting(piece, outputs, inputs, rank),
            };
            let elements: u64 = shape.iter().product();
            let (dtype, width) =
                choices.of(&[("F16", 2), ("F32", 4), ("F16", 2), ("BF16", 2), ("F32", 4), ("I64", 8), ("F8_E4M3", 1)]);
            let data = choices.bytes((elements * width).min(1 << 16) as usize);
            tensors.push(layout::Tensor::new(format!("{module}.{piece}"), dtype, &shape, data));
        }
    }
    layout::file(None, &tensors)
}
