//! From prompts to the UNet's conditioning.

use std::sync::atomic::{AtomicBool, Ordering};

use sdxl_model::checkpoint::{Prefetched, TensorSource};
use sdxl_model::text::{ClipText, ClipTokenizer};
use sdxl_model::unet::{Conditioning, guidance_scale_embedding};
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::both_ends;
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::folder::PipelineFolder;
use super::image_channels::ImageChannels;
use super::prompt_options::{PromptOptions, weight_in_brackets};

/// The tokenizers and text encoders of a pipeline.
#[derive(Debug)]
pub struct PromptEncoder {
    pub(super) parts: Vec<(ClipTokenizer, ClipText)>,
    placement: Placement,
    pub(super) options: PromptOptions,
    /// The fewest pieces in which a text is encoded.
    pub(super) least_pieces: usize,
    /// Whether the log has said that weights in brackets are not interpreted.
    has_said: AtomicBool,
}

/// An encoded prompt.
#[derive(Debug)]
pub struct PromptEmbedding {
    /// All encoders' penultimate states side by side: [b, 77, cross_attention_dim], or a multiple
    /// of 77 for long prompts.
    pub states: Tensor,
    /// The last encoder's pooled projection: [b, p].
    pub pooled: Tensor,
}

impl PromptEncoder {
    /// Loads a pipeline's tokenizers and text encoders.
    ///
    /// # Errors
    /// If a part cannot be read.
    pub fn load(folder: &PipelineFolder, placement: Placement) -> Result<Self> {
        let parts = folder
            .text_encoders
            .iter()
            .map(|part| {
                let weights = folder.text_network(part)?;
                let load = |source: &dyn TensorSource| ClipText::load(&part.config, source);
                let model = load(&Prefetched::for_network(weights.source(placement).as_ref(), load)?)?;
                Ok((folder.tokenizer(part)?, model))
            })
            .collect::<Result<_>>()?;
        Ok(PromptEncoder {
            parts,
            placement,
            options: PromptOptions::default(),
            least_pieces: 1,
            has_said: AtomicBool::new(false),
        })
    }

    /// The encoder with other options.
    #[must_use]
    pub fn with_options(self, options: PromptOptions) -> Self {
        PromptEncoder { options, ..self }
    }

    /// The encoder that fills prompts of fewer than `count` pieces with the pieces of an empty
    /// text, so that all prompts have equally many states.
    #[must_use]
    pub fn with_pieces(self, count: usize) -> Self {
        PromptEncoder { least_pieces: count, ..self }
    }

    /// Encodes texts as one batch. A text that is too long is cut, and the log quotes the lost
    /// part.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub fn encode(&self, texts: &[&str]) -> Result<PromptEmbedding> {
        self.encode_in_pieces(texts, 1, 0)
    }

    /// The number of pieces in which all of `texts` are encoded: that of the longest.
    fn pieces(&self, texts: &[&str]) -> Result<usize> {
        let mut most = self.least_pieces.max(1);
        if self.options.long_prompts {
            for (tokenizer, _) in &self.parts {
                for text in texts {
                    most = most.max(tokenizer.pieces(text)?.len());
                }
            }
        }
        Ok(most)
    }

    /// Encodes texts as one batch, each as `count` pieces, of which the last may be empty, without
    /// the encoders' last `skip` + 1 layers.
    fn encode_in_pieces(&self, texts: &[&str], count: usize, skip: usize) -> Result<PromptEmbedding> {
        let mut states = Vec::new();
        let mut pooled = None;
        for text in texts {
            self.say_of_brackets(text);
        }
        let mut has_said = vec![false; texts.len()];
        for (tokenizer, model) in &self.parts {
            let mut side_by_side = Vec::new();
            let mut first_pooled = None;
            for piece in 0..count {
                let mut ids = Vec::new();
                for (text, has_said) in texts.iter().zip(&mut has_said) {
                    ids.extend(if count == 1 { cut(tokenizer, text, has_said)? } else { nth_piece(tokenizer, text, piece)? });
                }
                let ids = Tensor::f_from_slice(&ids)?.f_view([texts.len() as i64, -1])?;
                let encoded = model.forward_skipping(&ids, skip)?;
                side_by_side.push(encoded.penultimate);
                if piece == 0 {
                    first_pooled = encoded.pooled;
                }
            }
            states.push(Tensor::f_cat(&side_by_side, 1)?);
            pooled = first_pooled;
        }
        let pooled = pooled.ok_or_else(|| Error::internal("the last text encoder has no pooled projection"))?;
        Ok(PromptEmbedding { states: Tensor::f_cat(&states, -1)?, pooled })
    }

    /// Says once that weights in brackets are not interpreted, if a prompt looks as if it had some.
    pub(super) fn say_of_brackets(&self, text: &str) {
        if let Some(part) = weight_in_brackets(text)
            && !self.has_said.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("weights in brackets are not interpreted, the encoders read them as text: `{part}`");
        }
    }

    /// The encoded negative prompt. An absent one means zeros or the encoded empty text, as the
    /// pipeline's config decides.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn negative(&self, folder: &PipelineFolder, text: Option<&str>, like: &PromptEmbedding) -> Result<PromptEmbedding> {
        match text {
            None if folder.force_zeros_for_empty_prompt => {
                Ok(PromptEmbedding { states: like.states.f_zeros_like()?, pooled: like.pooled.f_zeros_like()? })
            }
            text => {
                let pieces = like.states.size3()?.1 / self.parts.first().map_or(1, |(tokenizer, _)| tokenizer.length() as i64);
                self.encode_in_pieces(&[text.unwrap_or_default()], pieces as usize, 0)
            }
        }
    }

    /// The device and dtype of the encoders.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }
}

/// The ids of a text that is cut to one piece, which the log says unless it `has_said` so for
/// another encoder.
pub(super) fn cut(tokenizer: &ClipTokenizer, text: &str, has_said: &mut bool) -> Result<Vec<i64>> {
    let tokens = tokenizer.encode(text)?;
    if let Some(end) = tokens.dropped.filter(|_| !*has_said) {
        *has_said = true;
        tracing::warn!("the prompt is cut to {} tokens; not read: `{}`", tokenizer.length(), both_ends(&end));
    }
    Ok(tokens.ids)
}

/// The ids of a text's piece `index`; those of an empty text after its last.
fn nth_piece(tokenizer: &ClipTokenizer, text: &str, index: usize) -> Result<Vec<i64>> {
    match tokenizer.pieces(text)?.into_iter().nth(index) {
        Some(piece) => Ok(piece),
        None => Ok(tokenizer.encode("")?.ids),
    }
}

/// The picture's size as time ids [1, 6] or [1, 5]: original size, crop and target size, or
/// original size, crop and aesthetic score.
///
/// The scores are diffusers' defaults: 6 for the prompt, 2.5 for the negative prompt.
///
/// # Errors
/// If libtorch refuses an operation.
pub fn time_ids(folder: &PipelineFolder, height: i64, width: i64, negative: bool, placement: Placement) -> Result<Tensor> {
    let (height, width) = (height as f32, width as f32);
    let base = [height, width, 0.0, 0.0, height, width];
    let refiner = [height, width, 0.0, 0.0, if negative { 2.5 } else { 6.0 }];
    let ids = if folder.requires_aesthetics_score { &refiner[..] } else { &base[..] };
    Ok(Tensor::f_from_slice(ids)?.f_unsqueeze(0)?.f_to_device(placement.device)?.f_to_kind(placement.kind)?)
}

/// The guidance scale as the UNet is told it: [1, time_cond_proj_dim]; `None` for a UNet that is
/// not.
fn embedded_scale(folder: &PipelineFolder, scale: f64, placement: Placement) -> Result<Option<Tensor>> {
    let Some(width) = folder.unet.config().time_cond_proj_dim else { return Ok(None) };
    let sinusoids = guidance_scale_embedding(scale, width)?;
    Ok(Some(sinusoids.f_to_device(placement.device)?.f_to_kind(placement.kind)?))
}

/// The UNet's conditioning at every step of a picture, and the guidance scale.
#[derive(Debug)]
pub struct Guidance {
    /// The text states, pooled text and time ids; with guidance, the negative prompt's rows come
    /// first.
    pub conditioning: Conditioning,
    /// The factor of the step from the negative prediction to the prompt's; `None` without
    /// guidance.
    pub scale: Option<f64>,
    /// The share of the guided prediction whose deviation is that of the prompt's own, in [0, 1].
    pub rescale: f64,
    /// The factor of the step from the prediction without a picture to the one with it, for an edit
    /// model under guidance, which makes three predictions: for prompt and picture, for the
    /// negative prompt and the picture, for the negative prompt alone.
    pub image_scale: Option<f64>,
    /// The channels beside the noisy latents, for each row: [b, k, h, w].
    pub image: Option<Tensor>,
}

/// diffusers' default of [`Guidance::image_scale`].
pub const IMAGE_GUIDANCE: f64 = 1.5;

impl Guidance {
    /// Encodes a prompt for pictures of `height` x `width` pixels. A scale of 1 or less means no
    /// guidance, as in diffusers. A UNet that is told the scale (`time_cond_proj_dim`) makes one
    /// prediction for the prompt alone. Nothing is rescaled.
    ///
    /// # Errors
    /// If a text cannot be encoded.
    pub fn encode(
        encoder: &PromptEncoder,
        folder: &PipelineFolder,
        prompt: &str,
        negative_prompt: Option<&str>,
        scale: f64,
        (height, width): (i64, i64),
    ) -> Result<Self> {
        let PromptOptions { clip_skip, .. } = encoder.options;
        let pieces = encoder.pieces(&[prompt, negative_prompt.unwrap_or_default()])?;
        let positive = encoder.encode_in_pieces(&[prompt], pieces, clip_skip)?;
        let negative = |positive: &PromptEmbedding| encoder.negative(folder, negative_prompt, positive);
        Self::of(folder, encoder.placement(), positive, &negative, scale, (height, width))
    }

    /// As [`encode`](Self::encode), for a prompt that is encoded already. `negative` gives the
    /// encoded negative prompt where guidance needs it.
    pub(super) fn of(
        folder: &PipelineFolder,
        placement: Placement,
        positive: PromptEmbedding,
        negative: &dyn Fn(&PromptEmbedding) -> Result<PromptEmbedding>,
        scale: f64,
        (height, width): (i64, i64),
    ) -> Result<Self> {
        let ids = time_ids(folder, height, width, false, placement)?;
        let timestep_cond = embedded_scale(folder, scale, placement)?;
        if scale <= 1.0 || timestep_cond.is_some() {
            let conditioning = Conditioning {
                encoder_hidden_states: positive.states,
                text_embeds: positive.pooled,
                time_ids: ids,
                timestep_cond,
            };
            return Ok(Guidance { conditioning, scale: None, rescale: 0.0, image_scale: None, image: None });
        }
        let negative = negative(&positive)?;
        if folder.image_channels() == ImageChannels::Picture {
            let (states, pooled) = (&negative.states, &negative.pooled);
            let conditioning = Conditioning {
                encoder_hidden_states: Tensor::f_cat(&[&positive.states, states, states], 0)?,
                text_embeds: Tensor::f_cat(&[&positive.pooled, pooled, pooled], 0)?,
                time_ids: Tensor::f_cat(&[&ids, &ids, &ids], 0)?,
                timestep_cond: None,
            };
            return Ok(Guidance {
                conditioning,
                scale: Some(scale),
                rescale: 0.0,
                image_scale: Some(IMAGE_GUIDANCE),
                image: None,
            });
        }
        let negative_ids = time_ids(folder, height, width, true, placement)?;
        let conditioning = Conditioning {
            encoder_hidden_states: Tensor::f_cat(&[negative.states, positive.states], 0)?,
            text_embeds: Tensor::f_cat(&[negative.pooled, positive.pooled], 0)?,
            time_ids: Tensor::f_cat(&[negative_ids, ids], 0)?,
            timestep_cond: None,
        };
        Ok(Guidance { conditioning, scale: Some(scale), rescale: 0.0, image_scale: None, image: None })
    }

    /// The guidance with an original size or a target size (height, width) in its time ids that is
    /// not the picture's own, as diffusers' `original_size` and `target_size`.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub(crate) fn with_told_sizes(mut self, original: Option<(i64, i64)>, target: Option<(i64, i64)>) -> Result<Self> {
        let ids = &self.conditioning.time_ids;
        let (rows, columns) = ids.size2()?;
        let told = |size: Option<(i64, i64)>, column: i64| -> Result<Tensor> {
            let Some((height, width)) = size else { return Ok(ids.f_narrow(1, column, 2)?) };
            let sides = Tensor::f_from_slice(&[height as f32, width as f32])?;
            Ok(sides.f_to_device(ids.device())?.f_to_kind(ids.f_kind()?)?.f_expand([rows, 2], false)?)
        };
        let told = match columns {
            6 => Tensor::f_cat(&[told(original, 0)?, ids.f_narrow(1, 2, 2)?, told(target, 4)?], 1)?,
            _ => Tensor::f_cat(&[told(original, 0)?, ids.f_narrow(1, 2, columns - 2)?], 1)?,
        };
        self.conditioning.time_ids = told;
        Ok(self)
    }

    /// The number of predictions for each step.
    pub(crate) fn rows(&self) -> Result<i64> {
        Ok(self.conditioning.encoder_hidden_states.size3()?.0)
    }
}
