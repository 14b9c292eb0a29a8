//! The configs of the pipelines that `synth` writes.

use std::str::FromStr;

use sdxl_model::checkpoint::ConfigFile;
use serde_json::{Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;

/// An architecture that `synth` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// SDXL base 1.0: 2,567,463,684 UNet parameters.
    SdxlBase,
    /// The SDXL refiner 1.0: 2,259,526,660 UNet parameters.
    SdxlRefiner,
    /// SDXL inpainting 0.1: base with 9 channels in, 2,567,478,084 UNet parameters.
    SdxlInpainting,
    /// An edit model (CosXL edit, InstructPix2Pix): base with 8 channels in, 2,567,475,204 UNet
    /// parameters.
    SdxlEdit,
    /// LCM-SDXL: base that is told the guidance scale, 2,567,545,604 UNet parameters.
    LcmSdxl,
    /// Segmind SSD-1B: 1,331,334,404 UNet parameters.
    Ssd1b,
    /// Segmind-Vega: 745,225,604 UNet parameters.
    Vega,
    /// KOALA-700M, which has no mid block: 782,822,724 UNet parameters.
    Koala700m,
    /// KOALA-1B: 1,161,184,324 UNet parameters.
    Koala1b,
    /// SDXL's architecture at a size for tests.
    Tiny,
}

const NAMES: [(&str, Preset); 10] = [
    ("sdxl-base", Preset::SdxlBase),
    ("sdxl-refiner", Preset::SdxlRefiner),
    ("sdxl-inpainting", Preset::SdxlInpainting),
    ("sdxl-edit", Preset::SdxlEdit),
    ("lcm-sdxl", Preset::LcmSdxl),
    ("ssd-1b", Preset::Ssd1b),
    ("vega", Preset::Vega),
    ("koala-700m", Preset::Koala700m),
    ("koala-1b", Preset::Koala1b),
    ("tiny", Preset::Tiny),
];

impl Preset {
    /// Every preset and the name by which it is asked for.
    pub fn all() -> impl Iterator<Item = (&'static str, Preset)> {
        NAMES.into_iter()
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = NAMES.map(|(name, _)| name).join(", ");
        NAMES
            .iter()
            .find_map(|(known, preset)| (*known == name).then_some(*preset))
            .ok_or_else(|| Error::Argument(format!("unknown preset `{}` (known: {known})", shorten(name))))
    }
}

/// The JSON of a pipeline: each part's folder and config.
#[derive(Debug)]
pub(super) struct Configs {
    pub model_index: Value,
    pub scheduler: Value,
    pub unet: Value,
    pub vae: Value,
    /// `text_encoder` or `text_encoder_2`, its tokenizer's folder, its config.
    pub text: Vec<(&'static str, &'static str, Value)>,
}

impl Preset {
    pub(super) fn configs(self) -> Configs {
        let text = match self {
            Preset::SdxlBase
            | Preset::SdxlInpainting
            | Preset::SdxlEdit
            | Preset::LcmSdxl
            | Preset::Ssd1b
            | Preset::Vega
            | Preset::Koala700m
            | Preset::Koala1b => vec![clip_l(), clip_g()],
            Preset::SdxlRefiner => vec![clip_g()],
            Preset::Tiny => vec![
                text_encoder("text_encoder", "quick_gelu", [32, 2, 2, 64], 32),
                text_encoder("text_encoder_2", "gelu", [48, 2, 3, 96], 48),
            ],
        };
        Configs { model_index: model_index(self), scheduler: scheduler(), unet: self.unet(), vae: self.vae(), text }
    }

    /// The architecture of its UNet, as a config.json for
    /// [`UnetConfig::parse`](sdxl_model::unet::UnetConfig::parse).
    #[must_use]
    pub fn unet_config(self) -> ConfigFile {
        let entries = match self.unet() {
            Value::Object(entries) => entries,
            other => unreachable!("a preset's config is a JSON object, not {other}"),
        };
        ConfigFile::from_entries("unet/config.json".as_ref(), entries)
    }

    fn unet(self) -> Value {
        // What differs from base; the depths are those of ComfyUI's table of models, and the sums
        // of parameters were compared with diffusers' and the published ones
        // (docs/architectures.md).
        let changed = |changes: Value| {
            let mut config = Preset::SdxlBase.unet();
            if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
                config.extend(changes);
            }
            config
        };
        match self {
            Preset::SdxlInpainting => changed(json!({ "in_channels": 9 })),
            Preset::SdxlEdit => changed(json!({ "in_channels": 8 })),
            Preset::LcmSdxl => changed(json!({ "time_cond_proj_dim": 256 })),
            Preset::Ssd1b => changed(json!({
                "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [0, 2, 4],
                "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            })),
            Preset::Vega => changed(json!({ "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2] })),
            Preset::Koala700m => changed(json!({
                "layers_per_block": 1, "mid_block_type": null, "transformer_layers_per_block": [1, 2, 5],
            })),
            Preset::Koala1b => changed(json!({ "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6] })),
            Preset::SdxlBase => json!({
                "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
                "center_input_sample": false, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
                "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
                "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
                "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
            }),
            Preset::SdxlRefiner => json!({
                "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
                "center_input_sample": false, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 1280,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
                "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
                "projection_class_embeddings_input_dim": 2560, "sample_size": 128, "transformer_layers_per_block": 4,
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
            }),
            Preset::Tiny => json!({
                "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8, "attention_head_dim": [2, 4, 4], "block_out_channels": [16, 32, 32],
                "center_input_sample": false, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 80,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
                "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
                "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "norm_num_groups": 8, "out_channels": 4,
                "projection_class_embeddings_input_dim": 96, "sample_size": 8, "transformer_layers_per_block": [1, 1, 2],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
            }),
        }
    }

    fn vae(self) -> Value {
        let (widths, layers, groups, size) = match self {
            Preset::Tiny => (json!([8, 16, 16, 16]), 1, 8, 64),
            Preset::SdxlBase
            | Preset::SdxlRefiner
            | Preset::SdxlInpainting
            | Preset::SdxlEdit
            | Preset::LcmSdxl
            | Preset::Ssd1b
            | Preset::Vega
            | Preset::Koala700m
            | Preset::Koala1b => (json!([128, 256, 512, 512]), 2, 32, 1024),
        };
        json!({
            "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": widths,
            "down_block_types": vec!["DownEncoderBlock2D"; 4], "force_upcast": true, "in_channels": 3, "latent_channels": 4,
            "layers_per_block": layers, "norm_num_groups": groups, "out_channels": 3, "sample_size": size, "scaling_factor": 0.13025,
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
        })
    }
}

fn model_index(preset: Preset) -> Value {
    let base = preset != Preset::SdxlRefiner;
    let class = match preset {
        Preset::SdxlRefiner => "StableDiffusionXLImg2ImgPipeline",
        Preset::SdxlInpainting => "StableDiffusionXLInpaintPipeline",
        Preset::SdxlEdit => "StableDiffusionXLInstructPix2PixPipeline",
        Preset::SdxlBase
        | Preset::LcmSdxl
        | Preset::Ssd1b
        | Preset::Vega
        | Preset::Koala700m
        | Preset::Koala1b
        | Preset::Tiny => "StableDiffusionXLPipeline",
    };
    let entry = |there: bool, library: &str, class: &str| if there { json!([library, class]) } else { json!([null, null]) };
    let mut index = json!({
        "_class_name": class,
        "force_zeros_for_empty_prompt": base,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": entry(base, "transformers", "CLIPTextModel"),
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": entry(base, "transformers", "CLIPTokenizer"),
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    if !base {
        index["requires_aesthetics_score"] = json!(true);
    }
    index
}

fn scheduler() -> Value {
    json!({
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
        "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false,
    })
}

/// CLIP ViT-L's text encoder.
fn clip_l() -> (&'static str, &'static str, Value) {
    text_encoder("text_encoder", "quick_gelu", [768, 12, 12, 3072], 768)
}

/// OpenCLIP ViT-bigG's text encoder.
fn clip_g() -> (&'static str, &'static str, Value) {
    text_encoder("text_encoder_2", "gelu", [1280, 32, 20, 5120], 1280)
}

/// `sizes`: width, layers, heads, width inside the feed-forwards.
fn text_encoder(folder: &'static str, act: &str, sizes: [i64; 4], projection: i64) -> (&'static str, &'static str, Value) {
    let [width, layers, heads, inner] = sizes;
    let (class, tokenizer) = match folder {
        "text_encoder" => ("CLIPTextModel", "tokenizer"),
        _ => ("CLIPTextModelWithProjection", "tokenizer_2"),
    };
    // The ids of the vocabulary that is written with it, the first 3,514 of CLIP's; the embedding
    // has CLIP's 49,408 rows.
    let config = json!({
        "architectures": [class], "bos_token_id": 3512, "eos_token_id": 3513, "hidden_act": act, "hidden_size": width,
        "intermediate_size": inner, "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": heads, "num_hidden_layers": layers, "pad_token_id": if folder == "text_encoder" { 3513 } else { 0 },
        "projection_dim": projection, "vocab_size": if width < 100 { 3514 } else { 49_408 },
    });
    (folder, tokenizer, config)
}
