//! The refiner of a bundle.
//!
//! `StableDiffusionXLPipeline.swift` gives the refiner the second text encoder's states, and the
//! latents of the base: it has no text encoder, tokenizer or VAE of its own.

use sdxl_model::text::ClipText;
use sdxl_pipeline::{PipelineFolder, UnetWeights};
use squeeze_base::error::{Error, Result};

use super::vocabulary::{self, Vocabulary};

/// A refiner, whose UNet takes the last steps of a picture.
#[derive(Debug, Clone, Copy)]
pub struct Refiner<'a> {
    /// The weights of its UNet.
    pub weights: UnetWeights<'a>,
    /// Its pipeline.
    pub model: &'a PipelineFolder,
}

/// Checks that Apple's pipeline can go on with the refiner where it stops with `base`, whose
/// vocabulary is given.
///
/// # Errors
/// [`Error::Argument`] if it is no refiner, or differs from the base in the text encoder or the
/// latents; if a file cannot be read.
pub(super) fn check(refiner: &Refiner, base: &PipelineFolder, of_base: &Vocabulary) -> Result<()> {
    let refiner = refiner.model;
    let path = refiner.root().display();
    let refuse = |why: String| Err(Error::Argument(format!("--refiner {path}: {why}")));
    if !refiner.requires_aesthetics_score {
        return refuse("no refiner: its UNet is not told an aesthetic score (`requires_aesthetics_score`)".into());
    }
    let names: Vec<&str> = refiner.text_encoders.iter().map(|text| text.encoder).collect();
    if names != [SECOND] {
        return refuse(format!("has {}; Apple's pipeline gives a refiner the states of {SECOND} alone", names.join(" and ")));
    }
    if base.requires_aesthetics_score {
        return refuse(format!("the model {} is a refiner itself", base.root().display()));
    }
    let (ours, theirs) = (&base.vae, &refiner.vae);
    let is_same_vae = ours.latent_channels == theirs.latent_channels
        && ours.scale() == theirs.scale()
        && (ours.scaling_factor - theirs.scaling_factor).abs() < 1e-9
        && ours.latents_mean_std == theirs.latents_mean_std;
    if !is_same_vae {
        return refuse("its VAE has latents of another kind than the model's, which the refiner is given".into());
    }
    let vocabulary = vocabulary::of(refiner)?;
    if vocabulary != *of_base {
        return refuse("its tokenizer is another than the model's, and Apple's pipeline has one for both".into());
    }
    match differing_text(base, refiner)? {
        None => Ok(()),
        Some(what) => refuse(format!("its {SECOND} has another {what} than the model's, and Apple's pipeline has one for both")),
    }
}

/// The text encoder that both UNets are given.
const SECOND: &str = "text_encoder_2";

/// What differs between the second text encoders of two pipelines.
fn differing_text(base: &PipelineFolder, refiner: &PipelineFolder) -> Result<Option<String>> {
    let find = |model: &PipelineFolder| model.text_encoders.iter().position(|text| text.encoder == SECOND);
    let (Some(ours), Some(theirs)) = (find(base), find(refiner)) else { return Ok(Some("name".into())) };
    let (ours, theirs) = (&base.text_encoders[ours], &refiner.text_encoders[theirs]);
    if ours.config != theirs.config {
        return Ok(Some("config".into()));
    }
    let (a, b) = (base.text_weights(ours)?, refiner.text_weights(theirs)?);
    for tensor in ClipText::tensors(&ours.config)? {
        if a.halves(&tensor.name, &tensor.shape)? != b.halves(&tensor.name, &tensor.shape)? {
            return Ok(Some(format!("`{}`", tensor.name)));
        }
    }
    Ok(None)
}
