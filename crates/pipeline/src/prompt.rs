//! From prompts to the UNet's conditioning.

use sdxl_model::text::{ClipText, ClipTokenizer};
use sdxl_model::unet::{Conditioning, guidance_scale_embedding};
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::both_ends;
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::folder::PipelineFolder;

/// The tokenizers and text encoders of a pipeline.
#[derive(Debug)]
pub struct PromptEncoder {
    parts: Vec<(ClipTokenizer, ClipText)>,
    placement: Placement,
}

/// An encoded prompt.
#[derive(Debug)]
pub struct PromptEmbedding {
    /// All encoders' penultimate states side by side: [b, 77, cross_attention_dim].
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
                let model = ClipText::load(&part.config, &folder.text_weights(part)?.source(placement))?;
                Ok((folder.tokenizer(part)?, model))
            })
            .collect::<Result<_>>()?;
        Ok(PromptEncoder { parts, placement })
    }

    /// Encodes texts as one batch. A text that is too long is cut, and the log quotes the lost
    /// part.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub fn encode(&self, texts: &[&str]) -> Result<PromptEmbedding> {
        let mut states = Vec::new();
        let mut pooled = None;
        for (tokenizer, model) in &self.parts {
            let mut ids = Vec::new();
            for text in texts {
                let tokens = tokenizer.encode(text)?;
                if let Some(end) = tokens.dropped {
                    tracing::warn!("the prompt is cut to {} tokens; not read: `{}`", tokenizer.length(), both_ends(&end));
                }
                ids.extend(tokens.ids);
            }
            let ids = Tensor::f_from_slice(&ids)?.f_view([texts.len() as i64, -1])?;
            let encoded = model.forward(&ids)?;
            states.push(encoded.penultimate);
            pooled = encoded.pooled;
        }
        let pooled = pooled.ok_or_else(|| Error::internal("the last text encoder has no pooled projection"))?;
        Ok(PromptEmbedding { states: Tensor::f_cat(&states, -1)?, pooled })
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
            text => self.encode(&[text.unwrap_or_default()]),
        }
    }

    /// The device and dtype of the encoders.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
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
}

impl Guidance {
    /// Encodes a prompt for pictures of `height` x `width` pixels. A scale of 1 or less means no
    /// guidance, as in diffusers. A UNet that is told the scale (`time_cond_proj_dim`) makes one
    /// prediction for the prompt alone.
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
        let placement = encoder.placement();
        let positive = encoder.encode(&[prompt])?;
        let ids = time_ids(folder, height, width, false, placement)?;
        let timestep_cond = embedded_scale(folder, scale, placement)?;
        if scale <= 1.0 || timestep_cond.is_some() {
            let conditioning = Conditioning {
                encoder_hidden_states: positive.states,
                text_embeds: positive.pooled,
                time_ids: ids,
                timestep_cond,
            };
            return Ok(Guidance { conditioning, scale: None });
        }
        let negative = encoder.negative(folder, negative_prompt, &positive)?;
        let negative_ids = time_ids(folder, height, width, true, placement)?;
        let conditioning = Conditioning {
            encoder_hidden_states: Tensor::f_cat(&[negative.states, positive.states], 0)?,
            text_embeds: Tensor::f_cat(&[negative.pooled, positive.pooled], 0)?,
            time_ids: Tensor::f_cat(&[negative_ids, ids], 0)?,
            timestep_cond: None,
        };
        Ok(Guidance { conditioning, scale: Some(scale) })
    }
}
