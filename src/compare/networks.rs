//! How far compressed text encoders and a compressed VAE move embeddings and pictures.

use sdxl_model::checkpoint::{Prefetched, TensorSource};
use sdxl_model::text::ClipText;
use sdxl_model::unet::Unet;
use sdxl_model::vae::{VaeDecoder, VaeEncoder};
use sdxl_pipeline::picture::Picture;
use sdxl_pipeline::{PipelineFolder, TextPart, decode_with, load_vae};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::Network;
use squeeze_numerics::device::Placement;
use tch::{Kind, Tensor};

use crate::calibration::{PromptSet, encode, finals};
use crate::report::metrics::{psnr, ssim};

/// How far compressed networks beside the UNet are from a pipeline's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkComparison {
    /// The number of prompts, each drawn once.
    pub prompts: usize,
    /// The compressed text encoders.
    pub embeddings: Vec<EmbeddingError>,
    /// The compressed encoder of the VAE; `None` if it is not compressed.
    pub latents: Option<LatentError>,
    /// Pictures by the same UNet: with the compressed text encoders, with the compressed VAE, and
    /// with both, as far as they are compressed.
    pub pictures: Vec<PictureError>,
}

/// The errors of a text encoder's outputs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EmbeddingError {
    /// The encoder.
    pub network: Network,
    /// ‖E - E'‖ / ‖E‖ of the states before the last layer, over all prompts.
    pub hidden_embeds: f64,
    /// The same of the pooled text; absent for an encoder without a projection.
    pub pooled_outputs: Option<f64>,
}

/// The errors of the VAE's encoder on the pictures that the pipeline's own networks draw.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LatentError {
    /// ‖μ - μ'‖ / ‖μ‖ of the latents' means, over all pictures.
    pub means: f64,
    /// The same of their standard deviations.
    pub deviations: f64,
}

/// The distance of pictures from those of the pipeline's own networks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PictureError {
    /// The compressed networks that they were drawn with.
    pub networks: Vec<Network>,
    /// Mean PSNR, in dB.
    pub psnr: f64,
    /// The lowest PSNR, in dB.
    pub lowest_psnr: f64,
    /// Mean SSIM.
    pub ssim: f64,
}

/// Compares `compressed`, a pipeline with containers in the place of text encoders or VAE, with the
/// same pipeline `own` without them, on the prompts of `set`.
///
/// # Errors
/// [`Error::Argument`] if nothing is compressed, or there are no prompts; if a network cannot be
/// read or run.
pub fn compare_networks(
    own: &PipelineFolder,
    compressed: &PipelineFolder,
    set: &PromptSet,
    placement: Placement,
    progress: &dyn Progress,
) -> Result<NetworkComparison> {
    squeeze_numerics::init();
    if set.prompts.is_empty() {
        return Err(Error::Argument("there are no prompts to judge on".into()));
    }
    let mut encoders = Vec::new();
    let mut embeddings = Vec::new();
    for (own_part, part) in own.text_encoders.iter().zip(&compressed.text_encoders) {
        let Some(network) = compressed.text_network(part)?.container().map(|container| container.info().network) else {
            continue;
        };
        encoders.push(network);
        embeddings.push(embedding_error((own, own_part), (compressed, part), network, set, placement)?);
    }
    let has_vae = compressed.vae_network()?.container().is_some();
    if encoders.is_empty() && !has_vae {
        return Err(Error::Argument(
            "nothing is compressed: give a container as --text-encoder, --text-encoder-2 or --vae".into(),
        ));
    }

    let guidances = |folder: &PipelineFolder| encode(folder, &set.encoder(folder, placement)?, set, progress);
    let own_guidances = guidances(own)?;
    let compressed_guidances = if encoders.is_empty() { None } else { Some(guidances(compressed)?) };
    let (own_latents, compressed_latents) = {
        let weights = own.unet_weights()?;
        let unet = Unet::resident(own.unet.clone(), weights.source(placement), progress)?;
        let draw = |guidances: &[_]| finals(own, guidances, &unet, set, progress);
        (draw(&own_guidances)?, compressed_guidances.as_deref().map(draw).transpose()?)
    };
    let decoded = |folder: &PipelineFolder, latents: &[Tensor]| -> Result<Vec<Picture>> {
        let task = Task::begin(progress, "decoding", "pictures", latents.len());
        let vae = load_vae(folder, placement)?;
        latents.iter().map(|latents| task.go_on().and_then(|()| decode_with(&vae, latents))).collect()
    };
    let reference = decoded(own, &own_latents)?;
    let compresses_encoder = has_vae && {
        let network = compressed.vae_network()?;
        network.container().is_some_and(|container| container.layers().any(|layer| VaeDecoder::is_unused(&layer.name)))
    };
    let latents = match compresses_encoder {
        true => Some(latent_error(own, compressed, &reference, placement, progress)?),
        false => None,
    };
    let mut pictures = Vec::new();
    if let Some(latents) = &compressed_latents {
        pictures.push(picture_error(encoders.clone(), &reference, &decoded(own, latents)?)?);
    }
    if has_vae {
        pictures.push(picture_error(vec![Network::Vae], &reference, &decoded(compressed, &own_latents)?)?);
        if let Some(latents) = &compressed_latents {
            let all = encoders.into_iter().chain([Network::Vae]).collect();
            pictures.push(picture_error(all, &reference, &decoded(compressed, latents)?)?);
        }
    }
    Ok(NetworkComparison { prompts: set.prompts.len(), embeddings, latents, pictures })
}

/// The errors of one encoder's outputs over the prompts of `set`.
fn embedding_error(
    (own, own_part): (&PipelineFolder, &TextPart),
    (compressed, part): (&PipelineFolder, &TextPart),
    network: Network,
    set: &PromptSet,
    placement: Placement,
) -> Result<EmbeddingError> {
    let load = |folder: &PipelineFolder, part: &TextPart| -> Result<ClipText> {
        let weights = folder.text_network(part)?;
        let load = |source: &dyn TensorSource| ClipText::load(&part.config, source);
        load(&Prefetched::for_network(weights.source(placement).as_ref(), load)?)
    };
    let (own_encoder, encoder) = (load(own, own_part)?, load(compressed, part)?);
    let tokenizer = own.tokenizer(own_part)?;
    let mut sums = [Squares::default(); 2];
    for prompt in &set.prompts {
        let ids = Tensor::f_from_slice(&tokenizer.encode(prompt)?.ids)?.f_unsqueeze(0)?;
        let (dense, made) = (own_encoder.forward(&ids)?, encoder.forward(&ids)?);
        let pairs = [Some((dense.penultimate, made.penultimate)), dense.pooled.zip(made.pooled)];
        for (sums, (dense, made)) in sums.iter_mut().zip(pairs).filter_map(|(sums, pair)| Some((sums, pair?))) {
            sums.add(&dense, &made)?;
        }
    }
    let [states, pooled] = sums.map(Squares::relative_error);
    Ok(EmbeddingError { network, hidden_embeds: states.unwrap_or(0.0), pooled_outputs: pooled })
}

/// The errors of the encoder of `compressed` on `pictures`.
fn latent_error(
    own: &PipelineFolder,
    compressed: &PipelineFolder,
    pictures: &[Picture],
    placement: Placement,
    progress: &dyn Progress,
) -> Result<LatentError> {
    let placement = Placement { kind: Kind::Float, ..placement };
    let load = |folder: &PipelineFolder| -> Result<VaeEncoder> {
        let weights = folder.vae_network()?;
        weights.stored().check_against(&VaeEncoder::tensors(&folder.vae)?, &VaeEncoder::is_unused)?;
        VaeEncoder::load(&folder.vae, weights.source(placement).as_ref())
    };
    let (own, compressed) = (load(own)?, load(compressed)?);
    let task = Task::begin(progress, "encoding", "pictures", pictures.len());
    let mut sums = [Squares::default(); 2];
    for picture in pictures {
        task.go_on()?;
        let picture = picture.to_tensor()?.f_to_device(placement.device)?;
        let (dense, made) = (own.forward(&picture)?, compressed.forward(&picture)?);
        for (sums, (dense, made)) in sums.iter_mut().zip([(dense.mean, made.mean), (dense.std, made.std)]) {
            sums.add(&dense, &made)?;
        }
    }
    let [means, deviations] = sums.map(|sums| sums.relative_error().unwrap_or(0.0));
    Ok(LatentError { means, deviations })
}

/// Sums of squares: of the differences of a network's outputs, and of the dense outputs.
#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    difference: f64,
    dense: f64,
}

impl Squares {
    fn add(&mut self, dense: &Tensor, made: &Tensor) -> Result<()> {
        let dense = dense.f_to_kind(Kind::Double)?;
        let squares = |x: &Tensor| -> Result<f64> { Ok(x.f_square()?.f_sum(None::<Kind>)?.f_double_value(&[])?) };
        self.difference += squares(&made.f_to_kind(Kind::Double)?.f_sub(&dense)?)?;
        self.dense += squares(&dense)?;
        Ok(())
    }

    /// The root of their ratio; `None` if there were no dense outputs.
    fn relative_error(self) -> Option<f64> {
        (self.dense > 0.0).then(|| (self.difference / self.dense).sqrt())
    }
}

fn picture_error(networks: Vec<Network>, reference: &[Picture], pictures: &[Picture]) -> Result<PictureError> {
    let pairs = || reference.iter().zip(pictures);
    let psnrs = pairs().map(|(a, b)| psnr(a, b)).collect::<Result<Vec<f64>>>()?;
    let ssims = pairs().map(|(a, b)| ssim(a, b)).collect::<Result<Vec<f64>>>()?;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let lowest_psnr = psnrs.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(PictureError { networks, psnr: mean(&psnrs), lowest_psnr, ssim: mean(&ssims) })
}
