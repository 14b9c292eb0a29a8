//! CLIP's text encoder.

use std::ops::Range;

use squeeze_base::error::{Error, Result};
use squeeze_numerics::elementwise::sigmoid_in_place;
use tch::{Kind, Tensor};

use super::config::{Activation, EndOfText, TextConfig};
use crate::checkpoint::{Blueprint, TensorSource, TensorSpec};
use crate::layer::{Layer, Observer, Unobserved};
use crate::network::{Builder, LayerId, LayerNorm, Run, attend, split_heads};
use crate::pieces::{Pieces, States};

/// The number of tokens of a prompt in every CLIP text encoder, padding included.
pub const CLIP_LENGTH: i64 = 77;

/// `transformers.CLIPTextModel` or `CLIPTextModelWithProjection` (Radford et al. 2021).
#[derive(Debug)]
pub struct ClipText {
    config: TextConfig,
    layers: Vec<Layer>,
    token_embedding: Tensor,
    position_embedding: Tensor,
    blocks: Vec<Block>,
    pooling: Option<Pooling>,
}

/// The outputs of a text encoder that SDXL uses.
#[derive(Debug)]
pub struct TextStates {
    /// The states before the last layer, or before more of them, without the final norm: [b, s,
    /// hidden_size].
    pub penultimate: Tensor,
    /// The projected state at the end of the text: [b, projection_dim]; `None` for an encoder
    /// without a projection.
    pub pooled: Option<Tensor>,
}

#[derive(Debug)]
struct Pooling {
    final_layer_norm: LayerNorm,
    text_projection: LayerId,
}

impl ClipText {
    /// Builds the encoder, reading its weights from `source` by the names of published SDXL files
    /// (with the prefix `text_model.`).
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load(config: &TextConfig, source: &dyn TensorSource) -> Result<Self> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, "", &mut layers);
        let width = config.hidden_size;
        let mut model = top.at("text_model");
        let mut embeddings = model.at("embeddings");
        let token_embedding = embeddings.at("token_embedding").tensor("weight", &[config.vocab_size, width])?;
        let position_embedding =
            embeddings.at("position_embedding").tensor("weight", &[config.max_position_embeddings, width])?;
        let blocks = (0..config.num_hidden_layers)
            .map(|i| Block::build(&mut model.at("encoder").at("layers").at(i), config))
            .collect::<Result<_>>()?;
        let final_layer_norm = model.layer_norm("final_layer_norm", width, config.layer_norm_eps)?;
        let text_projection =
            config.projection_dim.map(|output| top.linear("text_projection", width, output, false)).transpose()?;
        Ok(ClipText {
            pooling: text_projection.map(|text_projection| Pooling { final_layer_norm, text_projection }),
            config: config.clone(),
            layers,
            token_embedding,
            position_embedding,
            blocks,
        })
    }

    /// Every tensor of an encoder.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn tensors(config: &TextConfig) -> Result<Vec<TensorSpec>> {
        let blueprint = Blueprint::default();
        Self::load(config, &blueprint)?;
        Ok(blueprint.into_tensors())
    }

    /// The name of a stored tensor in published SDXL files. For encoders without a projection,
    /// transformers 5 omits the prefix `text_model.`.
    #[must_use]
    pub fn rename(stored: &str) -> String {
        let bare = stored.strip_prefix("text_model.").unwrap_or(stored);
        if bare.starts_with("text_projection.") || bare == "logit_scale" { bare.to_owned() } else { format!("text_model.{bare}") }
    }

    /// Whether a tensor of published files is not needed: the table of position ids 0, 1, 2, …, or
    /// CLIP's similarity scale.
    #[must_use]
    pub fn is_unused(name: &str) -> bool {
        name == "text_model.embeddings.position_ids" || name == "logit_scale"
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Encodes token ids [b, s].
    ///
    /// # Errors
    /// If there are more positions than the encoder has, or an id is outside its vocabulary.
    pub fn forward(&self, ids: &Tensor) -> Result<TextStates> {
        self.forward_skipping(ids, 0)
    }

    /// Encodes token ids [b, s]. The states are those before the last `skip` + 1 layers; pooled
    /// text passes all of them.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if there are not so many layers.
    pub fn forward_skipping(&self, ids: &Tensor, skip: usize) -> Result<TextStates> {
        self.encode(ids, skip)
    }

    fn check_ids(&self, ids: &Tensor) -> Result<()> {
        let (_, length) = ids.size2()?;
        if length > self.config.max_position_embeddings {
            return Err(Error::range("the number of tokens", length, format!("at most {}", self.config.max_position_embeddings)));
        }
        let (lowest, highest) = (ids.f_min()?.f_int64_value(&[])?, ids.f_max()?.f_int64_value(&[])?);
        if lowest < 0 || highest >= self.config.vocab_size {
            let wrong = if lowest < 0 { lowest } else { highest };
            return Err(Error::range("a token id", wrong, format!("below {} and not negative", self.config.vocab_size)));
        }
        Ok(())
    }

    /// The states before the first layer, [b, s, hidden_size], and the ids, of token ids [b, s].
    ///
    /// # Errors
    /// If there are more positions than the encoder has, or an id is outside its vocabulary.
    pub fn embed(&self, ids: &Tensor) -> Result<States> {
        self.check_ids(ids)?;
        let length = ids.size2()?.1;
        let ids = ids.f_to_device(self.token_embedding.device())?;
        let tokens = Tensor::f_embedding(&self.token_embedding, &ids, -1, false, false)?;
        let hidden = tokens.f_add(&self.position_embedding.f_narrow(0, 0, length)?)?;
        Ok(States { hidden, ids: Some(ids) })
    }

    /// Replaces the table of the tokens' embeddings [vocab_size, hidden_size]. Its dtype becomes
    /// that of the old one.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes differ.
    pub fn replace_token_embedding(&mut self, table: &Tensor) -> Result<()> {
        let old = &self.token_embedding;
        if table.size() != old.size() {
            return Err(Error::shape("the new token embedding", table.size(), format!("{:?}", old.size())));
        }
        self.token_embedding = table.f_to_device(old.device())?.f_to_kind(old.f_kind()?)?;
        Ok(())
    }

    /// The table of the tokens' embeddings [vocab_size, hidden_size].
    pub fn token_embedding(&self) -> &Tensor {
        &self.token_embedding
    }

    /// Encodes token ids [b, s], as [`forward`](Self::forward) says.
    fn encode(&self, ids: &Tensor, skip: usize) -> Result<TextStates> {
        let mut observer = Unobserved;
        let mut run = Run::new(&self.layers, &mut observer);
        let States { mut hidden, ids } = self.embed(ids)?;
        let ids = ids.expect("the states before the first layer have the ids");
        let (last, before) = self.blocks.split_last().expect("the config has at least one layer");
        let few =
            || Error::Argument(format!("a text encoder of {} layers cannot leave out {skip} more than 1", self.blocks.len()));
        let kept = before.len().checked_sub(skip).ok_or_else(few)?;
        let mut states = hidden.shallow_clone();
        for (index, block) in before.iter().enumerate() {
            hidden = block.forward(&hidden, &mut run)?;
            if index < kept {
                states = hidden.shallow_clone();
            }
        }
        let pooled = match &self.pooling {
            None => None,
            Some(pooling) => Some(self.pooled(pooling, &last.forward(&hidden, &mut run)?, &ids, &mut run)?),
        };
        Ok(TextStates { penultimate: states, pooled })
    }

    /// The projected state at the end of each text: [b, projection_dim] of the states after the
    /// last layer [b, s, width].
    fn pooled(&self, pooling: &Pooling, states: &Tensor, ids: &Tensor, run: &mut Run) -> Result<Tensor> {
        let normed = pooling.final_layer_norm.forward(states)?;
        run.layer(pooling.text_projection, &self.at_end_of_text(&normed, ids)?)
    }

    /// The state at the end of each text: [b, width] of states [b, s, width].
    fn at_end_of_text(&self, states: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let ends = match self.config.end_of_text {
            EndOfText::HighestId => ids.f_argmax(-1, false)?,
            EndOfText::Token(id) => ids.f_eq(id)?.f_to_kind(Kind::Int64)?.f_argmax(-1, false)?,
        };
        let width = states.size3()?.2;
        let index = ends.f_view([-1, 1, 1])?.f_expand([-1, 1, width], false)?;
        Ok(states.f_gather(1, &index, false)?.f_squeeze_dim(1)?)
    }
}

/// Each encoder layer is a piece, and the projection the last one.
impl Pieces for ClipText {
    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    fn pieces(&self) -> Vec<(String, Range<usize>)> {
        let block = |index| (format!("layers.{index}"), index * Block::LAYERS..(index + 1) * Block::LAYERS);
        let mut pieces: Vec<_> = (0..self.blocks.len()).map(block).collect();
        let end = self.blocks.len() * Block::LAYERS;
        pieces.extend(self.pooling.as_ref().map(|_| ("text_projection".to_owned(), end..self.layers.len())));
        pieces
    }

    fn run_piece(&self, index: usize, states: States, observer: &mut dyn Observer) -> Result<Tensor> {
        let mut run = Run::new(&self.layers, observer);
        if let Some(block) = self.blocks.get(index) {
            return block.forward(&states.hidden, &mut run);
        }
        match (&self.pooling, &states.ids) {
            (Some(pooling), Some(ids)) => self.pooled(pooling, &states.hidden, ids, &mut run),
            (None, _) | (_, None) => {
                Err(Error::internal("a text encoder without a projection, or without ids, has no such piece"))
            }
        }
    }
}

/// `transformers` CLIPEncoderLayer: causal self-attention and a feed-forward, each after a layer
/// norm.
#[derive(Debug)]
struct Block {
    layer_norm1: LayerNorm,
    q_proj: LayerId,
    k_proj: LayerId,
    v_proj: LayerId,
    out_proj: LayerId,
    layer_norm2: LayerNorm,
    fc1: LayerId,
    fc2: LayerId,
    heads: i64,
    activation: Activation,
}

impl Block {
    /// Layers of a block.
    const LAYERS: usize = 6;

    fn build(b: &mut Builder, config: &TextConfig) -> Result<Self> {
        let width = config.hidden_size;
        let layer_norm1 = b.layer_norm("layer_norm1", width, config.layer_norm_eps)?;
        let mut attention = b.at("self_attn");
        let normed = attention.features("q_proj");
        Ok(Block {
            layer_norm1,
            q_proj: attention.linear_of("q_proj", normed.clone(), width, width, true)?,
            k_proj: attention.linear_of("k_proj", normed.clone(), width, width, true)?,
            v_proj: attention.linear_of("v_proj", normed, width, width, true)?,
            out_proj: attention.linear("out_proj", width, width, true)?,
            layer_norm2: b.layer_norm("layer_norm2", width, config.layer_norm_eps)?,
            fc1: b.at("mlp").linear("fc1", width, config.intermediate_size, true)?,
            fc2: b.at("mlp").linear("fc2", config.intermediate_size, width, true)?,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
        })
    }

    fn forward(&self, hidden: &Tensor, run: &mut Run) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(hidden)?;
        let query = split_heads(&run.layer(self.q_proj, &normed)?, self.heads)?;
        let key = split_heads(&run.layer(self.k_proj, &normed)?, self.heads)?;
        let value = split_heads(&run.layer(self.v_proj, &normed)?, self.heads)?;
        run.onto(self.out_proj, hidden)?;
        let hidden = run.layer(self.out_proj, &attend(&query, &key, &value, true)?)?.f_add_(hidden)?;
        let inner = run.layer(self.fc1, &self.layer_norm2.forward(&hidden)?)?;
        let inner = match self.activation {
            Activation::Gelu => inner.f_gelu("none")?,
            Activation::QuickGelu => sigmoid_in_place(inner.f_mul_scalar(1.702)?)?.f_mul_(&inner)?,
        };
        run.onto(self.fc2, &hidden)?;
        Ok(run.layer(self.fc2, &inner)?.f_add_(&hidden)?)
    }
}
