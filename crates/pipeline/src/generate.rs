//! From a prompt to a picture.

use std::path::PathBuf;

use sdxl_model::checkpoint::{TensorSource, Weights};
use sdxl_model::scheduler::{Scheduler, SchedulerConfig, SpacingKind};
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
use super::image_channels::ImageChannels;
use super::image_input::PictureEncoder;
use super::network_weights::NetworkWeights;
use super::picture_file::Mask;
use super::prompt::{Guidance, PromptEncoder};
use super::prompt_options::PromptOptions;
use super::sampling::sample_from;
use super::start::{Kept, Start, first_step};
use super::unet_weights::UnetWeights;
use crate::picture::Picture;

/// The settings of a picture.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The prompt; the empty text draws a picture of no subject, as in diffusers.
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
    /// Height and width that the UNet is told as those before cropping; `None` is the picture's
    /// own size.
    pub original_size: Option<(i64, i64)>,
    /// Height and width that the UNet is told as those of the result; `None` is the picture's own
    /// size.
    pub target_size: Option<(i64, i64)>,
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
    /// How prompts are read.
    pub prompts: PromptOptions,
    /// The picture that the run begins with, or that the model is shown.
    pub image: Option<ImageRequest>,
}

/// A picture as an input, whose size is that of the result.
#[derive(Debug, Clone)]
pub struct ImageRequest {
    /// The picture.
    pub picture: Picture,
    /// Where it is drawn anew; the rest is kept.
    pub mask: Option<Mask>,
    /// The share of the steps that are run, from more noise to less; `None` is diffusers' default,
    /// 0.3, or 0.9999 with a mask. Edit models run all steps.
    pub strength: Option<f64>,
    /// An edit model's factor of the step from the prediction without the picture to the one with
    /// it; `None` is 1.5.
    pub guidance: Option<f64>,
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
    check_prompt("the prompt", &request.prompt)?;
    if let Some(negative) = &request.negative_prompt {
        check_prompt("the negative prompt", negative)?;
    }
    if !request.guidance.is_finite() {
        return Err(Error::Argument(format!("a guidance scale of {} is not a number to scale by", request.guidance)));
    }
    let size = match &request.image {
        None => folder.picture_size(request.size)?,
        Some(image) => image.size(folder, request.size)?,
    };
    check_image(folder, request)?;
    check_told_sizes(folder, request)?;
    if !(0.0..=1.0).contains(&request.guidance_rescale) {
        return Err(Error::Argument(format!("a guidance rescale of {} is not between 0 and 1", request.guidance_rescale)));
    }
    let config = folder.scheduler.with_choices(request.scheduler.as_deref(), request.timestep_spacing, request.eta)?;
    Ok((size, config))
}

/// Checks the sizes that the UNet is told.
fn check_told_sizes(folder: &PipelineFolder, request: &GenerateRequest) -> Result<()> {
    /// The largest whole number of fp16, in which time ids may be.
    const LARGEST: i64 = 65504;
    for (what, size) in [("original size", request.original_size), ("target size", request.target_size)] {
        let Some((height, width)) = size else { continue };
        if let Some(side) = [height, width].into_iter().find(|side| !(1..=LARGEST).contains(side)) {
            return Err(Error::range(format!("a side of the {what}"), side, format!("between 1 and {LARGEST}")));
        }
    }
    if request.target_size.is_some() && folder.requires_aesthetics_score {
        return Err(Error::Argument(
            "this model is told an aesthetic score in the place of a target size: leave the target size out".into(),
        ));
    }
    Ok(())
}

impl ImageRequest {
    /// The picture's height and width, which the mask and the `asked` size must have too.
    fn size(&self, folder: &PipelineFolder, asked: Option<(i64, i64)>) -> Result<(i64, i64)> {
        self.picture.check()?;
        let size = (i64::from(self.picture.height), i64::from(self.picture.width));
        let (height, width) = size;
        if asked.is_some_and(|asked| asked != size) {
            return Err(Error::Argument(format!("the picture of --image is {width}x{height}, not of --height and --width")));
        }
        if let Some(mask) = &self.mask
            && (i64::from(mask.height), i64::from(mask.width)) != size
        {
            let (wide, high) = (mask.width, mask.height);
            return Err(Error::Argument(format!("the mask is {wide}x{high}, but the picture of --image {width}x{height}")));
        }
        folder.picture_size(Some(size))
    }
}

/// Checks that the model can use the picture and the mask, and has those that it needs.
fn check_image(folder: &PipelineFolder, request: &GenerateRequest) -> Result<()> {
    let refuse = |problem: &str| Err(Error::Argument(problem.to_owned()));
    let mask = request.image.as_ref().map(|image| image.mask.is_some());
    match (folder.image_channels(), mask) {
        (ImageChannels::MaskAndPicture, None | Some(false)) => refuse("an inpainting model needs --image and --mask"),
        (ImageChannels::Picture, None) => refuse("an edit model needs --image"),
        (ImageChannels::Picture, Some(true)) => refuse("an edit model takes no --mask"),
        (ImageChannels::None | ImageChannels::MaskAndPicture, Some(_)) | (ImageChannels::None, None) => Ok(()),
        (ImageChannels::Picture, Some(false)) => Ok(()),
    }?;
    let Some(image) = &request.image else { return Ok(()) };
    if folder.image_channels() == ImageChannels::Picture {
        if image.strength.is_some() {
            return refuse("an edit model takes no --strength, as it runs every step");
        }
        // Below 1, diffusers makes no use of the prompt's guidance either.
        return match image.guidance {
            Some(scale) if !(1.0..f64::INFINITY).contains(&scale) => refuse("an image guidance scale is at least 1"),
            _ => Ok(()),
        };
    }
    if image.guidance.is_some() {
        return refuse("only an edit model takes --image-guidance");
    }
    first_step(request.steps, image.strength()).map(drop)
}

impl ImageRequest {
    /// The share of the steps that are run.
    fn strength(&self) -> f64 {
        self.strength.unwrap_or(if self.mask.is_some() { 0.9999 } else { 0.3 })
    }
}

/// The noise of a run, and what it takes from a picture.
struct Beginning {
    start: Start,
    /// The channels beside the noisy latents: [1, k, h, w].
    channels: Option<Tensor>,
    /// What drew the noise, from which stochastic samplers go on.
    generator: Generator,
}

/// Draws the noise of a run, in diffusers' order of draws, and encodes its picture.
fn begin(
    folder: &PipelineFolder,
    request: &GenerateRequest,
    scheduler: &mut dyn Scheduler,
    size: (i64, i64),
    placement: Placement,
) -> Result<Beginning> {
    let scale = folder.vae.scale();
    let shape = [1, folder.vae.latent_channels, size.0 / scale, size.1 / scale];
    let mut generator = Generator::new(request.seed);
    let draw = |generator: &mut Generator| -> Result<Tensor> {
        Ok(generator.draw(&shape, placement.kind)?.f_to_device(placement.device)?)
    };
    let Some(image) = &request.image else {
        let start = Start::noise(scheduler, &draw(&mut generator)?)?;
        return Ok(Beginning { start, channels: None, generator });
    };
    let encoder = PictureEncoder::load(folder, placement)?;
    let picture = image.picture.to_tensor()?;
    let mask = image.mask.as_ref().map(Mask::to_tensor).transpose()?;
    if folder.image_channels() == ImageChannels::Picture {
        let start = Start::noise(scheduler, &draw(&mut generator)?)?;
        return Ok(Beginning { start, channels: Some(encoder.shown(&picture)?), generator });
    }
    let (first, channels) = (first_step(request.steps, image.strength())?, folder.image_channels());
    // With a mask and all steps, nothing of the picture is in the first latents.
    let from_noise = mask.is_some() && image.strength() == 1.0;
    let latents = match from_noise && channels == ImageChannels::MaskAndPicture {
        true => None,
        false => Some(encoder.latents(&picture, &mut generator)?),
    };
    let noise = draw(&mut generator)?;
    let mut start = match &latents {
        Some(latents) if !from_noise => Start::picture(scheduler, first, latents, &noise)?,
        _ => Start::noise(scheduler, &noise)?,
    };
    let channels = match &mask {
        Some(mask) if channels == ImageChannels::MaskAndPicture => Some(encoder.masked(&picture, mask, &mut generator)?),
        Some(_) | None => None,
    };
    if let (None, Some(mask), Some(latents)) = (&channels, &mask, latents) {
        // diffusers encodes the picture under the mask for this model too, and stochastic samplers
        // go on after the noise that it draws for it.
        let _unused = generator.draw(&latents.size(), Kind::Float)?;
        let mask = encoder.mask(mask, &latents)?;
        start.kept = Some(Kept { picture: latents, noise, mask });
    }
    Ok(Beginning { start, channels, generator })
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
    // Parts that are missing or damaged are found before minutes of work, by their headers.
    let vae = folder.vae_network()?;
    let open = if request.unverified { Container::open_unverified } else { Container::open };
    let dense = if request.unet.is_none() { Some(folder.unet_weights()?) } else { None };
    let mut scheduler = config.scheduler(request.steps)?;

    let guidance = {
        let task = Task::begin(progress, "reading the prompt", "encoders", folder.text_encoders.len());
        let encoder = PromptEncoder::load(folder, placement)?.with_options(request.prompts);
        task.advance("encoding");
        let negative = request.negative_prompt.as_deref();
        let mut guidance = Guidance::encode(&encoder, folder, &request.prompt, negative, request.guidance, size)?;
        if let (Some(scale), Some(asked)) = (&mut guidance.image_scale, request.image.as_ref().and_then(|image| image.guidance)) {
            *scale = asked;
        }
        let guidance = guidance.with_told_sizes(request.original_size, request.target_size)?;
        Guidance { rescale: request.guidance_rescale, ..guidance }
    };

    let mut beginning = begin(folder, request, scheduler.as_mut(), size, placement)?;
    let guidance = match &beginning.channels {
        Some(channels) => guidance.with_image(channels)?,
        None => guidance,
    };

    let latents = {
        let container = request.unet.as_deref().map(open).transpose()?;
        let source: Box<dyn TensorSource + Sync> = match (&container, &dense) {
            (Some(container), _) => {
                let weights = UnetWeights::from(container);
                weights.chain_of(folder)?;
                Box::new(weights.source(placement))
            }
            (None, Some(weights)) => Box::new(weights.source(placement)),
            (None, None) => return Err(Error::internal("neither a container nor a checkpoint is open")),
        };
        let unet = if request.low_memory {
            Unet::one_at_a_time(folder.unet.clone(), source.as_ref())?
        } else {
            Unet::resident(folder.unet.clone(), source.as_ref(), progress)?
        };
        let latents = sample_from(
            &unet,
            scheduler.as_mut(),
            &guidance,
            &beginning.start,
            &mut beginning.generator,
            &mut |_, _| Ok(()),
            progress,
        );
        latents.map_err(|why| cause(why, folder, dense.as_ref()))?
    };

    let picture = {
        let task = Task::begin(progress, "decoding the picture", "pictures", 1);
        let vae = decoder(folder, &vae, placement)?;
        task.advance("decoding");
        decode_with(&vae, &latents)?
    };
    Ok(Generated { latents, picture, size, scheduler: config.class().to_owned() })
}

/// The tensors of the checkpoint with a NaN, if latents became NaN because of them. The values of
/// containers were checked when they were opened.
fn cause(why: Error, folder: &PipelineFolder, unet: Option<&Weights>) -> Error {
    if !matches!(why, Error::NotFinite(_)) {
        return why;
    }
    let is_finite = || -> Result<()> {
        for part in &folder.text_encoders {
            folder.text_network(part)?.check_finite()?;
        }
        unet.map_or(Ok(()), Weights::check_finite)
    };
    is_finite().err().unwrap_or(why)
}

/// Loads a pipeline's VAE decoder, in fp32 whatever the model's dtype: SDXL's VAE overflows in
/// fp16.
///
/// # Errors
/// If it cannot be read.
pub fn load_vae(folder: &PipelineFolder, placement: Placement) -> Result<VaeDecoder> {
    decoder(folder, &folder.vae_network()?, placement)
}

/// As [`load_vae`], from the pipeline's `weights`, which are open.
///
/// # Errors
/// If they cannot be read.
pub fn decoder(folder: &PipelineFolder, weights: &NetworkWeights, placement: Placement) -> Result<VaeDecoder> {
    VaeDecoder::load(&folder.vae, weights.source(Placement { kind: Kind::Float, ..placement }).as_ref())
}

/// Decodes latents [1, c, h, w] to a picture.
///
/// # Errors
/// If the VAE cannot run, or the picture has NaN.
pub fn decode_with(vae: &VaeDecoder, latents: &Tensor) -> Result<Picture> {
    Picture::from_decoded(&vae.forward(&vae.unscale(&latents.f_to_kind(Kind::Float)?)?)?)
}
