//! `sdxl-squeeze bundle`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::bundle::{self, Bundle, BundleOptions, Refiner};
use sdxl_squeeze::checkpoint::Weights;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{Label, Layout};
use sdxl_squeeze::number;
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::{Error, Result};

use super::beside_model::BesideModel;
use super::export::{ChunksArg, LayoutArg, SizeArgs};
use super::paths::Paths;
use super::progress::Reporter;
use super::{bundled, container, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The pipeline, as a folder or a single-file checkpoint
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    #[command(flatten)]
    with: BesideModel,
    /// A container with the compressed UNet [default: the model's own UNet in fp16]
    #[arg(long, value_name = "FILE")]
    unet: Option<PathBuf>,
    /// Use the containers without checking their hashes
    #[arg(long, requires = "unet")]
    no_verify: bool,
    /// The pipeline of a refiner, which takes the last steps: its UNet is written too
    #[arg(long, value_name = "DIR|FILE")]
    refiner: Option<PathBuf>,
    /// A container with the refiner's compressed UNet [default: the refiner's own UNet in fp16]
    #[arg(long, value_name = "FILE", requires = "refiner")]
    refiner_unet: Option<PathBuf>,
    /// The new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    /// linear for GPUs, split-einsum for the Neural Engine [default: linear]
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<LayoutArg>,
    #[command(flatten)]
    chunks: ChunksArg,
    /// Write the VAE's encoder too, which image to image needs
    #[arg(long)]
    vae_encoder: bool,
    /// The packages' author
    #[arg(long, value_name = "TEXT")]
    author: Option<String>,
    /// The packages' licence [default in the model card: what the model's files state]
    #[arg(long, value_name = "TEXT")]
    license: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let args = Args { model: bundled::found(args.model)?, ..args };
    let paths = Paths::default()
        .model("--model", Some(&args.model))
        .reads("--unet", args.unet.as_deref())
        .model("--refiner", args.refiner.as_deref())
        .reads("--refiner-unet", args.refiner_unet.as_deref());
    args.with.read_in(paths).fills("--out", &args.out).check()?;
    let pipeline = PipelineFolder::open_files(&args.with.files(args.model.clone()))?;
    let options = BundleOptions {
        latents: args.size.latents(pipeline.vae.scale(), pipeline.unet.config().sample_size)?,
        layout: args.layout.map_or(Layout::Linear, LayoutArg::layout),
        chunked: args.chunks.chunked(),
        vae_encoder: args.vae_encoder,
        label: Label { author: args.author.unwrap_or_default(), license: args.license.unwrap_or_default() },
    };
    let refiner = match &args.refiner {
        Some(path) => Some(PipelineFolder::open(path)?),
        None => None,
    };
    let unet = UnetSource::open(&pipeline, "--unet", args.unet.as_deref(), args.no_verify)?;
    let of_refiner = match &refiner {
        Some(model) => Some((model, UnetSource::open(model, "--refiner-unet", args.refiner_unet.as_deref(), args.no_verify)?)),
        None => None,
    };
    let refiner = of_refiner.as_ref().map(|(model, unet)| Refiner { weights: unet.weights(model), model });
    let written = bundle::write(unet.weights(&pipeline), &pipeline, refiner.as_ref(), &options, &args.out, reporter)?;
    written.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    if args.json {
        return stdout::print_json(&written);
    }
    stdout::print(&summary(&written))
}

/// Where a UNet comes from.
enum UnetSource {
    Container(Box<Container>),
    /// The pipeline's own weights.
    Dense(Weights),
}

impl UnetSource {
    /// Opens the container of the flag `flag`, or the pipeline's own weights.
    fn open(pipeline: &PipelineFolder, flag: &str, path: Option<&Path>, unverified: bool) -> Result<Self> {
        let Some(path) = path else { return Ok(UnetSource::Dense(pipeline.unet_weights()?)) };
        if !container::is_container(path) {
            return Err(Error::Argument(format!("{flag} {}: not a container, which `compress` writes", path.display())));
        }
        Ok(UnetSource::Container(Box::new(container::open(path, unverified)?)))
    }

    fn weights<'a>(&'a self, pipeline: &'a PipelineFolder) -> UnetWeights<'a> {
        match self {
            UnetSource::Container(container) => container.as_ref().into(),
            UnetSource::Dense(weights) => UnetWeights::Dense {
                weights,
                config: pipeline.unet_config(),
                prediction_type: Some(pipeline.scheduler.prediction()),
            },
        }
    }
}

/// A line for each package and file at the folder's top, and one for all.
fn summary(bundle: &Bundle) -> String {
    let mut sizes: Vec<(&str, u64)> = Vec::new();
    for file in &bundle.files {
        let top = file.file.split('/').next().unwrap_or(&file.file);
        match sizes.last_mut() {
            Some((last, bytes)) if *last == top => *bytes += file.bytes,
            _ => sizes.push((top, file.bytes)),
        }
    }
    let lines = sizes.iter().map(|(name, bytes)| format!("{name}: {}\n", number::size(*bytes)));
    let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!("; peak memory {}", number::size(peak)));
    format!("{}{}: {}{peak}\n", lines.collect::<String>(), bundle.path.display(), number::size(bundle.bytes))
}
