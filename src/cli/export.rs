//! `sdxl-squeeze export`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use sdxl_squeeze::checkpoint::Weights;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{self, Io, Label, Layout, Options, WrittenPackage};
use sdxl_squeeze::export::{PipelinePart, SmallWeights};
use sdxl_squeeze::model::unet::UnetConfig;
use sdxl_squeeze::number;
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::{Error, Result, export};

use super::beside_model::BesideModel;
use super::paths::Paths;
use super::progress::Reporter;
use super::{container, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A container; or a pipeline, as a folder or a single-file checkpoint, for its dense UNet
    #[arg(value_name = "FILE|DIR")]
    path: PathBuf,
    /// Use the container without checking its hashes
    #[arg(long)]
    no_verify: bool,
    /// Format of the output
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// The pipeline that a container belongs to, as a folder or a single-file checkpoint: `--to
    /// diffusers` and `--to single-file` take its other parts
    #[arg(long, value_name = "DIR|FILE")]
    model: Option<PathBuf>,
    #[command(flatten)]
    with: BesideModel,
    /// The new folder, package or file
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[command(flatten)]
    coreml: CoremlArgs,
    /// For --to coremltools: treatment of weights that it would drop, up to 2^-10 in pruned layers
    /// [default: refuse]
    #[arg(long, value_name = "WHAT")]
    small_weights: Option<SmallWeightsArg>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A folder that diffusers loads
    Diffusers,
    /// A checkpoint in one file, for A1111, ComfyUI and Forge
    SingleFile,
    /// A Core ML package
    Coreml,
    /// Dense weights with coremltools' buffers, for converting in Python
    Coremltools,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SmallWeightsArg {
    Refuse,
    Move,
}

/// For `--to coreml`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "For --to coreml")]
struct CoremlArgs {
    /// The network to write; the text encoders and the VAE are those of a pipeline
    #[arg(long, value_name = "PART", value_enum)]
    part: Option<PartArg>,
    #[command(flatten)]
    size: SizeArgs,
    /// Samples in a call; 2 computes both halves of guidance at once [default: 2]
    #[arg(long, value_name = "N")]
    batch: Option<i64>,
    /// linear for GPUs, split-einsum for the Neural Engine [default: linear]
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<LayoutArg>,
    /// Inputs as diffusers' UNet takes them, or as Apple's Swift pipeline gives them [default:
    /// diffusers]
    #[arg(long, value_name = "STYLE")]
    io: Option<IoArg>,
    /// Tokens of the text states [default: 77]
    #[arg(long, value_name = "N")]
    tokens: Option<i64>,
    /// Numbers of size, crop and score: 6 for base, 5 for the refiner [default: the model's]
    #[arg(long, value_name = "N")]
    time_ids: Option<i64>,
    /// The package's author
    #[arg(long, value_name = "TEXT")]
    author: Option<String>,
    /// The package's licence
    #[arg(long, value_name = "TEXT")]
    license: Option<String>,
}

/// The size of the pictures that packages are for.
#[derive(Debug, clap::Args)]
pub(super) struct SizeArgs {
    /// Height of the pictures in pixels [default: the UNet's own]
    #[arg(long, value_name = "H")]
    height: Option<i64>,
    /// Width of the pictures in pixels
    #[arg(long, value_name = "W")]
    width: Option<i64>,
}

impl SizeArgs {
    /// Height and width of the latents: those of the flags, else `own`. A latent has `scale` pixels
    /// in each direction.
    pub(super) fn latents(&self, scale: i64, own: [i64; 2]) -> Result<[i64; 2]> {
        let mut latents = own;
        for ((name, pixels), latent) in [("height", self.height), ("width", self.width)].into_iter().zip(&mut latents) {
            if let Some(pixels) = pixels {
                if pixels < 1 || pixels % scale != 0 {
                    return Err(Error::Argument(format!("{name} {pixels} is not a multiple of {scale}")));
                }
                *latent = pixels / scale;
            }
        }
        Ok(latents)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PartArg {
    /// The UNet
    #[value(name = "unet")]
    Unet,
    /// The first text encoder
    #[value(name = "text_encoder")]
    TextEncoder,
    /// The second text encoder
    #[value(name = "text_encoder_2")]
    TextEncoder2,
    /// From latents to a picture
    #[value(name = "vae_decoder")]
    VaeDecoder,
    /// From a picture to latents
    #[value(name = "vae_encoder")]
    VaeEncoder,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LayoutArg {
    Linear,
    SplitEinsum,
}

impl LayoutArg {
    pub(super) fn layout(self) -> Layout {
        match self {
            LayoutArg::Linear => Layout::Linear,
            LayoutArg::SplitEinsum => Layout::SplitEinsum,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum IoArg {
    Diffusers,
    Apple,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let of_model = if args.to == Format::Coremltools { args.with.first_given() } else { None };
    if let Some(flag) = args.misplaced().or(of_model) {
        return Err(Error::Argument(format!("{flag} has no effect with this --to")));
    }
    args.paths().check()?;
    match args.to {
        Format::Diffusers => {
            let unet = OpenedUnet::open(&args)?;
            let needed = || Error::Argument("--to diffusers needs --model".into());
            let model = unet.pipeline.as_ref().ok_or_else(needed)?;
            export::diffusers(unet.weights()?, model, &args.out, reporter)?;
            stdout::print(&format!("{}\n", args.out.display()))
        }
        Format::SingleFile => {
            let unet = OpenedUnet::open(&args)?;
            export::single_file(unet.weights()?, unet.pipeline.as_ref(), &args.out, reporter)?;
            stdout::print(&format!("{}\n", args.out.display()))
        }
        Format::Coremltools => to_coremltools(&args, reporter),
        Format::Coreml => {
            let Exported { written, warnings } = match args.coreml.beside_unet() {
                Some(part) => Exported { written: to_coreml_part(&args, part, reporter)?, warnings: Vec::new() },
                None => to_coreml(&args, reporter)?,
            };
            if args.json {
                return stdout::print_json(&Exported { written, warnings });
            }
            let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!("; peak memory {}", number::size(peak)));
            stdout::print(&format!(
                "{}: {}, {} of them the program; {} operations, {} compressed weights, {} dense constants from 16 KiB{peak}\n{}",
                args.out.display(),
                number::size(written.bytes),
                number::size(written.program_bytes),
                number::count(written.operations as u64),
                number::count(written.compressed as u64),
                number::count(written.dense.len() as u64),
                vectors_need(written.vectors),
            ))
        }
    }
}

/// The line about a package with vector palettes; nothing without any.
pub(super) fn vectors_need(vectors: usize) -> String {
    match vectors {
        0 => String::new(),
        count => format!("needs {}: {} weights have vector palettes\n", coreml::VECTORS_NEED, number::count(count as u64)),
    }
}

impl Args {
    /// The inputs and the output. A container is a file; a pipeline, read for its dense UNet, is a
    /// folder.
    fn paths(&self) -> Paths {
        let (file, folder) = if self.path.is_dir() { (None, Some(&*self.path)) } else { (Some(&*self.path), None) };
        let paths = Paths::default().reads("the argument", file).model("the argument", folder);
        let paths = self.with.read_in(paths.model("--model", self.model.as_deref()));
        match self.to {
            Format::Diffusers | Format::Coreml => paths.fills("--out", &self.out),
            Format::Coremltools | Format::SingleFile => paths.writes("--out", Some(&self.out)),
        }
    }

    /// The first flag that belongs to another format.
    fn misplaced(&self) -> Option<&'static str> {
        let CoremlArgs { part, size, batch, layout, io, tokens, time_ids, author, license } = &self.coreml;
        let given = [
            ("--part", part.is_some(), Format::Coreml),
            ("--height", size.height.is_some(), Format::Coreml),
            ("--width", size.width.is_some(), Format::Coreml),
            ("--batch", batch.is_some(), Format::Coreml),
            ("--layout", layout.is_some(), Format::Coreml),
            ("--io", io.is_some(), Format::Coreml),
            ("--tokens", tokens.is_some(), Format::Coreml),
            ("--time-ids", time_ids.is_some(), Format::Coreml),
            ("--author", author.is_some(), Format::Coreml),
            ("--license", license.is_some(), Format::Coreml),
            ("--small-weights", self.small_weights.is_some(), Format::Coremltools),
        ];
        given.into_iter().find(|(_, given, format)| *given && *format != self.to).map(|(flag, ..)| flag)
    }
}

fn to_coremltools(args: &Args, reporter: &Reporter) -> Result<()> {
    let small = match args.small_weights {
        None | Some(SmallWeightsArg::Refuse) => SmallWeights::Refuse,
        Some(SmallWeightsArg::Move) => SmallWeights::Move,
    };
    let moved = export::coremltools((&container::open(&args.path, args.no_verify)?).into(), &args.out, small, reporter)?;
    if args.json {
        return stdout::print_json(&moved);
    }
    let lines = moved.iter().map(|row| format!("{}: {} weights moved above 2^-10\n", row.name, number::count(row.elements)));
    stdout::print(&format!("{}{}\n", lines.collect::<String>(), args.out.display()))
}

/// A package, and what its user should know.
#[derive(serde::Serialize)]
struct Exported {
    #[serde(flatten)]
    written: WrittenPackage,
    warnings: Vec<String>,
}

fn to_coreml(args: &Args, reporter: &Reporter) -> Result<Exported> {
    let unet = OpenedUnet::open(args)?;
    let weights = unet.weights()?;
    let chain = weights.chain()?;
    let options = options(&args.coreml, chain.config(), unet.pipeline.as_ref())?;
    let mut warnings = Vec::new();
    if options.io == Io::Apple {
        match &unet.pipeline {
            Some(pipeline) => warnings.extend(export::apple_mismatch(&pipeline.scheduler)),
            None => warnings.extend(match weights.prediction_type() {
                Some(prediction) => export::apple_mismatch_of_prediction(prediction),
                None => Some(
                    "apple-scheduler: the container does not record what its UNet predicts, and the samplers of Apple's Swift pipeline \
                     take it for noise; give --model to have it checked"
                        .to_owned(),
                ),
            }),
        }
    }
    let written = coreml::write(weights, &options, &args.out, reporter)?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    Ok(Exported { written, warnings })
}

impl CoremlArgs {
    /// The asked part, if it is not the UNet.
    fn beside_unet(&self) -> Option<PipelinePart> {
        match self.part {
            None | Some(PartArg::Unet) => None,
            Some(PartArg::TextEncoder) => Some(PipelinePart::TextEncoder),
            Some(PartArg::TextEncoder2) => Some(PipelinePart::TextEncoder2),
            Some(PartArg::VaeDecoder) => Some(PipelinePart::VaeDecoder),
            Some(PartArg::VaeEncoder) => Some(PipelinePart::VaeEncoder),
        }
    }

    /// The package's own fields.
    fn label(&self) -> Label {
        Label { author: self.author.clone().unwrap_or_default(), license: self.license.clone().unwrap_or_default() }
    }

    /// The first given flag that has no effect on `part`.
    fn without_effect_on(&self, part: PipelinePart) -> Option<&'static str> {
        let CoremlArgs { part: _, size, batch, layout, io, tokens, time_ids, author: _, license: _ } = self;
        let of_text = matches!(part, PipelinePart::TextEncoder | PipelinePart::TextEncoder2);
        let given = [
            ("--height", of_text && size.height.is_some()),
            ("--width", of_text && size.width.is_some()),
            ("--batch", batch.is_some()),
            ("--layout", layout.is_some()),
            ("--io", io.is_some()),
            ("--tokens", tokens.is_some()),
            ("--time-ids", time_ids.is_some()),
        ];
        given.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }
}

/// Writes a text encoder or a half of the VAE.
fn to_coreml_part(args: &Args, part: PipelinePart, reporter: &Reporter) -> Result<WrittenPackage> {
    if let Some(flag) = args.coreml.without_effect_on(part) {
        return Err(Error::Argument(format!("{flag} has no effect with --part {part}")));
    }
    let path = args.path.display();
    if args.path.is_file() && container::is_container(&args.path) {
        return Err(Error::Argument(format!(
            "{path} is a container; name the pipeline in its place, and a container of the {part} by --text-encoder, \
             --text-encoder-2 or --vae"
        )));
    }
    if let Some(model) = &args.model {
        return Err(Error::Argument(format!("--model {} has no effect: {path} is the model of --part {part}", model.display())));
    }
    let pipeline = PipelineFolder::open_files(&args.with.files(args.path.clone()))?;
    let latents = args.coreml.size.latents(pipeline.vae.scale(), pipeline.unet.config().sample_size)?;
    export::coreml_part(&pipeline, part, latents, &args.coreml.label(), &args.out, reporter)
}

/// The UNet that the argument names, and its pipeline.
struct OpenedUnet {
    unet: Unet,
    pipeline: Option<PipelineFolder>,
}

enum Unet {
    Container(Box<Container>),
    /// The pipeline's own weights.
    Dense(Weights),
}

impl OpenedUnet {
    /// Opens a container, or else a pipeline for its dense UNet. The pipeline of a container must
    /// have its architecture.
    fn open(args: &Args) -> Result<Self> {
        let open = |model: &Path| PipelineFolder::open_files(&args.with.files(model.to_owned()));
        let is_model = args.path.is_dir() || (args.path.is_file() && !container::is_container(&args.path));
        if is_model && let Some(model) = &args.model {
            let (path, model) = (args.path.display(), model.display());
            return Err(Error::Argument(format!("{path} is a model, not a container, so that --model {model} has no effect")));
        }
        if is_model {
            let pipeline = open(&args.path)?;
            return Ok(OpenedUnet { unet: Unet::Dense(pipeline.unet_weights()?), pipeline: Some(pipeline) });
        }
        if let (None, Some(flag)) = (&args.model, args.with.first_given()) {
            return Err(Error::Argument(format!("{flag} has no effect on a container without --model")));
        }
        let container = container::open(&args.path, args.no_verify)?;
        let chain = UnetWeights::from(&container).chain()?;
        let pipeline = args.model.as_deref().map(open).transpose()?;
        if let (Some(pipeline), Some(model)) = (&pipeline, &args.model)
            && pipeline.unet.config() != chain.config()
        {
            let (container, model) = (args.path.display(), model.display());
            return Err(Error::Argument(format!("{container} holds another architecture than {model}")));
        }
        Ok(OpenedUnet { unet: Unet::Container(Box::new(container)), pipeline })
    }

    fn weights(&self) -> Result<UnetWeights<'_>> {
        match (&self.unet, &self.pipeline) {
            (Unet::Container(container), _) => Ok(container.as_ref().into()),
            (Unet::Dense(weights), Some(pipeline)) => Ok(UnetWeights::Dense {
                weights,
                config: pipeline.unet_config(),
                prediction_type: Some(pipeline.scheduler.prediction()),
            }),
            (Unet::Dense(_), None) => Err(Error::internal("dense weights without their pipeline")),
        }
    }
}

/// The options of the command line, with the rest from the pipeline if there is one, else from the
/// UNet.
fn options(args: &CoremlArgs, config: &UnetConfig, pipeline: Option<&PipelineFolder>) -> Result<Options> {
    /// Pixels of a latent in SDXL's VAE.
    const SDXL_SCALE: i64 = 8;
    let scale = pipeline.map_or(SDXL_SCALE, |pipeline| pipeline.vae.scale());
    let mut options = Options::new(config);
    options.latents = args.size.latents(scale, options.latents)?;
    if let (Some(time_ids), Some(pipeline)) = (args.time_ids, pipeline)
        && time_ids != pipeline.time_ids()
    {
        return Err(Error::Argument(format!(
            "the model is told {} numbers of size and crop, not {time_ids}",
            pipeline.time_ids()
        )));
    }
    options.time_ids = args.time_ids.or(pipeline.map(PipelineFolder::time_ids)).unwrap_or(options.time_ids);
    options.batch = args.batch.unwrap_or(options.batch);
    options.tokens = args.tokens.unwrap_or(options.tokens);
    Label { author: options.author, license: options.license } = args.label();
    options.layout = args.layout.map_or(Layout::Linear, LayoutArg::layout);
    options.io = match args.io {
        None | Some(IoArg::Diffusers) => Io::Diffusers,
        Some(IoArg::Apple) => Io::Apple,
    };
    Ok(options)
}
