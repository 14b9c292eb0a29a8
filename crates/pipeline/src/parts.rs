//! The parts of a pipeline before they are checked against each other: configs, and the places of
//! weights and vocabularies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sdxl_model::checkpoint::{ConfigFile, SourceFile};
use sdxl_model::ldm::{SingleFile, VaeFile};
use sdxl_model::scheduler::SchedulerConfig;
use serde_json::{Map, Value};
use squeeze_base::error::Result;
use squeeze_base::input::{self, Limit};
use squeeze_container::Container;

use super::lora_file::LoraFile;
use super::missing;

/// The files of a pipeline, as a command or a config names them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelFiles {
    /// A folder in diffusers layout, or a single-file checkpoint.
    pub model: PathBuf,
    /// What a single-file checkpoint lacks: another pipeline, as a folder or a single file.
    pub base: Option<PathBuf>,
    /// A VAE in the place of the pipeline's own: a folder in diffusers layout, a file, or a
    /// container.
    pub vae: Option<PathBuf>,
    /// A container with the first text encoder, in the place of the pipeline's own.
    pub text_encoder: Option<PathBuf>,
    /// A container with the second text encoder, in the place of the pipeline's own.
    pub text_encoder_2: Option<PathBuf>,
    /// LoRAs that are merged into UNet and text encoders, in this order.
    pub loras: Vec<LoraFile>,
    /// A regular expression for whole names of tensors in the LoRAs that are left out.
    pub lora_ignore: Option<String>,
}

impl ModelFiles {
    /// A pipeline that is complete.
    pub fn of(model: impl Into<PathBuf>) -> Self {
        ModelFiles { model: model.into(), ..ModelFiles::default() }
    }
}

/// A config and the file that it came from, or would be in.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub path: PathBuf,
    pub entries: Map<String, Value>,
}

impl Config {
    pub(crate) fn read(path: PathBuf) -> Result<Self> {
        Ok(Config { entries: ConfigFile::read(&path)?.into_entries(), path })
    }

    pub(crate) fn file(&self) -> ConfigFile {
        ConfigFile::from_entries(&self.path, self.entries.clone())
    }
}

/// The place of a part's weights.
#[derive(Debug, Clone)]
pub(crate) enum WeightsAt {
    /// A folder with safetensors.
    Folder(PathBuf),
    /// Among the tensors of a checkpoint.
    Checkpoint(Arc<SingleFile>),
}

/// The place of a VAE's weights.
#[derive(Debug, Clone)]
pub(crate) enum VaeAt {
    /// A folder with safetensors.
    Folder(PathBuf),
    /// Alone in a file, or among the tensors of a checkpoint.
    File(VaeFile),
}

/// The place of a tokenizer.
#[derive(Debug, Clone)]
pub(crate) enum VocabularyAt {
    /// A folder with its files.
    Folder(PathBuf),
    /// This program, which has CLIP's vocabulary.
    Shipped,
}

/// A tokenizer and its encoder.
#[derive(Debug, Clone)]
pub(crate) struct TextPlace {
    /// `tokenizer` or `tokenizer_2`.
    pub tokenizer: &'static str,
    /// `text_encoder` or `text_encoder_2`.
    pub encoder: &'static str,
    pub config: Config,
    pub weights: WeightsAt,
    /// The container that is used in the place of the weights.
    pub container: Option<Arc<Container>>,
    pub vocabulary: VocabularyAt,
}

/// Everything that a pipeline is made of.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub index: Config,
    pub scheduler: SchedulerConfig,
    pub unet: Config,
    /// Length and hash of the UNet's config, if it is a file.
    pub unet_file: Option<SourceFile>,
    pub unet_weights: WeightsAt,
    pub vae: Config,
    pub vae_weights: VaeAt,
    /// The container that is used in the place of the VAE's weights.
    pub vae_container: Option<Arc<Container>>,
    pub text: Vec<TextPlace>,
    /// The files of index and scheduler, if there are any, for the identity of encoded prompts.
    pub files: Vec<PathBuf>,
}

/// The names of tokenizers and encoders, in the order in which their states are put side by side.
pub(crate) const TEXT_PARTS: [(&str, &str); 2] = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")];

/// The path of the UNet's config in a pipeline.
const UNET_CONFIG: &str = "unet/config.json";

impl Parts {
    /// Reads the configs of a folder in diffusers layout.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(crate) fn of_folder(root: &Path) -> Result<Self> {
        missing::check_index(root)?;
        let index = Config::read(root.join("model_index.json"))?;
        let encoders =
            TEXT_PARTS.into_iter().map(|(_, encoder)| encoder).filter(|encoder| has_component(&index.entries, encoder));
        let wanted = ["scheduler/scheduler_config.json", UNET_CONFIG, "vae/config.json"].into_iter().map(PathBuf::from);
        let wanted = wanted.chain(encoders.map(|encoder| Path::new(encoder).join("config.json")));
        missing::check_files(root, &wanted.collect::<Vec<_>>())?;
        let scheduler_path = root.join("scheduler/scheduler_config.json");
        let scheduler = SchedulerConfig::read(&scheduler_path)?;
        let mut text = Vec::new();
        for (tokenizer, encoder) in TEXT_PARTS {
            if has_component(&index.entries, encoder) {
                text.push(TextPlace {
                    tokenizer,
                    encoder,
                    config: Config::read(root.join(encoder).join("config.json"))?,
                    weights: WeightsAt::Folder(root.join(encoder)),
                    container: None,
                    vocabulary: VocabularyAt::Folder(root.join(tokenizer)),
                });
            }
        }
        // Read once, so that the recorded hash is that of the config in use.
        let path = root.join(UNET_CONFIG);
        let content = input::read(&path, Limit::MODEL_CONFIG)?;
        let unet = Config { entries: ConfigFile::from_bytes(&path, &content)?.into_entries(), path };
        Ok(Parts {
            files: vec![index.path.clone(), scheduler_path],
            index,
            scheduler,
            unet,
            unet_file: Some(SourceFile::of_bytes(&content, UNET_CONFIG)),
            unet_weights: WeightsAt::Folder(root.join("unet")),
            vae: Config::read(root.join("vae/config.json"))?,
            vae_weights: VaeAt::Folder(root.join("vae")),
            vae_container: None,
            text,
        })
    }
}

/// Whether an index has the component `key`. `[null, null]`, `null` and an absent entry all mean
/// that the pipeline lacks it.
fn has_component(index: &Map<String, Value>, key: &str) -> bool {
    index.get(key).and_then(|entry| entry.get(1)).is_some_and(|class| !class.is_null())
}
