//! An SDXL pipeline in files.

use std::path::{Path, PathBuf};

use std::sync::Arc;

use sdxl_model::checkpoint::lora::{LoraPart, Loras, PartLoras};
use sdxl_model::checkpoint::{ConfigFile, SourceFile, Weights};
use sdxl_model::ldm::SingleFile;
use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::text::{ClipText, ClipTokenizer, TextConfig, vocabulary};
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder};
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use squeeze_container::Container;

use super::image_channels::ImageChannels;
use super::lora;
use super::network_weights::NetworkWeights;
use super::parts::{ModelFiles, Parts, TEXT_PARTS, TextPlace, VaeAt, VocabularyAt, WeightsAt};
use super::unet_folder::{UnetFolder, known_weights};

/// A pipeline in diffusers layout (`model_index.json` and a folder for each part), or a single-file
/// checkpoint. Opening it reads configs and headers only.
#[derive(Debug)]
pub struct PipelineFolder {
    files: ModelFiles,
    parts: Parts,
    loras: Option<Arc<Loras>>,
    /// The name under which the pipeline was published, if `model_index.json` gives one.
    pub name: Option<String>,
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
    place: TextPlace,
}

impl TextPart {
    /// The part whose LoRAs change this encoder.
    fn lora_part(&self) -> LoraPart {
        if self.encoder == "text_encoder_2" { LoraPart::TextEncoder2 } else { LoraPart::TextEncoder }
    }

    /// The encoder's `config.json`.
    #[must_use]
    pub fn config_entries(&self) -> &Map<String, Value> {
        &self.place.config.entries
    }
}

impl PipelineFolder {
    /// Reads the configs of the pipeline in `root`, a folder in diffusers layout or a single-file
    /// checkpoint with all parts, and checks that its parts fit together.
    ///
    /// # Errors
    /// As [`open_files`](Self::open_files).
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_files(&ModelFiles::of(root))
    }

    /// Reads the configs of a pipeline, and checks that its parts fit together.
    ///
    /// # Errors
    /// If a part is missing, or a config cannot be read or asks for something that is not
    /// implemented.
    pub fn open_files(files: &ModelFiles) -> Result<Self> {
        let mut parts = Parts::open(files)?;
        let mut index = parts.index.file();
        index.only("_class_name", &CLASSES.map(|class| json!(class)))?;
        component(&mut index, "unet", &["UNet2DConditionModel"])?;
        component(&mut index, "vae", &["AutoencoderKL"])?;
        index.ignore(&["feature_extractor", "image_encoder", "add_watermarker"]);
        let mut scheduler = parts.scheduler.clone();
        // If the two disagree, diffusers builds the class that the index names.
        if let Some((_library, class)) = index.optional::<(String, String)>("scheduler")?
            && class != scheduler.class()
        {
            scheduler = scheduler.with_class(&class);
        }
        let mut text_encoders = Vec::new();
        for (tokenizer, encoder) in TEXT_PARTS {
            let has_tokenizer = component(&mut index, tokenizer, &["CLIPTokenizer", "CLIPTokenizerFast"])?;
            let has_encoder = component(&mut index, encoder, &["CLIPTextModel", "CLIPTextModelWithProjection"])?;
            if has_tokenizer != has_encoder {
                return Err(index.error(encoder, format!("and `{tokenizer}` must both be there or both be absent")));
            }
        }
        for place in std::mem::take(&mut parts.text) {
            let TextPlace { tokenizer, encoder, ref config, .. } = place;
            let config = TextConfig::parse(config.file())?;
            text_encoders.push(TextPart { tokenizer, encoder, config, place });
        }
        let vae = VaeConfig::parse(parts.vae.file())?;
        for (container, fits) in parts.containers(&text_encoders, &vae)? {
            if !fits {
                let problem = format!("holds another architecture than {}", files.model.display());
                return Err(Error::bad_file(&container, problem));
            }
        }
        let folder = PipelineFolder {
            name: index.optional::<Value>("_name_or_path")?.as_ref().and_then(Value::as_str).map(str::to_owned),
            force_zeros_for_empty_prompt: index.or("force_zeros_for_empty_prompt", true)?,
            requires_aesthetics_score: index.or("requires_aesthetics_score", false)?,
            is_cosxl_edit: index.or("is_cosxl_edit", false)?,
            text_encoders,
            unet: UnetChain::new(UnetConfig::parse(parts.unet.file())?),
            vae,
            scheduler,
            files: files.clone(),
            parts,
            loras: None,
        };
        folder.check(&index)?;
        index.finish();
        let encoders: Vec<_> = folder.text_encoders.iter().map(|part| (part.lora_part(), &part.config)).collect();
        let loras = lora::open(files, &folder.unet, &encoders)?;
        let folder = PipelineFolder { loras, ..folder };
        for part in &folder.text_encoders {
            if let (Some(container), Some(_)) = (&part.place.container, folder.loras_of(part.lora_part())) {
                let (path, name) = (container.path().display(), part.encoder);
                return Err(Error::Argument(format!(
                    "{path} is compressed, so that the LoRAs' changes of the {name} cannot be merged into it; compress the {name} \
                     with these LoRAs, or leave out the tensors by --lora-ignore"
                )));
            }
        }
        Ok(folder)
    }

    /// The LoRAs that are merged into the pipeline's weights.
    fn loras_of(&self, part: LoraPart) -> Option<PartLoras> {
        self.loras.as_ref().and_then(|loras| loras.of(part))
    }

    /// The files of the LoRAs, each with its scale and hash.
    ///
    /// # Errors
    /// [`Error::Changed`]; [`Error::Read`].
    pub fn lora_files(&self) -> Result<Vec<SourceFile>> {
        self.loras.as_ref().map_or_else(|| Ok(Vec::new()), |loras| lora::sources(loras))
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
                let path = self.parts.unet.path.clone();
                return Err(Error::ConfigKey { path, key: key.into(), problem: format!("= {want}, but {what} make {have}") });
            }
        }
        if ImageChannels::of(unet.in_channels, self.vae.latent_channels).is_none() {
            let (path, latents) = (self.parts.unet.path.clone(), self.vae.latent_channels);
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

    /// The folder, or the single-file checkpoint.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.files.model
    }

    /// The files that the pipeline was opened from.
    #[must_use]
    pub fn model_files(&self) -> &ModelFiles {
        &self.files
    }

    /// The checkpoint that the UNet is in; `None` for a folder.
    #[must_use]
    pub fn single_file(&self) -> Option<&SingleFile> {
        match &self.parts.unet_weights {
            WeightsAt::Folder(_) => None,
            WeightsAt::Checkpoint(file) => Some(file),
        }
    }

    /// The UNet's `config.json`, every entry as it was when the pipeline was opened.
    #[must_use]
    pub fn unet_config(&self) -> &Map<String, Value> {
        &self.parts.unet.entries
    }

    /// `model_index.json`.
    #[must_use]
    pub fn index(&self) -> &Map<String, Value> {
        &self.parts.index.entries
    }

    /// The VAE's `config.json`.
    #[must_use]
    pub fn vae_config(&self) -> &Map<String, Value> {
        &self.parts.vae.entries
    }

    /// The length and hash of the UNet's `config.json`, as it was when the pipeline was opened;
    /// `None` if the tensors of a checkpoint told the architecture.
    #[must_use]
    pub fn unet_config_file(&self) -> Option<&SourceFile> {
        self.parts.unet_file.as_ref()
    }

    /// The UNet's weights, checked against its config.
    ///
    /// # Errors
    /// If they are not there, damaged, or tensors disagree with the config.
    pub fn unet_weights(&self) -> Result<Weights> {
        let weights = match &self.parts.unet_weights {
            WeightsAt::Folder(folder) => known_weights(folder)?,
            WeightsAt::Checkpoint(file) => file.unet_weights(&self.unet)?,
        };
        weights.check(&self.unet.tensors()?, |_| false)?;
        Ok(weights.with_loras(self.loras_of(LoraPart::Unet)))
    }

    /// What stands before the names of the UNet's files in the list of a container's sources.
    #[must_use]
    pub fn unet_folder(&self) -> &'static str {
        match &self.parts.unet_weights {
            WeightsAt::Folder(_) => UnetFolder::IN_PIPELINE,
            WeightsAt::Checkpoint(_) => "",
        }
    }

    /// The VAE's weights, checked against its config.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn vae_weights(&self) -> Result<Weights> {
        let weights = match &self.parts.vae_weights {
            VaeAt::Folder(folder) => Weights::open(folder, "diffusion_pytorch_model", VaeDecoder::rename)?,
            VaeAt::File(file) => file.weights(&self.vae)?,
        };
        let weights = weights.with_linear(VaeDecoder::is_linear);
        weights.check(&VaeDecoder::tensors(&self.vae)?, VaeDecoder::is_unused)?;
        Ok(weights)
    }

    /// A text encoder's weights, checked against its config.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn text_weights(&self, part: &TextPart) -> Result<Weights> {
        let weights = match &part.place.weights {
            WeightsAt::Folder(folder) => Weights::open(folder, "model", ClipText::rename)?,
            WeightsAt::Checkpoint(file) => file.text_weights(part.encoder, &part.config)?,
        };
        let pools = part.config.projection_dim.is_some();
        // The file of an encoder without a projection may have a final norm or a projection that is
        // unused.
        weights.check(&ClipText::tensors(&part.config)?, |name| {
            ClipText::is_unused(name) || (!pools && name == "text_projection.weight")
        })?;
        Ok(weights.with_loras(self.loras_of(part.lora_part())))
    }

    /// A text encoder's weights as pictures are drawn with them: those of its container if one was
    /// given, else its own.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn text_network(&self, part: &TextPart) -> Result<NetworkWeights> {
        let Some(container) = &part.place.container else { return Ok(NetworkWeights::Dense(self.text_weights(part)?)) };
        let weights = NetworkWeights::Container(Arc::clone(container));
        weights.stored().check_against(&ClipText::tensors(&part.config)?, &|_| false)?;
        Ok(weights)
    }

    /// The VAE's weights as pictures are drawn with them: those of its container if one was given,
    /// else its own.
    ///
    /// # Errors
    /// As [`unet_weights`](Self::unet_weights).
    pub fn vae_network(&self) -> Result<NetworkWeights> {
        let Some(container) = &self.parts.vae_container else { return Ok(NetworkWeights::Dense(self.vae_weights()?)) };
        let weights = NetworkWeights::Container(Arc::clone(container));
        weights.stored().check_against(&VaeDecoder::tensors(&self.vae)?, &VaeDecoder::is_unused)?;
        Ok(weights)
    }

    /// The files that the encoding of a prompt depends on: text encoders, tokenizers, their configs
    /// and the scheduler's, each with its hash, by name. A single-file checkpoint is hashed once.
    ///
    /// # Errors
    /// If one cannot be read, or a checkpoint was changed.
    pub fn prompt_files(&self) -> Result<Vec<SourceFile>> {
        let mut paths = self.parts.files.clone();
        let mut checkpoints: Vec<&SingleFile> = Vec::new();
        for part in &self.text_encoders {
            let place = &part.place;
            // A config that the tensors told is in the checkpoint itself.
            paths.extend(Some(place.config.path.clone()).filter(|path| path.extension() == Some("json".as_ref())));
            match &place.weights {
                _ if place.container.is_some() => {
                    paths.extend(place.container.iter().map(|container| container.path().to_owned()))
                }
                WeightsAt::Folder(_) => paths.extend(self.text_weights(part)?.files().map(Path::to_owned)),
                WeightsAt::Checkpoint(file) if checkpoints.iter().any(|other| other.path() == file.path()) => {}
                WeightsAt::Checkpoint(file) => checkpoints.push(file),
            }
            if let VocabularyAt::Folder(folder) = &place.vocabulary {
                for entry in std::fs::read_dir(folder).map_err(Error::read(folder))? {
                    paths.extend(Some(entry.map_err(Error::read(folder))?.path()).filter(|path| path.is_file()));
                }
            }
        }
        paths.sort();
        let of_checkpoints = checkpoints.into_iter().map(|checkpoint| {
            let file = checkpoint.file();
            file.check_unchanged()?;
            Ok(SourceFile { bytes: file.bytes(), file: self.name_of(file.path()), scale: None, sha256: file.sha256()? })
        });
        let files = paths.iter().map(|path| SourceFile::read(path, self.name_of(path)));
        files.chain(of_checkpoints).chain(self.lora_files()?.into_iter().map(Ok)).collect()
    }

    /// The files of the UNet's dense weights, each with its hash.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn unet_files(&self) -> Result<Vec<SourceFile>> {
        self.named_files(&self.unet_weights()?)
    }

    /// The files of the VAE's weights, each with its hash.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn vae_files(&self) -> Result<Vec<SourceFile>> {
        self.vae_network()?.source_files(|path| self.name_of(path))
    }

    fn named_files(&self, weights: &Weights) -> Result<Vec<SourceFile>> {
        weights.files().map(|path| SourceFile::read(path, self.name_of(path))).collect()
    }

    /// The path of one of the files that [`prompt_files`](Self::prompt_files) names.
    #[must_use]
    pub fn path_of(&self, file: &SourceFile) -> PathBuf {
        let below = self.root().join(&file.file);
        if self.root().is_dir() { below } else { PathBuf::from(&file.file) }
    }

    /// A file's name below the model's folder, else its path.
    fn name_of(&self, path: &Path) -> String {
        path.strip_prefix(self.root())
            .ok()
            .filter(|rest| rest.components().next().is_some())
            .unwrap_or(path)
            .to_string_lossy()
            .into_owned()
    }

    /// Writes a part's tokenizer into the existing folder `to`: a copy of its files, or CLIP's.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Write`].
    pub fn write_tokenizer(&self, part: &TextPart, to: &Path) -> Result<()> {
        let folder = match &part.place.vocabulary {
            VocabularyAt::Folder(folder) => folder,
            VocabularyAt::Shipped => return vocabulary::write(part.tokenizer, to),
        };
        for entry in std::fs::read_dir(folder).map_err(Error::read(folder))? {
            let entry = entry.map_err(Error::read(folder))?;
            if entry.path().is_file() {
                let content = input::read(&entry.path(), Limit::TOKENIZER)?;
                let target = to.join(entry.file_name());
                std::fs::write(&target, content).map_err(Error::write(&target))?;
            }
        }
        Ok(())
    }

    /// A part's tokenizer.
    ///
    /// # Errors
    /// If it cannot be read, or makes more ids than the encoder has positions, or its vocabulary
    /// has ids that the encoder has no embedding for. A token that was added to the vocabulary may
    /// lack one: a text that has the token is then refused.
    pub fn tokenizer(&self, part: &TextPart) -> Result<ClipTokenizer> {
        let (tokenizer, path) = match &part.place.vocabulary {
            VocabularyAt::Folder(folder) => (ClipTokenizer::open(folder)?, folder.as_path()),
            VocabularyAt::Shipped => (ClipTokenizer::shipped(vocabulary::padding(part.tokenizer))?, Path::new(vocabulary::NAME)),
        };
        let (positions, vocabulary) = (part.config.max_position_embeddings, part.config.vocab_size);
        if tokenizer.length() as i64 > positions {
            let problem = format!("makes {} tokens, but {} has {positions} positions", tokenizer.length(), part.encoder);
            return Err(Error::bad_file(path, problem));
        }
        if tokenizer.vocabulary() > vocabulary {
            let problem =
                format!("has ids up to {}, but {} has {vocabulary} embeddings", tokenizer.vocabulary() - 1, part.encoder);
            return Err(Error::bad_file(path, problem));
        }
        Ok(tokenizer.for_embeddings(vocabulary))
    }
}

impl Parts {
    /// The paths of the containers in the place of text encoders and VAE, and whether each is of
    /// the architecture of the part that it replaces.
    fn containers(&self, text_encoders: &[TextPart], vae: &VaeConfig) -> Result<Vec<(PathBuf, bool)>> {
        let mut containers = Vec::new();
        let file = |container: &Container| ConfigFile::from_entries(container.path(), container.info().config.clone());
        for part in text_encoders {
            if let Some(container) = &part.place.container {
                containers.push((container.path().to_owned(), TextConfig::parse(file(container))? == part.config));
            }
        }
        if let Some(container) = &self.vae_container {
            containers.push((container.path().to_owned(), VaeConfig::parse(file(container))? == *vae));
        }
        Ok(containers)
    }
}

/// The pipelines that are known. What a model does is told by its UNet's channels.
const CLASSES: [&str; 4] = [
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
];

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
