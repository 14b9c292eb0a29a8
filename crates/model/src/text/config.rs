//! `text_encoder/config.json` and `text_encoder_2/config.json`.

use std::path::Path;

use serde_json::json;
use squeeze_base::error::Result;

use crate::checkpoint::ConfigFile;

/// The architecture of a CLIP text encoder (`transformers.CLIPTextConfig`).
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// The number of rows of the token embedding.
    pub vocab_size: i64,
    /// The width of the states.
    pub hidden_size: i64,
    /// The width inside the feed-forwards.
    pub intermediate_size: i64,
    /// The number of transformer layers.
    pub num_hidden_layers: usize,
    /// The number of attention heads.
    pub num_attention_heads: i64,
    /// The number of positions, 77 for CLIP.
    pub max_position_embeddings: i64,
    /// The feed-forwards' activation.
    pub hidden_act: Activation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// The position from which the pooled state is taken.
    pub end_of_text: EndOfText,
    /// The width of the pooled projection, for `CLIPTextModelWithProjection`.
    pub projection_dim: Option<i64>,
}

/// A feed-forward's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(1.702 x), as in OpenAI's CLIP.
    QuickGelu,
    /// The exact GELU, as in OpenCLIP.
    Gelu,
}

/// The rule for the end of the text, from which the pooled state is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndOfText {
    /// The position of the highest id. This is the meaning of `eos_token_id: 2` in configs from
    /// before transformers' pull request 24773.
    HighestId,
    /// The first position of this id, or 0 where it is absent.
    Token(i64),
}

impl TextConfig {
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
        file.only("model_type", &[json!("clip_text_model")])?;
        let architectures: Vec<String> = file.required("architectures")?;
        let projects = match architectures.first().map(String::as_str) {
            Some("CLIPTextModel") => false,
            Some("CLIPTextModelWithProjection") => true,
            other => {
                let name = other.unwrap_or("nothing");
                return Err(
                    file.error("architectures", format!("names {name} (known: CLIPTextModel, CLIPTextModelWithProjection)"))
                );
            }
        };
        let act: String = file.or("hidden_act", "quick_gelu".to_owned())?;
        let hidden_act = match act.as_str() {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => return Err(file.error("hidden_act", format!("= {other} is not supported (only quick_gelu and gelu are)"))),
        };
        let end_of_text = match file.or("eos_token_id", 49_407)? {
            2 => EndOfText::HighestId,
            id => EndOfText::Token(id),
        };
        let projection_dim = file.or("projection_dim", 512)?;
        let config = TextConfig {
            vocab_size: file.or("vocab_size", 49_408)?,
            hidden_size: file.or("hidden_size", 512)?,
            intermediate_size: file.or("intermediate_size", 2048)?,
            num_hidden_layers: file.or("num_hidden_layers", 12)?,
            num_attention_heads: file.or("num_attention_heads", 8)?,
            max_position_embeddings: file.or("max_position_embeddings", 77)?,
            hidden_act,
            layer_norm_eps: file.or("layer_norm_eps", 1e-5)?,
            end_of_text,
            projection_dim: projects.then_some(projection_dim),
        };
        let positive = [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_attention_heads", config.num_attention_heads),
            ("max_position_embeddings", config.max_position_embeddings),
            ("projection_dim", projection_dim),
        ];
        for (key, value) in positive {
            if !(1..=1 << 20).contains(&value) {
                return Err(file.error(key, format!("= {value} is not between 1 and {}", 1 << 20)));
            }
        }
        if !(1..=256).contains(&config.num_hidden_layers) {
            return Err(file.error("num_hidden_layers", format!("= {} is not between 1 and 256", config.num_hidden_layers)));
        }
        if config.hidden_size % config.num_attention_heads != 0 {
            let problem = format!("= {} does not divide hidden_size = {}", config.num_attention_heads, config.hidden_size);
            return Err(file.error("num_attention_heads", problem));
        }
        // These keys are about training, text generation and files.
        file.ignore(&[
            "attention_dropout",
            "dropout",
            "initializer_factor",
            "initializer_range",
            "torch_dtype",
            "dtype",
            "transformers_version",
            "bos_token_id",
            "pad_token_id",
            "gradient_checkpointing",
            "use_cache",
            "tie_word_embeddings",
        ]);
        file.finish();
        Ok(config)
    }
}
