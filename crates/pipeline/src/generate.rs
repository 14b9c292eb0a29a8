//! From a prompt to a picture.

use std::path::PathBuf;

use sdxl_model::checkpoint::TensorSource;
use sdxl_model::scheduler::{SchedulerConfig, SpacingKind};
use sdxl_model::unet::Unet;
use sdxl_model::vae::VaeDecoder;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::check_prompt;
use squeeze_base::progress::{Progress, Task};
use squeeze_container::Container;
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::folder::PipelineFolder;
use super::prompt::{Guidance, PromptEncoder};
use super::sampling::sample;
use super::unet_weights::UnetWeights;
use crate::picture::Picture;

/// The settings of a picture.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt; `None` is the pipeline's default, `Some("")` the encoded empty text.
    pub negative_prompt: Option<String>,
    /// The noise's seed.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 1 is none.
    pub guidance: f64,
    /// Height and width in pixels; `None` is the model's own size.
    pub size: Option<(i64, i64)>,
    /// The share of the guided prediction whose deviation is brought to that of the prompt's own,
    /// in [0, 1].
    pub guidance_rescale: f64,
    /// A sampler other than the pipeline's own.
    pub scheduler: Option<String>,
    /// A spacing of the timesteps other than the sampler's own.
    pub timestep_spacing: Option<SpacingKind>,
    /// The share of noise that each step of DDIM or TCD adds, in [0, 1].
    pub eta: f64,
    /// Whether the UNet's stages are loaded one at a time and dropped after use.
    pub low_memory: bool,
    /// A container to take the UNet from, in place of the pipeline's own.
    pub unet: Option<PathBuf>,
    /// Whether the container is used without a check of its hashes first.
    pub unverified: bool,
}

/// A picture and the settings that made it.
#[derive(Debug)]
pub struct Generated {
    /// The latents before the VAE: [1, c, h, w].
    pub latents: Tensor,
    /// The picture.
    pub picture: Picture,
    /// Its size in pixels: height, width.
    pub size: (i64, i64),
    /// The sampler's class.
    pub scheduler: String,
}

/// Checks a request against a pipeline, before anything is loaded: the size in pixels and the
/// sampler.
fn resolve(folder: &PipelineFolder, request: &GenerateRequest) -> Result<((i64, i64), SchedulerConfig)> {
    if request.prompt.trim().is_empty() {
        return Err(Error::Argument("the prompt is empty".into()));
    }
    check_prompt("the prompt", &request.prompt)?;
    if let Some(negative) = &request.negative_prompt {
        check_prompt("the negative prompt", negative)?;
    }
    if !request.guidance.is_finite() {
        return Err(Error::Argument(format!("a guidance scale of {} is not a number to scale by", request.guidance)));
    }
    let size = folder.picture_size(request.size)?;
    if !(0.0..=1.0).contains(&request.guidance_rescale) {
        return Err(Error::Argument(format!("a guidance rescale of {} is not between 0 and 1", request.guidance_rescale)));
    }
    let config = folder.scheduler.with_choices(request.scheduler.as_deref(), request.timestep_spacing, request.eta)?;
    Ok((size, config))
}

/// Draws a picture. Text encoders, UNet and VAE are loaded one after the other, each dropped before
/// the next.
///
/// # Errors
/// [`Error::Argument`] for a request that cannot be honoured; otherwise if a part cannot be read or
/// run.
pub fn generate(
    folder: &PipelineFolder,
    request: &GenerateRequest,
    placement: Placement,
    progress: &dyn Progress,
) -> Result<Generated> {
    squeeze_numerics::init();
    let (size, config) = resolve(folder, request)?;
    let mut scheduler = config.scheduler(request.steps)?;

    let guidance = {
        let task = Task::begin(progress, "reading the prompt", "encoders", folder.text_encoders.len());
        let encoder = PromptEncoder::load(folder, placement)?;
        task.advance("encoding");
        let negative = request.negative_prompt.as_deref();
        let guidance = Guidance::encode(&encoder, folder, &request.prompt, negative, request.guidance, size)?;
        Guidance { rescale: request.guidance_rescale, ..guidance }
    };

    let latents = {
        let weights;
        let open = if request.unverified { Container::open_unverified } else { Container::open };
        let container = request.unet.as_deref().map(open).transpose()?;
        let source: Box<dyn TensorSource> = match &container {
            Some(container) => {
                let weights = UnetWeights::from(container);
                weights.chain_of(folder)?;
                Box::new(weights.source(placement))
            }
            None => {
                weights = folder.unet_weights()?;
                Box::new(weights.source(placement))
            }
        };
        let unet = if request.low_memory {
            Unet::one_at_a_time(folder.unet.clone(), source.as_ref())?
        } else {
            Unet::resident(folder.unet.clone(), source.as_ref(), progress)?
        };
        let scale = folder.vae.scale();
        let shape = [1, folder.vae.latent_channels, size.0 / scale, size.1 / scale];
        let mut generator = Generator::new(request.seed);
        let noise = generator.draw(&shape, placement.kind)?.f_to_device(placement.device)?;
        sample(&unet, scheduler.as_mut(), &guidance, &noise, &mut generator, &mut |_, _| Ok(()), progress)?
    };

    let picture = {
        let task = Task::begin(progress, "decoding the picture", "pictures", 1);
        let vae = load_vae(folder, placement)?;
        task.advance("decoding");
        decode_with(&vae, &latents)?
    };
    Ok(Generated { latents, picture, size, scheduler: config.class().to_owned() })
}

/// Loads a pipeline's VAE decoder, in fp32 whatever the model's dtype: SDXL's VAE overflows in
/// fp16.
///
/// # Errors
/// If it cannot be read.
pub fn load_vae(folder: &PipelineFolder, placement: Placement) -> Result<VaeDecoder> {
    let weights = folder.vae_weights()?;
    VaeDecoder::load(&folder.vae, &weights.source(Placement { kind: Kind::Float, ..placement }))
}

/// Decodes latents [1, c, h, w] to a picture.
///
/// # Errors
/// If the VAE cannot run, or the picture has NaN.
pub fn decode_with(vae: &VaeDecoder, latents: &Tensor) -> Result<Picture> {
    Picture::from_decoded(&vae.forward(&vae.unscale(&latents.f_to_kind(Kind::Float)?)?)?)
}
