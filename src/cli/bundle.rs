//! `sdxl-squeeze bundle`.

use std::path::PathBuf;

use sdxl_squeeze::bundle::{self, Bundle, BundleOptions};
use sdxl_squeeze::coreml::{Label, Layout};
use sdxl_squeeze::number;
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::{Error, Result};

use super::beside_model::BesideModel;
use super::export::{ChunksArg, LayoutArg, SizeArgs};
use super::paths::Paths;
use super::progress::Reporter;
use super::{container, stdout};

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
    /// Use the container without checking its hashes
    #[arg(long, requires = "unet")]
    no_verify: bool,
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
    let paths = Paths::default().model("--model", Some(&args.model)).reads("--unet", args.unet.as_deref());
    args.with.read_in(paths).fills("--out", &args.out).check()?;
    let pipeline = PipelineFolder::open_files(&args.with.files(args.model.clone()))?;
    let options = BundleOptions {
        latents: args.size.latents(pipeline.vae.scale(), pipeline.unet.config().sample_size)?,
        layout: args.layout.map_or(Layout::Linear, LayoutArg::layout),
        chunked: args.chunks.chunked(),
        vae_encoder: args.vae_encoder,
        label: Label { author: args.author.unwrap_or_default(), license: args.license.unwrap_or_default() },
    };
    let write = |weights: UnetWeights| bundle::write(weights, &pipeline, &options, &args.out, reporter);
    let written = match &args.unet {
        Some(path) => {
            if !container::is_container(path) {
                return Err(Error::Argument(format!("--unet {}: not a container, which `compress` writes", path.display())));
            }
            write((&container::open(path, args.no_verify)?).into())?
        }
        None => write(UnetWeights::Dense {
            weights: &pipeline.unet_weights()?,
            config: pipeline.unet_config(),
            prediction_type: Some(pipeline.scheduler.prediction()),
        })?,
    };
    written.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    if args.json {
        return stdout::print_json(&written);
    }
    stdout::print(&summary(&written))
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
