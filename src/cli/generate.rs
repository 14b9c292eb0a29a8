//! `sdxl-squeeze generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sdxl_squeeze::checkpoint::TensorBytes;
use sdxl_squeeze::config::file_name;
use sdxl_squeeze::device::{Placement, parse_device, parse_dtype};
use sdxl_squeeze::model::scheduler::SpacingKind;
use sdxl_squeeze::number;
use sdxl_squeeze::output::{is_standard_output, write_file};
use sdxl_squeeze::picture::Picture;
use sdxl_squeeze::pipeline::{
    GenerateRequest, Generated, ImageRequest, LoraFile, Mask, ModelFiles, PipelineFolder, PromptOptions, SamplingDefaults,
    generate,
};
use sdxl_squeeze::progress::{Event, Progress};
use sdxl_squeeze::{Error, Result};
use serde_json::json;
use tch::Kind;

use super::beside_model::BesideModel;
use super::bundled;
use super::paths::Paths;
use super::progress::Reporter;
use super::stdout;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The pipeline: a folder in diffusers layout, or a single-file checkpoint
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    #[command(flatten)]
    with: BesideModel,
    /// Description of the picture; "" draws one of no subject
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Description of what the picture must not show [default: the pipeline's own, zeros for SDXL
    /// base]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    negative_prompt: Option<String>,
    /// A picture to begin with, as PNG: it is changed by --strength, redrawn where --mask is white,
    /// or edited as the prompt says by an edit model. Its size is that of the result
    #[arg(long, value_name = "FILE.png")]
    image: Option<PathBuf>,
    /// Where the picture is drawn anew, as PNG of the same size: white, or black where it is kept
    #[arg(long, value_name = "FILE.png", requires = "image")]
    mask: Option<PathBuf>,
    /// The share of the steps that are run on the picture, 0 to 1 [default: 0.3, or 0.9999 with
    /// --mask]
    #[arg(long, value_name = "S", requires = "image", allow_negative_numbers = true)]
    strength: Option<f64>,
    /// How much an edit model keeps to the picture, 1 or more [default: 1.5]
    #[arg(long, value_name = "G", requires = "image", allow_negative_numbers = true)]
    image_guidance: Option<f64>,
    /// Layers left out at the end of the text encoders, in addition to the last, as in diffusers
    #[arg(long, value_name = "N", default_value_t = 0)]
    clip_skip: usize,
    /// Encode prompts of more than 77 tokens in pieces, which are cut otherwise
    #[arg(long)]
    long_prompts: bool,
    /// Seed of the noise, which equals that of `torch.Generator().manual_seed(N)` on a CPU; -1
    /// chooses one by chance, which the result names
    #[arg(long, value_name = "N", default_value = "0", value_parser = seed, allow_negative_numbers = true)]
    seed: u64,
    /// Denoising steps [default: 30, or the few of a distilled model]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Guidance scale; 1 turns guidance off [default: 5, or none for a distilled model]
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Share of the guided prediction that is brought to the deviation of the prompt's own, against
    /// overexposure
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    guidance_rescale: f64,
    /// Height in pixels [default: the model's own]
    #[arg(long, value_name = "H", requires = "width", allow_negative_numbers = true)]
    height: Option<i64>,
    /// Width in pixels
    #[arg(long, value_name = "W", requires = "height", allow_negative_numbers = true)]
    width: Option<i64>,
    /// Height and width that the UNet is told as those before cropping, as diffusers'
    /// `original_size` [default: the picture's]. Apple's Swift pipeline tells 1024 1024 here and in
    /// --target-size
    #[arg(long, value_names = ["H", "W"], num_args = 2, allow_negative_numbers = true)]
    original_size: Option<Vec<i64>>,
    /// Height and width that the UNet is told as those of the result, as diffusers' `target_size`
    /// [default: the picture's]
    #[arg(long, value_names = ["H", "W"], num_args = 2, allow_negative_numbers = true)]
    target_size: Option<Vec<i64>>,
    /// Sampler in the place of the pipeline's: euler, euler-ancestral, heun, ddim, ddpm, dpmpp-2m,
    /// dpmpp-2m-sde, dpmpp-sde, unipc, plms, lcm, tcd, edm-euler, edm-dpmpp-2m; some also with
    /// -karras for Karras sigmas
    #[arg(long, value_name = "NAME")]
    scheduler: Option<String>,
    /// Spacing of the sampler's timesteps: leading, trailing or linspace [default: the sampler's]
    #[arg(long, value_name = "SPACING")]
    timestep_spacing: Option<SpacingKind>,
    /// Share of noise that each step of DDIM or TCD adds
    #[arg(long, value_name = "ETA", default_value_t = 0.0, allow_negative_numbers = true)]
    eta: f64,
    /// Where to compute: cpu, cuda, cuda:N or mps
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Precision: f32, f16 or bf16 (the VAE always decodes in f32)
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: String,
    /// Hold one UNet stage at a time in memory; slower, as weights are read at every step
    #[arg(long)]
    low_memory: bool,
    /// Use the UNet in this container
    #[arg(long, value_name = "FILE.safetensors")]
    unet: Option<PathBuf>,
    /// Use the container of --unet without checking its hashes
    #[arg(long, requires = "unet")]
    no_verify: bool,
    /// Write the final latents to this file
    #[arg(long, value_name = "FILE.safetensors")]
    latents_out: Option<PathBuf>,
    /// The picture, as PNG
    #[arg(long, short, value_name = "OUT.png")]
    output: PathBuf,
}

pub(super) fn run(args: Args, overwrite: bool, reporter: &Reporter) -> Result<()> {
    let start = Instant::now();
    let args = Args { model: bundled::found(args.model)?, ..args };
    let placement = Placement { device: parse_device(&args.device)?, kind: parse_dtype(&args.dtype)? };
    // Wrong paths are refused before minutes of work.
    let paths = args
        .with
        .read_in(Paths::default().model("--model", Some(&args.model)))
        .reads("--unet", args.unet.as_deref())
        .reads("--image", args.image.as_deref())
        .reads("--mask", args.mask.as_deref())
        .writes("-o", Some(&args.output))
        .writes("--latents-out", args.latents_out.as_deref());
    paths.check_writable()?;
    paths.check_new(overwrite)?;
    check_name(&args.output)?;
    let files = args.with.files(args.model.clone());
    let folder = PipelineFolder::open_files(&files)?;
    let defaults = SamplingDefaults::of(&folder, 30, 5.0);
    if let (Some(why), true) = (&defaults.why, args.steps.is_none() || args.guidance.is_none()) {
        reporter.report(Event::Note(&chosen(&args, &defaults, why)));
    }
    let has_sampler = args.scheduler.is_some() || args.timestep_spacing.is_some();
    if let Some(hint) = defaults.open_hint(args.steps.is_some() && args.guidance.is_some(), has_sampler) {
        reporter.report(Event::Note(hint));
    }
    let request = GenerateRequest {
        prompt: args.prompt,
        negative_prompt: args.negative_prompt,
        seed: args.seed,
        steps: args.steps.unwrap_or(defaults.steps),
        guidance: args.guidance.unwrap_or(defaults.guidance),
        guidance_rescale: args.guidance_rescale,
        size: args.height.zip(args.width),
        original_size: args.original_size.as_deref().and_then(height_and_width),
        target_size: args.target_size.as_deref().and_then(height_and_width),
        scheduler: args.scheduler,
        timestep_spacing: args.timestep_spacing,
        eta: args.eta,
        low_memory: args.low_memory,
        unet: args.unet,
        unverified: args.no_verify,
        prompts: PromptOptions { clip_skip: args.clip_skip, long_prompts: args.long_prompts },
        image: image_request(args.image.as_deref(), args.mask.as_deref(), args.strength, args.image_guidance)?,
    };
    let generated = generate(&folder, &request, placement, reporter)?;
    generated.picture.write_png(&args.output, &metadata(&request, &generated, &files, &args.dtype, args.image.as_deref()))?;
    if let Some(path) = &args.latents_out {
        write_latents(path, &generated)?;
    }
    let (height, width) = generated.size;
    let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!(", peak memory {}", number::size(peak)));
    let line = format!(
        "{}: {width}x{height}, {} steps of {}, seed {}, {}{peak}",
        args.output.display(),
        request.steps,
        generated.scheduler,
        request.seed,
        number::time(start.elapsed().as_secs_f64()),
    );
    // A picture on standard output must be followed by nothing else.
    if [Some(&args.output), args.latents_out.as_ref()].into_iter().flatten().any(|path| is_standard_output(path)) {
        reporter.report(Event::Note(&line));
        return Ok(());
    }
    stdout::print(&format!("{line}\n"))
}

/// A seed: -1 is one of 32 bits by chance, so that other programs can take it too.
fn seed(text: &str) -> std::result::Result<u64, String> {
    match text {
        "-1" => Ok(rand::random::<u32>().into()),
        _ => text.parse().map_err(|_| format!("must be a whole number from 0 to {}, or -1 for one by chance", u64::MAX)),
    }
}

/// Refuses names of other formats: a viewer goes by the name.
fn check_name(path: &Path) -> Result<()> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        None | Some("png") => Ok(()),
        Some(_) if is_standard_output(path) => Ok(()),
        Some(other) => Err(Error::Argument(format!(
            "-o {} ends in .{other}, but pictures are written as PNG: end it in .png",
            path.display()
        ))),
    }
}

/// The two values of a size.
fn height_and_width(values: &[i64]) -> Option<(i64, i64)> {
    match values {
        [height, width] => Some((*height, *width)),
        _ => None,
    }
}

/// What is chosen for a distilled model, and why.
fn chosen(args: &Args, defaults: &SamplingDefaults, why: &str) -> String {
    let steps = args.steps.is_none().then(|| format!("{} steps", defaults.steps));
    let guidance = args.guidance.is_none().then(|| format!("guidance {}", defaults.guidance));
    format!("{}: {why}", [steps, guidance].into_iter().flatten().collect::<Vec<_>>().join(" and "))
}

/// The picture of `--image` with all that belongs to it.
fn image_request(
    image: Option<&Path>,
    mask: Option<&Path>,
    strength: Option<f64>,
    guidance: Option<f64>,
) -> Result<Option<ImageRequest>> {
    let Some(image) = image else { return Ok(None) };
    let mask = mask.map(Mask::read_png).transpose()?;
    Ok(Some(ImageRequest { picture: Picture::read_png(image)?, mask, strength, guidance }))
}

/// The PNG's texts: the prompt for viewers, and all settings, with which the picture can be drawn
/// again. Files are there by name, without their folders, as pictures are shown to others.
fn metadata(
    request: &GenerateRequest,
    generated: &Generated,
    files: &ModelFiles,
    dtype: &str,
    image: Option<&Path>,
) -> Vec<(&'static str, String)> {
    let (height, width) = generated.size;
    let shown = |path: &Path| file_name(path).display().to_string();
    let lora = |lora: &LoraFile| LoraFile { path: file_name(&lora.path), ..lora.clone() }.to_string();
    let ModelFiles { model, base, vae, text_encoder, text_encoder_2, loras, lora_ignore } = files;
    let mut settings = json!({
        "model": shown(model), "base": base.as_deref().map(shown), "vae": vae.as_deref().map(shown),
        "loras": loras.iter().map(lora).collect::<Vec<_>>(), "lora_ignore": lora_ignore,
        "prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "seed": request.seed, "steps": request.steps, "guidance": request.guidance,
        "guidance_rescale": request.guidance_rescale, "timestep_spacing": request.timestep_spacing, "eta": request.eta, "height": height, "width": width,
        "scheduler": request.scheduler.as_ref().unwrap_or(&generated.scheduler), "dtype": dtype, "version": env!("CARGO_PKG_VERSION"),
    });
    for (key, path) in [("text_encoder", text_encoder), ("text_encoder_2", text_encoder_2)] {
        if let Some(path) = path {
            settings[key] = shown(path).into();
        }
    }
    if request.prompts != PromptOptions::default() {
        settings["clip_skip"] = request.prompts.clip_skip.into();
        settings["long_prompts"] = request.prompts.long_prompts.into();
    }
    for (key, size) in [("original_size", request.original_size), ("target_size", request.target_size)] {
        if let Some((height, width)) = size {
            settings[key] = json!([height, width]);
        }
    }
    if let (Some(path), Some(image)) = (image, &request.image) {
        settings["image"] = shown(path).into();
        settings["strength"] = image.strength.into();
        settings["image_guidance"] = image.guidance.into();
        settings["mask"] = image.mask.is_some().into();
    }
    vec![
        ("Software", concat!("sdxl-squeeze ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("Description", request.prompt.clone()),
        ("sdxl-squeeze", settings.to_string()),
    ]
}

/// Writes a file with one tensor, `latents` [1, c, h, w], in fp32.
fn write_latents(path: &Path, generated: &Generated) -> Result<()> {
    let latents = TensorBytes::of(&generated.latents.f_to_kind(Kind::Float)?)?;
    let file =
        safetensors::serialize([("latents", latents)], None).map_err(|why| Error::write(path)(std::io::Error::other(why)))?;
    write_file(path, |out| out.write_all(&file))
}
