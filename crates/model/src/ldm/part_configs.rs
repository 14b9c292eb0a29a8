//! The architectures of text encoders and VAE, from the shapes of their tensors.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::family::Family;

/// Shapes of tensors by name, without the prefix of the part.
pub(super) type Shapes<'a> = BTreeMap<&'a str, &'a [i64]>;

fn dimension(shapes: &Shapes<'_>, name: &str, axis: usize) -> Option<i64> {
    shapes.get(name)?.get(axis).copied()
}

/// The number of consecutive `i` from 0 for which `name(i)` is a tensor.
fn count(shapes: &Shapes<'_>, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|i| shapes.contains_key(name(*i).as_str())).count()
}

/// The width of a head in CLIP-L and OpenCLIP bigG.
const HEAD: i64 = 64;

/// `config.json` of CLIP-L, whose names are transformers' own.
pub(super) fn clip(shapes: &Shapes<'_>) -> Option<Map<String, Value>> {
    let tokens = "text_model.embeddings.token_embedding.weight";
    let layers = count(shapes, |i| format!("text_model.encoder.layers.{i}.layer_norm1.weight"));
    let inner = dimension(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0)?;
    let positions = dimension(shapes, "text_model.embeddings.position_embedding.weight", 0)?;
    let size = [dimension(shapes, tokens, 0)?, dimension(shapes, tokens, 1)?, inner, positions];
    let projection = dimension(shapes, "text_projection.weight", 0).unwrap_or(size[1]);
    text("CLIPTextModel", "quick_gelu", 1, size, layers, projection)
}

/// `config.json` of OpenCLIP bigG.
pub(super) fn open_clip(shapes: &Shapes<'_>) -> Option<Map<String, Value>> {
    let layers = count(shapes, |i| format!("transformer.resblocks.{i}.ln_1.weight"));
    let tokens = "token_embedding.weight";
    let inner = dimension(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0)?;
    let positions = dimension(shapes, "positional_embedding", 0)?;
    let size = [dimension(shapes, tokens, 0)?, dimension(shapes, tokens, 1)?, inner, positions];
    // The file has the transpose.
    let projection = dimension(shapes, "text_projection", 1)?;
    text("CLIPTextModelWithProjection", "gelu", 0, size, layers, projection)
}

fn text(class: &str, act: &str, pad: i64, size: [i64; 4], layers: usize, projection: i64) -> Option<Map<String, Value>> {
    let [vocabulary, width, inner, positions] = size;
    let heads = width / HEAD;
    if heads * HEAD != width || heads == 0 {
        return None;
    }
    let config = json!({
        "architectures": [class],
        "bos_token_id": 0,
        // The published configs have this value, by which the end of a text is its highest id.
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": pad,
        "projection_dim": projection,
        "vocab_size": vocabulary,
    });
    config.as_object().cloned()
}

/// `config.json` of a VAE.
pub(super) fn vae(shapes: &Shapes<'_>, family: &Family) -> Option<Map<String, Value>> {
    let levels = count(shapes, |i| format!("decoder.up.{i}.block.0.conv1.weight"));
    let width = |level: usize| dimension(shapes, &format!("decoder.up.{level}.block.0.conv1.weight"), 0);
    let channels = (0..levels).map(width).collect::<Option<Vec<i64>>>().filter(|channels| !channels.is_empty())?;
    let resnets = count(shapes, |k| format!("decoder.up.0.block.{k}.conv1.weight"));
    let (scaling_factor, mean, std) = family.latents();
    let config = json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "force_upcast": true,
        "in_channels": 3,
        "latent_channels": dimension(shapes, "decoder.conv_in.weight", 1)?,
        "latents_mean": mean,
        "latents_std": std,
        "layers_per_block": resnets.checked_sub(1)?,
        "mid_block_add_attention": shapes.contains_key("decoder.mid.attn_1.q.weight"),
        "norm_num_groups": 32,
        "out_channels": dimension(shapes, "decoder.conv_out.weight", 0)?,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "use_post_quant_conv": shapes.contains_key("post_quant_conv.weight"),
        "use_quant_conv": shapes.contains_key("quant_conv.weight"),
    });
    config.as_object().cloned()
}
