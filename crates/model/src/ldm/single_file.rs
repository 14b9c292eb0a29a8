//! A single-file checkpoint, told apart by its tensors.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::{Entry, SafetensorsFile};

use super::family::{Family, Prediction};
use super::names::Names;
use super::part_configs::{self, Shapes};
use super::refusal;
use super::unet_config::UnetShapes;
use super::vae_file::VaeFile;
use crate::checkpoint::{View, Weights};
use crate::text::{ClipText, TextConfig};
use crate::unet::UnetChain;

/// A safetensors file with the UNet of an SDXL model, and usually its text encoders and its VAE.
/// Opening it reads the header and the small tensors that mark a family.
#[derive(Debug, Clone)]
pub struct SingleFile {
    file: Arc<SafetensorsFile>,
    family: Family,
    /// What stands before the names of the UNet's tensors: `model.diffusion_model.`, or nothing in
    /// the file of a UNet alone.
    unet: &'static str,
    encoders: Vec<Encoder>,
    vae: Option<VaeFile>,
    skipped: Vec<Skipped>,
}

/// A text encoder in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Encoder {
    /// Its folder in the diffusers layout: `text_encoder` or `text_encoder_2`.
    part: &'static str,
    prefix: &'static str,
    is_open_clip: bool,
}

/// Tensors of a file that are not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// What they are.
    pub what: &'static str,
    /// Their names.
    pub tensors: Vec<String>,
}

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
/// `label_emb` is the embedding of pooled text and sizes, which only the SDXL family has.
const LDM_UNET: &str = "label_emb.0.0.weight";
const DIFFUSERS_UNET: &str = "add_embedding.linear_1.weight";

/// The places of text encoders. Those of SDXL base are CLIP-L and OpenCLIP; a refiner has OpenCLIP
/// alone, which is then the first. Some merges have OpenCLIP in transformers' names.
const ENCODERS: [Encoder; 4] = [
    Encoder { part: "text_encoder", prefix: "conditioner.embedders.0.transformer.", is_open_clip: false },
    Encoder { part: "text_encoder_2", prefix: "conditioner.embedders.1.model.", is_open_clip: true },
    Encoder { part: "text_encoder_2", prefix: "conditioner.embedders.1.transformer.", is_open_clip: false },
    Encoder { part: "text_encoder_2", prefix: "conditioner.embedders.0.model.", is_open_clip: true },
];

/// Tensors that say what a model is, without being weights.
pub const MARKERS: [&str; 6] = ["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"];

/// Names of tables and counters that training leaves in a checkpoint. Source: the list of tensors
/// that stable-diffusion.cpp does not read (`src/model_loader.cpp`).
const TRAINING: [&str; 12] = [
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "sqrt_",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "lvlb_weights",
    "logvar",
    "denoiser.sigmas",
    "global_step",
    "embedding_manager.",
    "iteration",
];

impl SingleFile {
    /// Opens `path` and tells what it is. What it has besides is logged by name.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it is another model, or in a form that is not read, saying what it is
    /// and what to do; [`Error::Read`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(SafetensorsFile::open(path)?);
        refusal::by_tensors(&file)?;
        let has = |name: &str| file.entries().contains_key(name);
        let (is_ldm, is_bare) = (has(&format!("{UNET}{LDM_UNET}")), has(LDM_UNET) || has(DIFFUSERS_UNET));
        let unet = match (is_ldm, is_bare) {
            (true, _) => UNET,
            (false, true) => "",
            (false, false) => return Err(Error::bad_file(path, without_unet(&file))),
        };
        let has_prefix = |prefix: &str| file.entries().keys().any(|name| name.starts_with(prefix));
        let mut encoders: Vec<Encoder> = Vec::new();
        for encoder in ENCODERS {
            let is_new = encoders.iter().all(|earlier| earlier.part != encoder.part);
            if is_new && !unet.is_empty() && has_prefix(encoder.prefix) {
                encoders.push(encoder);
            }
        }
        let vae = if unet.is_empty() { None } else { VaeFile::within(Arc::clone(&file), VAE) };
        let mut single = SingleFile {
            family: Family { is_refiner: false, in_channels: 4, prediction: Prediction::of(&file)?, is_told_guidance: false },
            skipped: Vec::new(),
            unet,
            encoders,
            vae,
            file,
        };
        let shapes = single.unet_shapes();
        let (in_channels, context) = (shapes.in_channels(), shapes.cross_attention_dim());
        let is_told_guidance = shapes.time_cond_proj_dim().is_some();
        single.family.is_told_guidance = is_told_guidance;
        single.family.in_channels = in_channels.unwrap_or(4);
        single.family.is_refiner = match single.encoders[..] {
            [] => context == Some(REFINER_CONTEXT),
            [only] => only.prefix == ENCODERS[3].prefix,
            _ => false,
        };
        single.skipped = single.find_skipped();
        single.log_skipped();
        Ok(single)
    }

    /// Tensors of no part, by kind.
    fn find_skipped(&self) -> Vec<Skipped> {
        let mut kinds = [AVERAGES, TRAINED_WITH, UNKNOWN].map(|what| Skipped { what, tensors: Vec::new() });
        for name in self.file.entries().keys() {
            let is_part = name.starts_with(self.unet)
                || (self.vae.is_some() && name.starts_with(VAE))
                || self.encoders.iter().any(|encoder| name.starts_with(encoder.prefix));
            let kind = if name.starts_with("model_ema.") {
                0
            } else if TRAINING.iter().any(|known| name.starts_with(known)) {
                1
            } else if is_part && !self.is_aside(name) || MARKERS.contains(&name.as_str()) {
                continue;
            } else {
                2
            };
            kinds[kind].tensors.push(name.clone());
        }
        kinds.into_iter().filter(|kind| !kind.tensors.is_empty()).collect()
    }

    /// Whether a name in the file of a UNet alone is that of a marker or of training.
    fn is_aside(&self, name: &str) -> bool {
        let is_known = MARKERS.contains(&name) || name.starts_with("model_ema.");
        self.unet.is_empty() && (is_known || TRAINING.iter().any(|known| name.starts_with(known)))
    }

    fn log_skipped(&self) {
        for Skipped { what, tensors } in &self.skipped {
            let (path, count, first) = (self.path().display(), tensors.len(), &tensors[0]);
            if *what == UNKNOWN {
                tracing::warn!("{path}: {count} {what} are not read (`{first}`, …)");
            } else {
                tracing::info!("{path}: {count} {what} are not read (`{first}`, …)");
            }
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file with its tensors as they are stored.
    #[must_use]
    pub fn file(&self) -> &Arc<SafetensorsFile> {
        &self.file
    }

    /// The model's family.
    #[must_use]
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// The tensors that are not read, by kind.
    #[must_use]
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// What stands before the names of the UNet's tensors.
    #[must_use]
    pub fn unet_prefix(&self) -> &'static str {
        self.unet
    }

    /// The parts of a pipeline that are not in the file, by their folders in the diffusers layout.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let encoders = if self.family.is_refiner { &["text_encoder_2"][..] } else { &["text_encoder", "text_encoder_2"] };
        let encoders = encoders.iter().copied().filter(|part| self.encoder(part).is_none());
        encoders.chain(self.vae.is_none().then_some("vae")).collect()
    }

    /// The VAE, if the file has one.
    #[must_use]
    pub fn vae(&self) -> Option<&VaeFile> {
        self.vae.as_ref()
    }

    /// Whether the file has the text encoder `part`, which is `text_encoder` or `text_encoder_2`.
    #[must_use]
    pub fn has_encoder(&self, part: &str) -> bool {
        self.encoder(part).is_some()
    }

    fn encoder(&self, part: &str) -> Option<&Encoder> {
        self.encoders.iter().find(|encoder| encoder.part == part)
    }

    /// Elements and bytes of the tensors that are read of a part of a pipeline, as they are stored,
    /// and the dtype of the first; of the VAE, the decoder's.
    #[must_use]
    pub fn size_of(&self, part: &str) -> (u64, u64, Option<Dtype>) {
        let prefix = match part {
            "unet" => self.unet,
            "vae" => VAE,
            encoder => self.encoder(encoder).map_or(encoder, |encoder| encoder.prefix),
        };
        let is_read = |name: &str| match name.strip_prefix(prefix) {
            None => false,
            Some(rest) if part == "vae" => rest.starts_with("decoder.") || rest.starts_with("post_quant_conv."),
            Some(rest) if part == "unet" => !self.is_aside(rest),
            Some(rest) => !rest.ends_with("position_ids") && rest != "attn_mask" && rest != "logit_scale",
        };
        let entries = || self.file.entries().iter().filter(|(name, _)| is_read(name)).map(|(_, entry)| entry);
        let elements = entries().map(|entry| entry.shape.iter().product::<i64>() as u64).sum();
        (elements, entries().map(Entry::bytes).sum(), entries().next().map(|entry| entry.dtype))
    }

    fn shapes(&self, prefix: &str) -> Shapes<'_> {
        let entries = self.file.entries().iter();
        entries.filter_map(|(name, entry)| Some((name.strip_prefix(prefix)?, entry.shape.as_slice()))).collect()
    }

    fn unet_shapes(&self) -> UnetShapes<'_> {
        UnetShapes(self.shapes(self.unet))
    }

    /// The UNet's `config.json`: that of `base`, but for the input channels and the guidance scale,
    /// which the file knows better; or without one, as shapes and family tell it. `None` if they do
    /// not tell it.
    #[must_use]
    pub fn unet_config(&self, base: Option<&Map<String, Value>>) -> Option<Map<String, Value>> {
        let shapes = self.unet_shapes();
        let Some(base) = base else { return shapes.config() };
        let mut config = base.clone();
        if let Some(channels) = shapes.in_channels().filter(|channels| base.get("in_channels") != Some(&json!(channels))) {
            tracing::info!("{}: the UNet has {channels} input channels, other than the base", self.path().display());
            config.insert("in_channels".into(), json!(channels));
        }
        let told = json!(shapes.time_cond_proj_dim());
        if *base.get("time_cond_proj_dim").unwrap_or(&Value::Null) != told {
            let what = if told.is_null() { "not told" } else { "told" };
            tracing::info!("{}: the UNet is {what} the guidance scale, other than the base's", self.path().display());
            config.insert("time_cond_proj_dim".into(), told);
        }
        Some(config)
    }

    /// A text encoder's `config.json`; `None` if the file lacks the encoder, or its shapes do not
    /// tell it.
    #[must_use]
    pub fn text_config(&self, part: &str) -> Option<Map<String, Value>> {
        let encoder = self.encoder(part)?;
        let shapes = self.shapes(encoder.prefix);
        if encoder.is_open_clip { part_configs::open_clip(&shapes) } else { part_configs::clip(&shapes) }
    }

    /// The UNet's weights, under the names of `chain`.
    ///
    /// # Errors
    /// [`Error::BadFile`] if two tensors have one name.
    pub fn unet_weights(&self, chain: &UnetChain) -> Result<Weights> {
        let names = Names::of_unet(chain)?;
        Weights::of_file(Arc::clone(&self.file), |stored| match stored.strip_prefix(self.unet) {
            Some(_) if self.is_aside(stored) => Vec::new(),
            Some(stored) => names.views(stored),
            None => Vec::new(),
        })
    }

    /// A text encoder's weights, under transformers' names.
    ///
    /// # Errors
    /// [`Error::Argument`] if the file has no such encoder; [`Error::BadFile`] if its attentions
    /// cannot be divided into query, key and value.
    pub fn text_weights(&self, part: &str, config: &TextConfig) -> Result<Weights> {
        let absent = || Error::Argument(format!("{} has no {part}", self.path().display()));
        let encoder = self.encoder(part).ok_or_else(absent)?;
        let names = encoder.is_open_clip.then(|| Names::of_open_clip(config));
        Weights::of_file(Arc::clone(&self.file), |stored| match stored.strip_prefix(encoder.prefix) {
            None => Vec::new(),
            // Position ids and the causal mask are tables, not weights.
            Some(table) if table.ends_with("position_ids") || table == "attn_mask" => Vec::new(),
            Some(stored) => match &names {
                Some(names) => names.views(stored),
                None => vec![View::whole(ClipText::rename(stored))],
            },
        })
    }
}

/// The width of a refiner's text states, that of OpenCLIP alone.
const REFINER_CONTEXT: i64 = 1280;

const AVERAGES: &str = "moving averages of the weights (EMA)";
const TRAINED_WITH: &str = "tables and counters of the training";
const UNKNOWN: &str = "tensors of no known part";

/// Says what a file without an SDXL UNet has.
fn without_unet(file: &SafetensorsFile) -> String {
    let any = |prefix: &str| file.entries().keys().any(|name| name.starts_with(prefix));
    let what = if any(&format!("{UNET}down_blocks.")) {
        "has a UNet with diffusers' names behind the prefix of single-file checkpoints, which neither diffusers nor this program \
         reads; take the prefix `model.diffusion_model.` off the names, and give the pipeline of the UNet as --base"
    } else if any(UNET) || any("input_blocks.") || any("down_blocks.") {
        "has a UNet that is not of the SDXL family (no embedding of pooled text and sizes)"
    } else if any(VAE) || any("decoder.") {
        "has a VAE and no UNet; give it as --vae, with the model as --model"
    } else if any("text_model.") || any("conditioner.") {
        "has text encoders and no UNet; give an SDXL model"
    } else {
        "is no SDXL model: it has none of the names of a UNet in single-file checkpoints"
    };
    let first = file
        .entries()
        .keys()
        .next()
        .map_or(String::new(), |name| format!(" (its first tensor is `{}`)", squeeze_base::shorten::shorten(name)));
    format!("{what}{first}")
}
