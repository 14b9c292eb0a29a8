//! `sdxl-squeeze export`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use sdxl_squeeze::checkpoint::Weights;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{self, FunctionSize, Io, Label, Layout, Options, WrittenChunk, WrittenPackage};
use sdxl_squeeze::export::{AppleNoise, PipelinePart, SmallWeights};
use sdxl_squeeze::model::unet::UnetConfig;
use sdxl_squeeze::number;
use sdxl_squeeze::pipeline::{PipelineFolder, UnetFolder, UnetWeights};
use sdxl_squeeze::progress::{Event, Progress};
use sdxl_squeeze::{Error, Result, export};

use super::beside_model::BesideModel;
use super::paths::Paths;
use super::progress::Reporter;
use super::{bundled, container, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A container; or a pipeline, as a folder or a single-file checkpoint, or the folder of a UNet
    /// alone, for its dense UNet
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
    /// Samples in a call; 2 computes both halves of guidance at once; 1,2 are two functions
    /// [default: 2]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    batch: Vec<i64>,
    /// linear for GPUs, split-einsum for the Neural Engine [default: linear]
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<LayoutArg>,
    /// Inputs as diffusers' UNet takes them, or as Apple's Swift pipeline gives them [default:
    /// diffusers]
    #[arg(long, value_name = "STYLE")]
    io: Option<IoArg>,
    #[command(flatten)]
    chunks: ChunksArg,
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

/// The number of packages for a UNet.
#[derive(Debug, clap::Args)]
pub(super) struct ChunksArg {
    /// Packages for the UNet: 2 are UnetChunk1 and UnetChunk2 in a folder, each with about half of
    /// the weights [default: 1]
    #[arg(long, value_name = "1|2", value_parser = clap::value_parser!(u8).range(1..=2))]
    chunks: Option<u8>,
}

impl ChunksArg {
    /// Whether there are two packages.
    pub(super) fn chunked(&self) -> bool {
        self.chunks == Some(2)
    }
}

/// The size of the pictures that packages are for.
#[derive(Debug, clap::Args)]
pub(super) struct SizeArgs {
    /// Height of the pictures in pixels; `export` of a UNet takes several (512,768,1024), each a
    /// function of the package [default: the UNet's own]
    #[arg(long, value_name = "H", value_delimiter = ',')]
    height: Vec<i64>,
    /// Width of the pictures in pixels: as many as heights, or none for several squares
    #[arg(long, value_name = "W", value_delimiter = ',')]
    width: Vec<i64>,
}

impl SizeArgs {
    /// Height and width of the latents: those of the flags, else `own`. A latent has `scale` pixels
    /// in each direction.
    pub(super) fn latents(&self, scale: i64, own: [i64; 2]) -> Result<[i64; 2]> {
        match self.all(scale, own)?[..] {
            [one] => Ok(one),
            _ => Err(Error::Argument("several sizes are for `export --to coreml` of a UNet; all else has one size".into())),
        }
    }

    /// As [`latents`](Self::latents), of one size or several.
    pub(super) fn all(&self, scale: i64, own: [i64; 2]) -> Result<Vec<[i64; 2]>> {
        let in_latents = |name: &str, pixels: &[i64]| -> Result<Vec<i64>> {
            let latent = |pixels: &i64| match *pixels {
                pixels if pixels < 1 || pixels % scale != 0 => {
                    Err(Error::Argument(format!("{name} {pixels} is not a multiple of {scale}")))
                }
                pixels => Ok(pixels / scale),
            };
            pixels.iter().map(latent).collect()
        };
        let (heights, widths) = (in_latents("height", &self.height)?, in_latents("width", &self.width)?);
        match (&heights[..], &widths[..]) {
            ([], []) => Ok(vec![own]),
            ([height], []) => Ok(vec![[*height, own[1]]]),
            ([], [width]) => Ok(vec![[own[0], *width]]),
            ([], sides) | (sides, []) => Ok(sides.iter().map(|side| [*side; 2]).collect()),
            _ if heights.len() == widths.len() => Ok(heights.into_iter().zip(widths).map(Into::into).collect()),
            _ => Err(Error::Argument(format!(
                "--height has {} sizes and --width {}: give as many of both, or one of the two for squares",
                heights.len(),
                widths.len()
            ))),
        }
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

pub(super) fn run(args: Args, overwrite: bool, reporter: &Reporter) -> Result<()> {
    let args = Args { path: bundled::found(args.path)?, model: args.model.map(bundled::found).transpose()?, ..args };
    let of_model = if args.to == Format::Coremltools { args.with.first_given() } else { None };
    if let Some(flag) = args.misplaced().or(of_model) {
        return Err(Error::Argument(format!("{flag} has no effect with this --to")));
    }
    let paths = args.paths();
    paths.check()?;
    paths.check_new(overwrite)?;
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
            let exported = match args.coreml.beside_unet() {
                Some(part) => {
                    Exported { written: Written::Package(to_coreml_part(&args, part, reporter)?), warnings: Vec::new() }
                }
                None => to_coreml(&args, reporter)?,
            };
            if args.json {
                return stdout::print_json(&exported);
            }
            let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!("; peak memory {}", number::size(peak)));
            stdout::print(&match &exported.written {
                Written::Package(written) => summary(&args.out, &peak, written),
                Written::Chunks { chunks } => chunks
                    .iter()
                    .map(|ExportedChunk { file, chunk }| {
                        let path = args.out.join(file);
                        format!("{}{}\n", summary(&path, &peak, &chunk.package), chunk.parts.join(", "))
                    })
                    .collect(),
            })
        }
    }
}

/// A line about a package, and one about what it needs.
fn summary(path: &Path, peak: &str, written: &WrittenPackage) -> String {
    format!(
        "{}: {}, {} of them the program; {} operations, {} compressed weights, {} dense constants from 16 KiB{peak}\n{}{}",
        path.display(),
        number::size(written.bytes),
        number::size(written.program_bytes),
        number::count(written.operations as u64),
        number::count(written.compressed as u64),
        number::count(written.dense.len() as u64),
        functions_line(&written.functions),
        vectors_need(written.vectors),
    )
}

/// The line about a package with several functions; nothing about others.
fn functions_line(functions: &[String]) -> String {
    match functions {
        [] => String::new(),
        [default, others @ ..] => {
            let others = others.join(", ");
            format!("{} functions share the weights: {default} (the default), {others}; iOS 18 or macOS 15\n", functions.len())
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
        let CoremlArgs { part, size, batch, layout, io, chunks, tokens, time_ids, author, license } = &self.coreml;
        let given = [
            ("--part", part.is_some(), Format::Coreml),
            ("--height", !size.height.is_empty(), Format::Coreml),
            ("--width", !size.width.is_empty(), Format::Coreml),
            ("--batch", !batch.is_empty(), Format::Coreml),
            ("--layout", layout.is_some(), Format::Coreml),
            ("--io", io.is_some(), Format::Coreml),
            ("--chunks", chunks.chunks.is_some(), Format::Coreml),
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

/// A package or two, and what their user should know.
#[derive(serde::Serialize)]
struct Exported {
    #[serde(flatten)]
    written: Written,
    warnings: Vec<String>,
}

#[derive(serde::Serialize)]
#[serde(untagged)]
enum Written {
    Package(WrittenPackage),
    Chunks { chunks: Vec<ExportedChunk> },
}

/// A package in a folder.
#[derive(serde::Serialize)]
struct ExportedChunk {
    file: String,
    #[serde(flatten)]
    chunk: WrittenChunk,
}

fn to_coreml(args: &Args, reporter: &Reporter) -> Result<Exported> {
    let unet = OpenedUnet::open(args)?;
    let weights = unet.weights()?;
    let chain = weights.chain()?;
    let mut options = options(&args.coreml, chain.config(), unet.pipeline.as_ref())?;
    let warnings = if options.io == Io::Apple { for_apple(&unet, weights, &mut options, reporter)? } else { Vec::new() };
    let written = if args.coreml.chunks.chunked() {
        let chunks = export::CHUNKS.into_iter().zip(export::coreml_chunks(weights, &options, &args.out, reporter)?);
        let chunks = chunks.map(|(name, chunk)| ExportedChunk { file: format!("{name}.mlpackage"), chunk }).collect();
        Written::Chunks { chunks }
    } else {
        Written::Package(coreml::write(weights, &options, &args.out, reporter)?)
    };
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    Ok(Exported { written, warnings })
}

/// Makes the package's output noise, which Apple's samplers take it for, and returns what remains
/// wrong.
fn for_apple(unet: &OpenedUnet, weights: UnetWeights, options: &mut Options, reporter: &Reporter) -> Result<Vec<String>> {
    let Some(pipeline) = &unet.pipeline else {
        let remedy = "with --model, whose sampler tells the noise schedule, the package makes noise of it";
        return Ok(Vec::from_iter(match weights.prediction_type() {
            Some(prediction @ ("v_prediction" | "sample")) => {
                export::apple_mismatch_of_prediction(prediction).map(|mismatch| format!("{mismatch}; {remedy}"))
            }
            Some(prediction) => export::apple_mismatch_of_prediction(prediction),
            None => Some(
                "apple-scheduler: the container does not record what its UNet predicts, and the samplers of Apple's Swift pipeline \
                 take it for noise; give --model to have it checked"
                    .to_owned(),
            ),
        }));
    };
    if let Some(mismatch) = export::apple_mismatch(&pipeline.scheduler) {
        return Ok(vec![mismatch]);
    }
    let AppleNoise { output, warnings } = export::apple_noise(weights, &pipeline.scheduler)?;
    if output.is_some() {
        let prediction = pipeline.scheduler.prediction();
        reporter.report(Event::Note(&format!("the package makes noise of what the UNet predicts (`{prediction}`)")));
    }
    options.noise = output;
    Ok(warnings)
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
        let CoremlArgs { part: _, size, batch, layout, io, chunks, tokens, time_ids, author: _, license: _ } = self;
        let of_text = matches!(part, PipelinePart::TextEncoder | PipelinePart::TextEncoder2);
        let given = [
            ("--height", of_text && !size.height.is_empty()),
            ("--width", of_text && !size.width.is_empty()),
            ("--batch", !batch.is_empty()),
            ("--layout", layout.is_some()),
            ("--io", io.is_some()),
            ("--chunks", chunks.chunks.is_some()),
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
    /// The folder of a UNet alone.
    Alone(Box<UnetFolder>),
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
        if is_model && UnetFolder::is_at(&args.path) {
            if let Some(flag) = args.with.first_given() {
                return Err(Error::Argument(format!("{flag} has no effect on the folder of a UNet alone")));
            }
            return Ok(OpenedUnet { unet: Unet::Alone(Box::new(UnetFolder::open(&args.path)?)), pipeline: None });
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
            (Unet::Alone(folder), _) => {
                Ok(UnetWeights::Dense { weights: &folder.weights, config: &folder.config, prediction_type: None })
            }
            (Unet::Dense(_), None) => Err(Error::internal("dense weights without their pipeline")),
        }
    }
}

/// The functions of a package for all `sizes` in latents and all `batches`, named after the
/// pictures' sizes. The default is the first size, of batch 2 if there is one: Apple's pipeline
/// computes both halves of guidance in one call, and asks for no function by its name.
fn functions(sizes: &[[i64; 2]], batches: &[i64], scale: i64) -> Vec<FunctionSize> {
    let function = |latents: [i64; 2], batch: i64| {
        let [height, width] = latents.map(|latent| latent * scale);
        FunctionSize { name: format!("h{height}_w{width}_b{batch}"), batch, latents }
    };
    let of_size = |size: &[i64; 2]| batches.iter().map(|batch| function(*size, *batch)).collect::<Vec<_>>();
    let mut functions: Vec<FunctionSize> = sizes.iter().flat_map(of_size).collect();
    let default = batches.iter().position(|batch| *batch == 2).unwrap_or(0);
    functions[..=default].rotate_right(1);
    functions
}

/// The options of the command line, with the rest from the pipeline if there is one, else from the
/// UNet.
fn options(args: &CoremlArgs, config: &UnetConfig, pipeline: Option<&PipelineFolder>) -> Result<Options> {
    /// Pixels of a latent in SDXL's VAE.
    const SDXL_SCALE: i64 = 8;
    let scale = pipeline.map_or(SDXL_SCALE, |pipeline| pipeline.vae.scale());
    let mut options = Options::new(config);
    let sizes = args.size.all(scale, options.latents)?;
    let batches = if args.batch.is_empty() { vec![options.batch] } else { args.batch.clone() };
    match (&sizes[..], &batches[..]) {
        ([latents], [batch]) => (options.latents, options.batch) = (*latents, *batch),
        _ => options.functions = functions(&sizes, &batches, scale),
    }
    if let (Some(time_ids), Some(pipeline)) = (args.time_ids, pipeline)
        && time_ids != pipeline.time_ids()
    {
        return Err(Error::Argument(format!(
            "the model is told {} numbers of size and crop, not {time_ids}",
            pipeline.time_ids()
        )));
    }
    options.time_ids = args.time_ids.or(pipeline.map(PipelineFolder::time_ids)).unwrap_or(options.time_ids);
    options.tokens = args.tokens.unwrap_or(options.tokens);
    Label { author: options.author, license: options.license } = args.label();
    options.layout = args.layout.map_or(Layout::Linear, LayoutArg::layout);
    options.io = match args.io {
        None | Some(IoArg::Diffusers) => Io::Diffusers,
        Some(IoArg::Apple) => Io::Apple,
    };
    Ok(options)
}
