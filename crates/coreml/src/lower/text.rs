//! CLIP's text encoders as programs: the computation of [`sdxl_model::text::ClipText`], with inputs
//! and outputs as Apple's Swift pipeline has them (apple/ml-stable-diffusion,
//! `TextEncoderXL.swift`, and `torch2coreml.py`, `convert_text_encoder`).

use sdxl_model::text::{Activation, ClipText, EndOfText, TextConfig};
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};
use tch::{Device, Kind, Tensor};

use super::attention::Heads;
use super::{Lowered, Network};
use crate::element::{ArrayType, Element};
use crate::literal::Literal;
use crate::options::Layout;
use crate::program::{ProgramBuilder, Var};
use crate::weights::StoredTensors;

/// What stands in the mask where a token may not look. Minus infinity is not a number that can be
/// palettized in fp16 (apple/ml-stable-diffusion, issues 246 and 247).
const MASKED: f64 = -1e4;

/// The name of the mask, which all layers share.
pub(crate) const CAUSAL_MASK: &str = "causal_mask";

/// Lowers a text encoder: `input_ids` [1, n] in fp32 to `hidden_embeds` [1, n, width], the states
/// before the last layer, and `pooled_outputs`, both in fp32. Without a projection, the pooled
/// output is the normed state at the end of the text, as transformers' `pooler_output`.
///
/// # Errors
/// If a weight cannot be read or written.
pub(crate) fn lower(
    config: &TextConfig,
    weights: &dyn StoredTensors,
    program: ProgramBuilder,
    progress: &dyn Progress,
) -> Result<Lowered> {
    let tensors = ClipText::tensors(config)?;
    let task = Task::begin(progress, "writing the package", "tensors", tensors.len());
    let mut network = Network::new(program, weights, Layout::Linear, task);
    let net = &mut network;
    let (length, width) = (config.max_position_embeddings as u64, config.hidden_size as u64);
    let given = net.input("input_ids", ArrayType::new(Element::F32, [1, length]));
    let ids = net.cast("ids", &given, "int32")?;
    let rows = [config.vocab_size as u64, width];
    let table = net.tensor("text_model.embeddings.token_embedding.weight", &rows, &rows)?;
    let tokens = net.gather("text_model.embeddings.token_embedding", &table, &ids, 0)?;
    let positions = [length, width];
    let table = net.tensor("text_model.embeddings.position_embedding.weight", &positions, &positions)?;
    let mut hidden = net.binary("add", "text_model.embeddings.position_embedding", &tokens, &table)?;
    let mask = causal_mask(net, length)?;
    let mut penultimate = hidden.clone();
    for layer in 0..config.num_hidden_layers {
        penultimate = hidden;
        hidden = block(net, &format!("text_model.encoder.layers.{layer}"), &penultimate, &mask, config)?;
    }
    let end = end_of_text(net, &ids, config)?;
    let state = net.gather("pooled.state", &hidden, &end, 1)?;
    let mut pooled = net.layer_norm("text_model.final_layer_norm", &state, config.layer_norm_eps)?;
    let mut pooled_width = width;
    if let Some(projected) = config.projection_dim {
        pooled = net.dense("text_projection", &pooled, projected, false)?;
        pooled_width = projected as u64;
    }
    let pooled = net.reshape("pooled.row", &pooled, &[1, pooled_width])?;
    let hidden = net.cast("hidden_embeds", &penultimate, "fp32")?;
    let pooled = net.cast("pooled_outputs", &pooled, "fp32")?;
    let program = network.finish(&tensors)?;
    Ok(Lowered { program, inputs: vec![given], outputs: vec![hidden, pooled] })
}

/// The mask [1, 1, n, n] that keeps tokens from looking at later ones.
fn causal_mask(net: &mut Network, length: u64) -> Result<Var> {
    let mask = Tensor::f_full([length as i64; 2], MASKED, (Kind::Half, Device::Cpu))?.f_triu(1)?;
    let values: Vec<half::f16> = Vec::try_from(&mask.f_flatten(0, -1)?)?;
    net.program.halves(CAUSAL_MASK, &[1, 1, length, length], &values)
}

/// The position [1] of the end of the text: that of the highest id, or the first of a given id, or
/// 0 where it is absent.
///
/// The scores of any two positions differ: which of equal values Core ML's `reduce_argmax` takes is
/// not promised, and texts are padded with the end's id.
fn end_of_text(net: &mut Network, ids: &Var, config: &TextConfig) -> Result<Var> {
    let length = config.max_position_embeddings;
    let is_end = match config.end_of_text {
        EndOfText::HighestId => {
            let axes = Literal::Ints(vec![-1]).into();
            let parameters = [("x", ids.into()), ("axes", axes), ("keep_dims", Literal::Bool(true).into())];
            let highest = net.op("reduce_max", "end.highest", parameters)?;
            net.binary("equal", "end.is", ids, &highest)?
        }
        EndOfText::Token(id) => {
            // An id that no int32 holds is in no text.
            let id = i32::try_from(id).unwrap_or(-1);
            net.op("equal", "end.is", [("x", ids.into()), ("y", Literal::Int(id).into())])?
        }
    };
    let hits = net.cast("end.hits", &is_end, "fp32")?;
    let first = Literal::Float(length as f32);
    let hits = net.op("mul", "end.scores", [("x", (&hits).into()), ("y", first.into())])?;
    let positions = Tensor::f_arange(length, (Kind::Float, Device::Cpu))?;
    let positions = net.floats("end.positions", &[length as u64], &positions)?;
    let scores = net.binary("sub", "end.ordered", &hits, &positions)?;
    let parameters = [
        ("x", (&scores).into()),
        ("axis", Literal::Int(-1).into()),
        ("keep_dims", Literal::Bool(false).into()),
        ("output_dtype", Literal::text("int32").into()),
    ];
    net.op("reduce_argmax", "end", parameters)
}

/// `transformers` CLIPEncoderLayer.
fn block(net: &mut Network, name: &str, x: &Var, mask: &Var, config: &TextConfig) -> Result<Var> {
    let (width, eps) = (config.hidden_size, config.layer_norm_eps);
    let normed = net.layer_norm(&format!("{name}.layer_norm1"), x, eps)?;
    let attention = format!("{name}.self_attn");
    let mut project = |part: &str| net.dense(&format!("{attention}.{part}_proj"), &normed, width, true);
    let (query, key, value) = (project("q")?, project("k")?, project("v")?);
    let heads = Heads { heads: config.num_attention_heads as u64, width: (width / config.num_attention_heads) as u64 };
    let mixed = net.whole_attention(&attention, [&query, &key, &value], heads, Some(mask))?;
    let mixed = net.dense(&format!("{attention}.out_proj"), &mixed, width, true)?;
    let x = net.binary("add", &format!("{name}.residual"), &mixed, x)?;
    let normed = net.layer_norm(&format!("{name}.layer_norm2"), &x, eps)?;
    let inner = net.dense(&format!("{name}.mlp.fc1"), &normed, config.intermediate_size, true)?;
    let active = match config.hidden_act {
        Activation::Gelu => {
            let exact = Literal::text("EXACT").into();
            net.op("gelu", &format!("{name}.mlp.gelu"), [("x", (&inner).into()), ("mode", exact)])?
        }
        Activation::QuickGelu => {
            let factor = net.number(1.702).into();
            let scaled = net.op("mul", &format!("{name}.mlp.scaled"), [("x", (&inner).into()), ("y", factor)])?;
            let gate = net.unary("sigmoid", &format!("{name}.mlp.gate"), &scaled)?;
            net.binary("mul", &format!("{name}.mlp.quick_gelu"), &inner, &gate)?
        }
    };
    let fed = net.dense(&format!("{name}.mlp.fc2"), &active, width, true)?;
    net.binary("add", name, &fed, &x)
}
