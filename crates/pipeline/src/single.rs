//! The parts of a pipeline that is a single-file checkpoint, completed by another pipeline, by a
//! VAE, or by what the SDXL family implies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sdxl_model::ldm::{Family, Prediction, SingleFile, VaeFile};
use sdxl_model::scheduler::SchedulerConfig;
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_container::{Network, is_container};

use super::network_weights::open_container;
use super::parts::{Config, ModelFiles, Parts, TEXT_PARTS, TextPlace, VaeAt, VocabularyAt, WeightsAt};

impl Parts {
    /// Opens the files of a pipeline.
    ///
    /// # Errors
    /// If one cannot be read, a file is no SDXL model, or a part is in none of the files.
    pub(crate) fn open(files: &ModelFiles) -> Result<Self> {
        let mut parts = if files.model.is_file() {
            let base = files.base.as_deref().map(|base| Parts::open(&ModelFiles::of(base))).transpose()?;
            let file = Arc::new(SingleFile::open(&files.model)?);
            let has_vae = files.vae.is_some();
            of_single_file(&file, base, has_vae)?
        } else {
            if let Some(base) = &files.base {
                std::fs::metadata(&files.model).map_err(Error::read(&files.model))?;
                return Err(Error::Argument(format!(
                    "{} is given to complete a single-file checkpoint, but {} is a folder, which has all of its parts",
                    base.display(),
                    files.model.display()
                )));
            }
            Parts::of_folder(&files.model)?
        };
        if let Some(vae) = &files.vae {
            parts.replace_vae(vae, &files.model)?;
        }
        for (network, path) in [(Network::TextEncoder, &files.text_encoder), (Network::TextEncoder2, &files.text_encoder_2)] {
            let Some(path) = path else { continue };
            let lacks =
                || Error::Argument(format!("{} has no {network} to replace by {}", files.model.display(), path.display()));
            let place = parts.text.iter_mut().find(|place| place.encoder == network.name()).ok_or_else(lacks)?;
            place.container = Some(open_container(path, network)?);
        }
        Ok(parts)
    }

    /// Takes another VAE: a folder in diffusers layout, a container, or a safetensors file, whose
    /// architecture is told by its shapes, or is that of the pipeline's own.
    fn replace_vae(&mut self, path: &Path, model: &Path) -> Result<()> {
        if path.is_dir() {
            (self.vae, self.vae_weights) = (Config::read(path.join("config.json"))?, VaeAt::Folder(path.to_owned()));
            return Ok(());
        }
        if is_container(path) {
            let container = open_container(path, Network::Vae)?;
            if self.vae.entries.is_empty() {
                self.vae = Config { path: path.to_owned(), entries: container.info().config.clone() };
            }
            self.vae_container = Some(container);
            return Ok(());
        }
        let file = VaeFile::open(path)?;
        let family = match &self.unet_weights {
            WeightsAt::Checkpoint(file) => file.family().clone(),
            WeightsAt::Folder(_) => {
                Family { is_refiner: false, in_channels: 4, prediction: Prediction::Epsilon, is_told_guidance: false }
            }
        };
        // A pipeline's own config knows the scale of the latents, if the VAE is of its shape.
        if self.vae.entries.is_empty() {
            self.vae = derived(path, "the VAE's architecture", file.config(&family))?;
        } else if let Some(told) = file.config(&family) {
            let same = ["block_out_channels", "latent_channels", "layers_per_block"];
            if let Some(key) = same.into_iter().find(|key| self.vae.entries.get(*key).is_some_and(|own| *own != told[*key])) {
                let (told, own, model) = (&told[key], &self.vae.entries[key], model.display());
                let problem = format!("is a VAE with `{key}` = {told}, but that of {model} has {own}");
                return Err(Error::bad_file(path, problem));
            }
        }
        self.vae_weights = VaeAt::File(file);
        Ok(())
    }
}

/// The parts of a checkpoint. Its own weights come before those of `base`, and the configs of
/// `base` before what shapes and family tell.
fn of_single_file(file: &Arc<SingleFile>, base: Option<Parts>, has_vae: bool) -> Result<Parts> {
    let (path, family) = (file.path(), file.family());
    let mut missing = file.missing();
    missing.retain(|part| !(*part == "vae" && has_vae));
    if let (None, [_, ..]) = (&base, &missing[..]) {
        let problem = format!("has no {}; give what it lacks as --base DIR|FILE", missing.join(" and no "));
        return Err(Error::bad_file(path, problem));
    }
    let own = |entries: Map<String, Value>| Config { path: path.to_owned(), entries };
    let unet = match file.unet_config(base.as_ref().map(|base| &base.unet.entries)) {
        Some(entries) => Config { path: base.as_ref().map_or(path, |base| &base.unet.path).to_owned(), entries },
        None => derived(path, "the UNet's architecture", None)?,
    };
    let unet_weights = WeightsAt::Checkpoint(Arc::clone(file));

    if let Some(base) = base {
        // What the file marks of its sampler is true of its weights, whatever those of the base
        // were trained for.
        let marked = match family.prediction.scheduler() {
            Some(_) => Some(SchedulerConfig::from_entries(path, family.scheduler())?),
            // A base that is no LCM has no sampler for one.
            None if family.is_told_guidance && base.unet.entries.get(TOLD).is_none_or(Value::is_null) => {
                Some(base.scheduler.with_override("LCMScheduler")?)
            }
            None => None,
        };
        let (mut index, mut scheduler, mut vae) = (base.index, base.scheduler, base.vae);
        if let Some(marked) = marked {
            index.entries.insert("scheduler".into(), json!(["diffusers", marked.class()]));
            scheduler = marked;
        }
        if family.is_cosxl_edit() {
            index.entries.insert("is_cosxl_edit".into(), json!(true));
        }
        vae.entries.extend(family.marked_latents().unwrap_or_default());
        let text = base.text.into_iter().map(|place| match file.has_encoder(place.encoder) {
            true => TextPlace { weights: WeightsAt::Checkpoint(Arc::clone(file)), ..place },
            false => place,
        });
        let text = text.collect();
        let vae_weights = file.vae().map_or(base.vae_weights, |vae| VaeAt::File(vae.clone()));
        return Ok(Parts { index, scheduler, unet, unet_weights, text, vae, vae_weights, ..base });
    }

    let mut text = Vec::new();
    for (tokenizer, encoder) in TEXT_PARTS.into_iter().filter(|(_, encoder)| file.has_encoder(encoder)) {
        let config = derived(path, encoder, file.text_config(encoder))?;
        let weights = WeightsAt::Checkpoint(Arc::clone(file));
        text.push(TextPlace { tokenizer, encoder, config, weights, container: None, vocabulary: VocabularyAt::Shipped });
    }
    let (vae, vae_weights) = match file.vae() {
        Some(vae) => (derived(path, "the VAE's architecture", vae.config(family))?, VaeAt::File(vae.clone())),
        // The caller replaces it.
        None => (own(Map::new()), VaeAt::Folder(PathBuf::new())),
    };
    Ok(Parts {
        index: own(family.index()),
        scheduler: SchedulerConfig::from_entries(path, family.scheduler())?,
        unet,
        unet_file: None,
        unet_weights,
        vae,
        vae_weights,
        vae_container: None,
        text,
        files: Vec::new(),
    })
}

/// The key of a UNet's config for the width of the guidance scale that it is told.
const TOLD: &str = "time_cond_proj_dim";

/// A config that the tensors tell, or the remedy if they do not.
fn derived(path: &Path, what: &str, config: Option<Map<String, Value>>) -> Result<Config> {
    let untold = || {
        let problem = format!("does not tell {what} by its shapes; give a pipeline with its configs as --base DIR|FILE");
        Error::bad_file(path, problem)
    };
    Ok(Config { path: path.to_owned(), entries: config.ok_or_else(untold)? })
}
