//! A diffusers SDXL folder.

use std::path::{Path, PathBuf};

use sdxl_model::checkpoint::{ConfigFile, SourceFile, Weights};
use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::text::{ClipText, ClipTokenizer, TextConfig};
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder};
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};

use super::image_channels::ImageChannels;

/// A pipeline in diffusers layout: `model_index.json` and a folder for each part. Opening it reads
/// configs only.
#[derive(Debug)]
pub struct PipelineFolder {
    root: PathBuf,
    /// Whether an absent negative prompt means zeros; if not, it means the encoded empty text.
    pub force_zeros_for_empty_prompt: bool,
    /// Whether the UNet's time ids have an aesthetic score in place of the target size (the
    /// refiner).
    pub requires_aesthetics_score: bool,
    /// Whether an edit model is shown scaled latents (CosXL).
    pub is_cosxl_edit: bool,
    /// The pipeline's text encoders, by folder name.
    pub text_encoders: Vec<TextPart>,
    /// The UNet's architecture.
    pub unet: UnetChain,
    /// The VAE's architecture.
    pub vae: VaeConfig,
    /// The pipeline's own sampler.
    pub scheduler: SchedulerConfig,
    /// `unet/config.json` as it was read.
    unet_config: Map<String, Value>,
    unet_config_file: SourceFile,
}

/// A tokenizer and the encoder that its ids are for.
#[derive(Debug)]
pub struct TextPart {
    /// `tokenizer` or `tokenizer_2`.
    pub tokenizer: &'static str,
    /// `text_encoder` or `text_encoder_2`.
    pub encoder: &'static str,
    /// The encoder's architecture.
    pub config: TextConfig,
}

impl PipelineFolder {
    /// Reads the configs of the pipeline in `root`, and checks that its parts fit together.
    ///
    /// # Errors
    /// If `root` is not a folder, or a config cannot be read or asks for something that is not
    /// implemented.
    pub fn open(root: &Path) -> Result<Self> {
        if root.is_file() {
            let problem = "is a file; --model takes a folder in diffusers layout (single-file checkpoints are not read yet)";
            return Err(Error::bad_file(root, problem));
        }
        let mut index = ConfigFile::read(&root.join("model_index.json"))?;
        index.only("_class_name", &CLASSES.map(|class| json!(class)))?;
        component(&mut index, "unet", &["UNet2DConditionModel"])?;
        component(&mut index, "vae", &["AutoencoderKL"])?;
        index.ignore(&["feature_extractor", "image_encoder", "add_watermarker"]);
        let mut scheduler = SchedulerConfig::read(&root.join("scheduler/scheduler_config.json"))?;
        // If the two disagree, diffusers builds the class that the index names.
        if let Some((_library, class)) = index.optional::<(String, String)>("scheduler")?
            && class != scheduler.class()
        {
            scheduler = scheduler.with_override(&class)?;
        }
        let mut text_encoders = Vec::new();
        for (tokenizer, encoder) in [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")] {
            let has_tokenizer = component(&mut index, tokenizer, &["CLIPTokenizer", "CLIPTokenizerFast"])?;
            let has_encoder = component(&mut index, encoder, &["CLIPTextModel", "CLIPTextModelWithProjection"])?;
            match (has_tokenizer, has_encoder) {
                (false, false) => {}
                (true, true) => {
                    let config = TextConfig::read(&root.join(encoder).join("config.json"))?;
                    text_encoders.push(TextPart { tokenizer, encoder, config });
                }
                _ => return Err(index.error(encoder, format!("and `{tokenizer}` must both be there or both be absent"))),
            }
        }
        // Read once, so that the recorded hash is that of the config in use.
        let unet_path = root.join(UNET_CONFIG);
        let unet_content = input::read(&unet_path, Limit::MODEL_CONFIG)?;
        let unet_config = ConfigFile::from_bytes(&unet_path, &unet_content)?.into_entries();
        let folder = PipelineFolder {
            force_zeros_for_empty_prompt: index.or("force_zeros_for_empty_prompt", true)?,
            requires_aesthetics_score: index.or("requires_aesthetics_score", false)?,
            is_cosxl_edit: index.or("is_cosxl_edit", false)?,
            text_encoders,
            unet: UnetChain::new(UnetConfig::parse(ConfigFile::from_entries(&unet_path, unet_config.clone()))?),
            unet_config,
            unet_config_file: SourceFile::of_bytes(&unet_content, UNET_CONFIG),
            vae: VaeConfig::read(&root.join("vae/config.json"))?,
            scheduler,
            root: root.to_owned(),
        };
        folder.check(&index)?;
        index.finish();
        Ok(folder)
    }

    /// Checks that the parts' sizes fit together.
    fn check(&self, index: &ConfigFile) -> Result<()> {
        let unet = self.unet.config();
        let Some(pooled) = self.text_encoders.last().and_then(|part| part.config.projection_dim) else {
            return Err(index.error("text_encoder_2", "must be a CLIPTextModelWithProjection: the UNet is told its pooled text"));
        };
        let states: i64 = self.text_encoders.iter().map(|part| part.config.hidden_size).sum();
        let fits = [
            ("the text encoders' states", states, "cross_attention_dim", unet.cross_attention_dim),
            (
                "pooled text and time ids",
                pooled + self.time_ids() * unet.addition_time_embed_dim,
                "projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
            ),
            ("the VAE's latent channels", self.vae.latent_channels, "out_channels", unet.out_channels),
        ];
        for (what, have, key, want) in fits {
            if have != want {
                let path = self.root.join(UNET_CONFIG);
                return Err(Error::ConfigKey { path, key: key.into(), problem: format!("= {want}, but {what} make {have}") });
            }
        }
        if ImageChannels::of(unet.in_channels, self.vae.latent_channels).is_none() {
            let (path, latents) = (self.root.join(UNET_CONFIG), self.vae.latent_channels);
            let known = format!("{latents}; {} for inpainting, {} for an edit model", 2 * latents + 1, 2 * latents);
            let problem = format!("= {}, but the VAE's latents make {known}", unet.in_channels);
            return Err(Error::ConfigKey { path, key: "in_channels".into(), problem });
        }
        Ok(())
    }

    /// The channels that the UNet takes beside the noisy latents.
    #[must_use]
    pub fn image_channels(&self) -> ImageChannels {
        ImageChannels::of(self.unet.config().in_channels, self.vae.latent_channels)
            .expect("`check` has refused other numbers of channels")
    }

    /// The number of time ids: size, crop, and target size or score.
    #[must_use]
    pub fn time_ids(&self) -> i64 {
        if self.requires_aesthetics_score { 5 } else { 6 }
    }

    /// The rows of each call of the UNet for one picture.
    #[must_use]
    pub fn rows(&self, guidance: f64) -> i64 {
        self.image_channels().rows(self.unet.config(), guidance)
    }

    /// Height and width of pictures in pixels: `asked`, or the model's own size.
    ///
    /// # Errors
    /// [`Error::Argument`] if the VAE cannot make such a picture.
    pub fn picture_size(&self, asked: Option<(i64, i64)>) -> Result<(i64, i64)> {
        const LARGEST: i64 = 16_384;
        let scale = self.vae.scale();
        let [sample_height, sample_width] = self.unet.config().sample_size;
        let (height, width) = asked.unwrap_or((sample_height * scale, sample_width * scale));
        for (name, value) in [("height", height), ("width", width)] {
            if value % 8 != 0 || value % scale != 0 || !(8..=LARGEST).contains(&value) {
                let step = scale.max(8);
                return Err(Error::Argument(format!("{name} {value} is not a multiple of {step} between {step} and {LARGEST}")));
            }
        }
        Ok((height, width))
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The UNet's `config.json`, every entry as it was when the pipeline was opened.
    #[must_use]
    pub fn unet_config(&self) -> &Map<String, Value> {
        &self.unet_config
    }

    /// The length and hash of the UNet's `config.json`, as it was when the pipeline was opened.
    #[must_use]
    pub fn unet_config_file(&self) -> &SourceFile {
        &self.unet_config_file
    }

    /// The UNet's weights, checked against its config.
    ///
    /// # Errors
    /// If they are not there, damaged, or tensors disagree with the config.
    pub fn unet_weights(&self) -> Result<Weights> {
        let weights = Weights::open(&self.root.join("unet"), "diffusion_pytorch_model", str::to_owned)?;
        weights.check(&self.unet.tensors()?, |_| false)?;
        Ok(weights)
    }

    /// The VAE's weights, checked against its config.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn vae_weights(&self) -> Result<Weights> {
        let weights = Weights::open(&self.root.join("vae"), "diffusion_pytorch_model", VaeDecoder::rename)?;
        let weights = weights.with_linear(VaeDecoder::is_linear);
        weights.check(&VaeDecoder::tensors(&self.vae)?, VaeDecoder::is_unused)?;
        Ok(weights)
    }

    /// A text encoder's weights, checked against its config.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn text_weights(&self, part: &TextPart) -> Result<Weights> {
        let weights = Weights::open(&self.root.join(part.encoder), "model", ClipText::rename)?;
        let pools = part.config.projection_dim.is_some();
        // The file of an encoder without a projection may have a final norm or a projection that is
        // unused.
        weights.check(&ClipText::tensors(&part.config)?, |name| {
            ClipText::is_unused(name) || (!pools && name == "text_projection.weight")
        })?;
        Ok(weights)
    }

    /// The files that the encoding of a prompt depends on: text encoders, tokenizers, their configs
    /// and the scheduler's, each with its hash, by name.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn prompt_files(&self) -> Result<Vec<SourceFile>> {
        let mut paths = vec![self.root.join("model_index.json"), self.root.join("scheduler/scheduler_config.json")];
        for part in &self.text_encoders {
            paths.push(self.root.join(part.encoder).join("config.json"));
            paths.extend(self.text_weights(part)?.files().map(Path::to_owned));
            let folder = self.root.join(part.tokenizer);
            for entry in std::fs::read_dir(&folder).map_err(Error::read(&folder))? {
                paths.extend(Some(entry.map_err(Error::read(&folder))?.path()).filter(|path| path.is_file()));
            }
        }
        paths.sort();
        let name = |path: &Path| {
            path.strip_prefix(&self.root).expect("every path was joined to the root").to_string_lossy().into_owned()
        };
        paths.iter().map(|path| SourceFile::read(path, name(path))).collect()
    }

    /// A part's tokenizer.
    ///
    /// # Errors
    /// If it cannot be read, or makes more ids than the encoder has positions, or ids that it has
    /// no embedding for.
    pub fn tokenizer(&self, part: &TextPart) -> Result<ClipTokenizer> {
        let folder = self.root.join(part.tokenizer);
        let tokenizer = ClipTokenizer::open(&folder)?;
        let (positions, vocabulary) = (part.config.max_position_embeddings, part.config.vocab_size);
        if tokenizer.length() as i64 > positions {
            let problem = format!("makes {} tokens, but {} has {positions} positions", tokenizer.length(), part.encoder);
            return Err(Error::bad_file(&folder, problem));
        }
        if tokenizer.vocabulary() > vocabulary {
            let problem =
                format!("has ids up to {}, but {} has {vocabulary} embeddings", tokenizer.vocabulary() - 1, part.encoder);
            return Err(Error::bad_file(&folder, problem));
        }
        Ok(tokenizer)
    }
}

/// The pipelines that are known. What a model does is told by its UNet's channels.
const CLASSES: [&str; 4] = [
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
];

/// The path of the UNet's config in a pipeline.
const UNET_CONFIG: &str = "unet/config.json";

/// Takes a component's entry, `[library, class]`. `[null, null]`, `null` and an absent entry all
/// mean that the pipeline lacks the component.
fn component(index: &mut ConfigFile, key: &str, known: &[&str]) -> Result<bool> {
    let Some(entry) = index.optional::<Value>(key)? else { return Ok(false) };
    match entry.get(1) {
        Some(Value::Null) => Ok(false),
        Some(Value::String(class)) if known.contains(&class.as_str()) => Ok(true),
        _ => Err(index.error(key, format!("= {entry} is not supported (known: {})", known.join(", ")))),
    }
}
