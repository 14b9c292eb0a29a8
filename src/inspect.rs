//! Stages, layers, shapes, parameters and bytes of a model.

use std::collections::BTreeMap;
use std::path::Path;

use sdxl_model::checkpoint::{Blueprint, ConfigFile, TensorSpec, Weights};
use sdxl_model::ldm::{SingleFile, Skipped};
use sdxl_model::text::ClipText;
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::VaeDecoder;
use sdxl_model::{ConvGeometry, Layer, Operation};
use sdxl_pipeline::{PipelineFolder, UnetFolder, check_index};
use serde::Serialize;
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};

/// The bytes of an fp16 element, which are counted where there are no weights to measure.
const FP16: u64 = 2;

/// A UNet's stages and layers, and the pipeline's other parts.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// Parameters of the UNet.
    pub parameters: u64,
    /// Bytes of the UNet's tensors as stored; as fp16 if there are no weights.
    pub bytes: u64,
    /// The dtype of most of the UNet's elements; absent if there are no weights.
    pub dtype: Option<String>,
    /// The UNet in execution order, with the blocks before and after the stages as first and last.
    pub stages: Vec<StageRow>,
    /// The other parts of the pipeline; none if a UNet's own folder was inspected.
    pub parts: Vec<PartRow>,
    /// What a single-file checkpoint is; absent for folders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointRow>,
}

/// What a single-file checkpoint is.
#[derive(Debug, Serialize)]
pub struct CheckpointRow {
    /// The model, in words: "SDXL base, for inpainting (9 input channels)".
    pub family: String,
    /// The parts of a pipeline that are not in the file, by their folders in the diffusers layout.
    pub missing: Vec<&'static str>,
    /// Whether the tensors tell the UNet's architecture; if not, no stages are listed.
    pub is_told_by_shapes: bool,
    /// The tensors that are not read, by kind.
    pub skipped: Vec<Skipped>,
    /// The sampler's config that the file implies.
    pub scheduler: Map<String, Value>,
}

/// A stage, or one of the ends.
#[derive(Debug, Serialize)]
pub struct StageRow {
    /// `down_blocks.0`, …; the ends are `head` and `tail`.
    pub name: String,
    /// All parameters, with norms and biases.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Conv2d and Linear layers in execution order.
    pub layers: Vec<LayerRow>,
}

/// A Conv2d or Linear.
#[derive(Debug, Serialize)]
pub struct LayerRow {
    /// The checkpoint name, without `.weight`.
    pub name: String,
    /// `Linear`, or `Conv2d` with its stride.
    pub kind: String,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// Elements of weight and bias.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A part of a pipeline.
#[derive(Debug, Serialize)]
pub struct PartRow {
    /// The folder's name.
    pub name: String,
    /// Parameters; of the VAE, the decoder's.
    pub parameters: u64,
    /// Their bytes as stored, or as fp16.
    pub bytes: u64,
    /// The dtype of most elements; absent if there are no weights.
    pub dtype: Option<String>,
}

/// Inspects a pipeline folder, the folder of a UNet alone, or a single-file checkpoint. Only
/// configs and headers are read; weights may be absent from folders.
///
/// # Errors
/// If a config cannot be read, or weights that are there disagree with it.
pub fn inspect(path: &Path) -> Result<Inspection> {
    if path.is_file() {
        return inspect_single_file(&SingleFile::open(path)?);
    }
    // A link to nothing is named as such when it is read.
    if path.join("model_index.json").symlink_metadata().is_ok() {
        let folder = PipelineFolder::open(path)?;
        let mut parts = Vec::new();
        for part in &folder.text_encoders {
            let weights = if_there(folder.text_weights(part), &path.join(part.encoder))?;
            parts.push(part_row(part.encoder, &ClipText::tensors(&part.config)?, weights.as_ref()));
        }
        let weights = if_there(folder.vae_weights(), &path.join("vae"))?;
        parts.push(part_row("vae", &VaeDecoder::tensors(&folder.vae)?, weights.as_ref()));
        let weights = if_there(folder.unet_weights(), &path.join("unet"))?;
        return inspect_unet(&folder.unet, weights.as_ref(), parts);
    }
    let config = path.join("config.json");
    if !config.is_file() {
        check_index(path)?;
    }
    let chain = UnetChain::new(UnetConfig::read(&config)?);
    let weights = if_there(UnetFolder::open(path).map(|folder| folder.weights), path)?;
    inspect_unet(&chain, weights.as_ref(), Vec::new())
}

/// The stages are those that the shapes of the tensors tell.
fn inspect_single_file(file: &SingleFile) -> Result<Inspection> {
    let parts = ["text_encoder", "text_encoder_2", "vae"].into_iter().filter_map(|part| {
        let (parameters, bytes, dtype) = file.size_of(part);
        (parameters > 0).then(|| PartRow {
            name: part.to_owned(),
            parameters,
            bytes,
            dtype: dtype.map(|dtype| format!("{dtype:?}")),
        })
    });
    let parts = parts.collect();
    let config = file.unet_config(None);
    let row = CheckpointRow {
        family: file.family().to_string(),
        missing: file.missing(),
        is_told_by_shapes: config.is_some(),
        skipped: file.skipped().to_vec(),
        scheduler: file.family().scheduler(),
    };
    let Some(config) = config else {
        let (parameters, bytes, dtype) = file.size_of("unet");
        let dtype = dtype.map(|dtype| format!("{dtype:?}"));
        return Ok(Inspection { parameters, bytes, dtype, stages: Vec::new(), parts, checkpoint: Some(row) });
    };
    let chain = UnetChain::new(UnetConfig::parse(ConfigFile::from_entries(file.path(), config))?);
    let weights = file.unet_weights(&chain)?;
    weights.check(&chain.tensors()?, |_| false)?;
    Ok(Inspection { checkpoint: Some(row), ..inspect_unet(&chain, Some(&weights), parts)? })
}

/// Absent weights are no error here; damaged ones are.
fn if_there(opened: Result<Weights>, folder: &Path) -> Result<Option<Weights>> {
    let has_weights = std::fs::read_dir(folder)
        .map_err(Error::read(folder))?
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().contains(".safetensors"));
    match opened {
        Err(_) if !has_weights => Ok(None),
        opened => opened.map(Some),
    }
}

/// Bytes of tensors by name, as stored or as fp16.
struct Bytes<'a>(BTreeMap<&'a str, u64>);

impl<'a> Bytes<'a> {
    fn new(weights: Option<&'a Weights>) -> Self {
        Bytes(weights.into_iter().flat_map(Weights::entries).map(|(name, entry)| (name, entry.bytes())).collect())
    }

    fn of(&self, spec: &TensorSpec) -> u64 {
        self.0.get(spec.name.as_str()).copied().unwrap_or(spec.numel() * FP16)
    }

    fn sum(&self, specs: &[TensorSpec]) -> u64 {
        specs.iter().map(|spec| self.of(spec)).sum()
    }
}

fn parameters(specs: &[TensorSpec]) -> u64 {
    specs.iter().map(TensorSpec::numel).sum()
}

fn dtype(weights: Option<&Weights>) -> Option<String> {
    weights.and_then(Weights::dtype).map(|dtype| format!("{dtype:?}"))
}

fn part_row(name: &str, tensors: &[TensorSpec], weights: Option<&Weights>) -> PartRow {
    let bytes = Bytes::new(weights).sum(tensors);
    PartRow { name: name.to_owned(), parameters: parameters(tensors), bytes, dtype: dtype(weights) }
}

fn inspect_unet(chain: &UnetChain, weights: Option<&Weights>, parts: Vec<PartRow>) -> Result<Inspection> {
    let bytes = Bytes::new(weights);
    let mut stages = Vec::new();
    let mut add = |name: String, blueprint: Blueprint, layers: &[Layer]| {
        let tensors = blueprint.into_tensors();
        let layers = layers.iter().map(|layer| layer_row(layer, &tensors, &bytes)).collect();
        stages.push(StageRow { name, parameters: parameters(&tensors), bytes: bytes.sum(&tensors), layers });
    };
    let blueprint = Blueprint::default();
    let input_block = chain.load_input_block(&blueprint)?;
    add("head".into(), blueprint, input_block.layers());
    for spec in chain.stages() {
        let blueprint = Blueprint::default();
        let stage = spec.load(&blueprint)?;
        add(spec.name().to_string(), blueprint, stage.layers());
    }
    let blueprint = Blueprint::default();
    let output_block = chain.load_output_block(&blueprint)?;
    add("tail".into(), blueprint, output_block.layers());
    Ok(Inspection {
        parameters: stages.iter().map(|stage| stage.parameters).sum(),
        bytes: stages.iter().map(|stage| stage.bytes).sum(),
        dtype: dtype(weights),
        stages,
        parts,
        checkpoint: None,
    })
}

fn layer_row(layer: &Layer, tensors: &[TensorSpec], bytes: &Bytes) -> LayerRow {
    let is_of_layer =
        |spec: &&TensorSpec| spec.name.strip_prefix(layer.name()).is_some_and(|leaf| leaf == ".weight" || leaf == ".bias");
    let layer_tensors: Vec<TensorSpec> = tensors.iter().filter(is_of_layer).cloned().collect();
    LayerRow {
        name: layer.name().to_owned(),
        kind: describe(layer.operation()),
        shape: layer.weight().size(),
        parameters: parameters(&layer_tensors),
        bytes: bytes.sum(&layer_tensors),
    }
}

fn describe(kind: Operation) -> String {
    match kind {
        Operation::Linear => "Linear".into(),
        Operation::Conv2d(ConvGeometry { stride: [1, 1], .. }) => "Conv2d".into(),
        Operation::Conv2d(ConvGeometry { stride: [down, right], .. }) => format!("Conv2d stride {down}x{right}"),
    }
}
