//! `vae/config.json`.

use std::path::Path;

use serde_json::{Value, json};
use squeeze_base::error::Result;

use crate::checkpoint::ConfigFile;

/// The architecture of a VAE, and the scaling of its latents (`diffusers.AutoencoderKL`).
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Latent channels.
    pub latent_channels: i64,
    /// Picture channels.
    pub out_channels: i64,
    /// Channels of each level, full resolution first.
    pub block_out_channels: Vec<i64>,
    /// Resnets of an encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of every GroupNorm.
    pub norm_num_groups: i64,
    /// Whether the mid block has self-attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution comes before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether a 1x1 convolution comes after the encoder.
    pub use_quant_conv: bool,
    /// The divisor of latents before they are decoded.
    pub scaling_factor: f64,
    /// Whether the VAE overflows in fp16 and must be computed in fp32. This library always computes
    /// it in fp32; programs for other systems are written as this says.
    pub force_upcast: bool,
    /// Mean and standard deviation of each latent channel, for VAEs whose latents are normalized.
    pub latents_mean_std: Option<(Vec<f64>, Vec<f64>)>,
}

impl VaeConfig {
    /// Reads `path`.
    ///
    /// # Errors
    /// If the file cannot be read, or asks for something that is not implemented; the key is named.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(ConfigFile::read(path)?)
    }

    /// Takes the architecture from a config file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(mut file: ConfigFile) -> Result<Self> {
        file.only("_class_name", &[json!("AutoencoderKL")])?;
        file.only("act_fn", &[json!("silu"), json!("swish")])?;
        let block_out_channels: Vec<i64> = file.or("block_out_channels", vec![64])?;
        let up: Vec<String> = file.or("up_block_types", vec!["UpDecoderBlock2D".to_owned()])?;
        if let Some(other) = up.iter().find(|name| *name != "UpDecoderBlock2D") {
            return Err(file.error("up_block_types", format!("has the unknown block type `{other}` (known: UpDecoderBlock2D)")));
        }
        if up.len() != block_out_channels.len() || !(1..=16).contains(&up.len()) {
            return Err(file.error("up_block_types", format!("has {} entries for {} levels", up.len(), block_out_channels.len())));
        }
        let mean: Option<Vec<f64>> = file.optional("latents_mean")?;
        let std: Option<Vec<f64>> = file.optional("latents_std")?;
        let config = VaeConfig {
            latent_channels: file.or("latent_channels", 4)?,
            out_channels: file.or("out_channels", 3)?,
            layers_per_block: file.or("layers_per_block", 1)?,
            norm_num_groups: file.or("norm_num_groups", 32)?,
            mid_block_add_attention: file.or("mid_block_add_attention", true)?,
            use_post_quant_conv: file.or("use_post_quant_conv", true)?,
            use_quant_conv: file.or("use_quant_conv", true)?,
            scaling_factor: file.or("scaling_factor", 0.18215)?,
            force_upcast: truth(&mut file, "force_upcast")?,
            latents_mean_std: mean.zip(std),
            block_out_channels,
        };
        for (key, value) in [("latent_channels", config.latent_channels), ("norm_num_groups", config.norm_num_groups)] {
            if !(1..=1024).contains(&value) {
                return Err(file.error(key, format!("= {value} is not between 1 and 1024")));
            }
        }
        if config.out_channels != 3 {
            return Err(file.error(
                "out_channels",
                format!("= {} is not supported (only 3, red, green and blue, are)", config.out_channels),
            ));
        }
        if !(1..=64).contains(&config.layers_per_block) {
            return Err(file.error("layers_per_block", format!("= {} is not between 1 and 64", config.layers_per_block)));
        }
        let groups = config.norm_num_groups;
        if let Some(width) =
            config.block_out_channels.iter().find(|width| !(1..=1 << 16).contains(*width) || *width % groups != 0)
        {
            return Err(
                file.error("block_out_channels", format!("has {width}, which norm_num_groups = {groups} does not divide"))
            );
        }
        if !config.scaling_factor.is_finite() || config.scaling_factor == 0.0 {
            return Err(file.error("scaling_factor", format!("= {} is not a scale", config.scaling_factor)));
        }
        if let Some((mean, std)) = &config.latents_mean_std {
            for (key, values) in [("latents_mean", mean), ("latents_std", std)] {
                if values.len() as i64 != config.latent_channels {
                    return Err(file.error(key, format!("has {} entries for {} channels", values.len(), config.latent_channels)));
                }
            }
        }
        let down: Vec<String> = file.or("down_block_types", vec!["DownEncoderBlock2D".to_owned(); up.len()])?;
        if down.len() != up.len() || down.iter().any(|name| name != "DownEncoderBlock2D") {
            return Err(file.error("down_block_types", format!("is not {} times DownEncoderBlock2D", up.len())));
        }
        file.only("in_channels", &[json!(3)])?;
        // SDXL pipelines do not use these.
        file.ignore(&["sample_size", "shift_factor"]);
        file.finish();
        Ok(config)
    }

    /// The number of picture pixels per latent pixel, in each direction.
    #[must_use]
    pub fn scale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Takes a key whose default is true. diffusers declares it as a number, and compares it as a bool.
fn truth(file: &mut ConfigFile, key: &str) -> Result<bool> {
    match file.optional::<Value>(key)? {
        None => Ok(true),
        Some(Value::Bool(value)) => Ok(value),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(number != 0.0),
            None => Err(file.error(key, format!("= {value} is neither true nor false"))),
        },
    }
}
