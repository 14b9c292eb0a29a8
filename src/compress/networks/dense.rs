//! The dense network of a text encoder or a VAE.

use sdxl_model::Pieces;
use sdxl_model::checkpoint::{Blueprint, TensorSource, TensorSpec, Weights};
use sdxl_model::text::ClipText;
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use sdxl_pipeline::{PipelineFolder, TextPart};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_codebook::LayerKind;
use squeeze_container::Network;

use crate::config::LayerInfo;

/// The module of the tokens' embeddings.
pub(super) const TOKEN_EMBEDDING: &str = "text_model.embeddings.token_embedding";

/// The architecture of a text encoder or a VAE in a pipeline.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dense<'a> {
    Text(&'a PipelineFolder, &'a TextPart),
    Vae(&'a PipelineFolder, Halves),
}

/// Which halves of a VAE are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halves {
    Decoder,
    Both,
}

/// What samples run through: a text encoder, or a half of a VAE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Text,
    Decoder,
    Encoder,
}

/// A text encoder or a half of a VAE, with its weights.
pub(super) enum Loaded {
    Text(Box<ClipText>),
    Decoder(Box<VaeDecoder>),
    Encoder(Box<VaeEncoder>),
}

impl<'a> Dense<'a> {
    /// The text encoders of a pipeline.
    pub(super) fn text_encoders(folder: &'a PipelineFolder) -> impl Iterator<Item = Self> {
        folder.text_encoders.iter().map(move |part| Dense::Text(folder, part))
    }

    pub(super) fn network(self) -> Network {
        match self {
            Dense::Text(_, part) if part.encoder == Network::TextEncoder2.name() => Network::TextEncoder2,
            Dense::Text(..) => Network::TextEncoder,
            Dense::Vae(..) => Network::Vae,
        }
    }

    /// `config.json`.
    pub(super) fn config(self) -> &'a Map<String, Value> {
        match self {
            Dense::Text(_, part) => part.config_entries(),
            Dense::Vae(folder, _) => folder.vae_config(),
        }
    }

    /// What is compressed of the network, in the order in which it is.
    pub(super) fn halves(self) -> &'static [Half] {
        match self {
            Dense::Text(..) => &[Half::Text],
            Dense::Vae(_, Halves::Decoder) => &[Half::Decoder],
            Dense::Vae(_, Halves::Both) => &[Half::Decoder, Half::Encoder],
        }
    }

    /// The model's own weights, checked against the architecture.
    ///
    /// # Errors
    /// If they are not there, damaged, or disagree with the config; [`Error::Argument`] if a
    /// container stands in their place.
    pub(super) fn weights(self) -> Result<Weights> {
        let (folder, container) = match self {
            Dense::Text(folder, part) => (folder, folder.text_network(part)?),
            Dense::Vae(folder, _) => (folder, folder.vae_network()?),
        };
        if let Some(container) = container.container() {
            let (path, network) = (container.path().display(), self.network());
            return Err(Error::Argument(format!(
                "{path} is compressed already; to compress the {network}, leave out the container"
            )));
        }
        match self {
            Dense::Text(_, part) => folder.text_weights(part),
            Dense::Vae(_, halves) => {
                let weights = folder.vae_weights()?;
                if halves == Halves::Both {
                    weights.check(&VaeEncoder::tensors(&folder.vae)?, VaeEncoder::is_unused)?;
                }
                Ok(weights)
            }
        }
    }

    /// Every tensor of a container: a VAE's has the encoder too, where `weights` have it.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub(super) fn tensors(self, weights: &Weights) -> Result<Vec<TensorSpec>> {
        let vae = |config: &VaeConfig| -> Result<Vec<TensorSpec>> {
            let mut tensors = VaeDecoder::tensors(config)?;
            let encoder = VaeEncoder::tensors(config)?;
            if encoder.iter().all(|spec| weights.shape(&spec.name).is_some()) {
                tensors.extend(encoder);
            }
            Ok(tensors)
        };
        match self {
            Dense::Text(_, part) => ClipText::tensors(&part.config),
            Dense::Vae(folder, _) => vae(&folder.vae),
        }
    }

    /// Builds a half of the network from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub(super) fn load(self, half: Half, source: &dyn TensorSource) -> Result<Loaded> {
        Ok(match (self, half) {
            (Dense::Text(_, part), _) => Loaded::Text(Box::new(ClipText::load(&part.config, source)?)),
            (Dense::Vae(folder, _), Half::Encoder) => Loaded::Encoder(Box::new(VaeEncoder::load(&folder.vae, source)?)),
            (Dense::Vae(folder, _), _) => Loaded::Decoder(Box::new(VaeDecoder::load(&folder.vae, source)?)),
        })
    }

    /// A half of the network without its weights.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub(super) fn outline(self, half: Half) -> Result<Loaded> {
        self.load(half, &Blueprint::default())
    }

    /// The layers that can be compressed, in execution order, under the names that a config's rules
    /// have for them: those of text encoders begin with the network's name.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub(super) fn infos(self) -> Result<Vec<LayerInfo>> {
        let stage = Some(self.network().name().to_owned());
        let table = match self {
            Dense::Text(_, part) => Some(LayerInfo {
                name: self.ruled(TOKEN_EMBEDDING),
                stage: stage.clone(),
                module_type: LayerKind::Linear,
                shape: vec![part.config.vocab_size, part.config.hidden_size],
            }),
            Dense::Vae(..) => None,
        };
        let info = |layer: &sdxl_model::Layer| LayerInfo {
            name: self.ruled(layer.name()),
            stage: stage.clone(),
            module_type: layer.kind(),
            shape: layer.weight().size(),
        };
        let mut infos: Vec<LayerInfo> = table.into_iter().collect();
        for half in self.halves() {
            infos.extend(self.outline(*half)?.pieces().layers().iter().map(info));
        }
        Ok(infos)
    }

    /// The name of a layer in a config's rules.
    pub(super) fn ruled(self, layer: &str) -> String {
        match self {
            Dense::Text(..) => format!("{}.{layer}", self.network()),
            Dense::Vae(..) => layer.to_owned(),
        }
    }
}

impl Loaded {
    pub(super) fn pieces(&self) -> &dyn Pieces {
        match self {
            Loaded::Text(text) => text.as_ref(),
            Loaded::Decoder(decoder) => decoder.as_ref(),
            Loaded::Encoder(encoder) => encoder.as_ref(),
        }
    }

    pub(super) fn pieces_mut(&mut self) -> &mut dyn Pieces {
        match self {
            Loaded::Text(text) => text.as_mut(),
            Loaded::Decoder(decoder) => decoder.as_mut(),
            Loaded::Encoder(encoder) => encoder.as_mut(),
        }
    }
}
