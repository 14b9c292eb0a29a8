//! Writes a package.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use prost::Message;
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::UnetWeights;
use serde::Serialize;
use serde_json::{Map, Value, json};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::NewFolder;
use squeeze_base::progress::Progress;

use super::blob::{BlobFile, BlobWriter};
use super::chunk::describe_chunk;
use super::constants::{self, DenseConstant};
use super::description::feature;
use super::lower::{Lowered, lower_unet};
use super::manifest::{self, manifest};
use super::options::Options;
use super::portion::Portion;
use super::program::{ProgramBuilder, Var, declared};
use super::proto::mil_spec::{Block, Function, Operation, Program};
use super::proto::specification::{FunctionDescription, Metadata, Model, ModelDescription, model};

/// The specification of iOS 18 and macOS 15.
pub(super) const SPECIFICATION: i32 = 9;
/// The operator set that belongs to it.
pub(super) const OPSET: &str = "CoreML8";
/// The metadata key of the weights' hash: SHA-256 of `weight.bin` after its header.
pub(super) const WEIGHTS_HASH: &str = "sdxl-squeeze.weights_sha256";
/// The metadata key of the program's hash: SHA-256 of `model.mlmodel` without this entry.
pub(super) const MODEL_HASH: &str = "sdxl-squeeze.model_sha256";

/// The first systems that read vector palettes right: Apple's tests skip them on macOS 15.1 (in
/// coremltools, "Bug fixed in macOS 15.2").
pub const VECTORS_NEED: &str = "iOS 18.2 or macOS 15.2";

/// The beginning of every metadata key and version of this library.
pub(super) const MAKER: &str = "sdxl-squeeze";
/// The metadata key of the UNet's `config.json`.
pub(super) const UNET_CONFIG: &str = "sdxl-squeeze.unet_config";
/// The metadata key of what the UNet predicts.
const PREDICTION_TYPE: &str = "sdxl-squeeze.prediction_type";
/// The metadata key of a UNet's layout.
pub(super) const LAYOUT: &str = "sdxl-squeeze.layout";
/// The metadata key of what the UNet's output is, where the program makes it of the UNet's
/// prediction or tells the UNet other timesteps than it is told: `epsilon`. A chunk that does
/// neither has no such entry.
pub(super) const OUTPUT_TYPE: &str = "sdxl-squeeze.output_type";
/// The metadata keys of the `config.json` of all networks. A package has one of them, which tells
/// its network.
pub(super) const CONFIGS: [&str; 4] = [UNET_CONFIG, TEXT_ENCODER_CONFIG, VAE_DECODER_CONFIG, VAE_ENCODER_CONFIG];
/// The metadata key of a text encoder's `config.json`.
pub(super) const TEXT_ENCODER_CONFIG: &str = "sdxl-squeeze.text_encoder_config";
/// The metadata key of a VAE's `config.json` in its decoder's package.
pub(super) const VAE_DECODER_CONFIG: &str = "sdxl-squeeze.vae_decoder_config";
/// The metadata key of a VAE's `config.json` in its encoder's package.
pub(super) const VAE_ENCODER_CONFIG: &str = "sdxl-squeeze.vae_encoder_config";

/// A package that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrittenPackage {
    /// The bytes of all its files.
    pub bytes: u64,
    /// The bytes of `weight.bin`.
    pub weight_bytes: u64,
    /// The bytes of `model.mlmodel`.
    pub program_bytes: u64,
    /// The names of the functions of a package with several, the default one first. The numbers
    /// below are those of the default function, and the functions share the constants.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<String>,
    /// The operations that compute something.
    pub operations: usize,
    /// The constants.
    pub constants: usize,
    /// The weights that stay compressed.
    pub compressed: usize,
    /// Those of them with vector palettes. If there are any, the package needs
    /// [`VECTORS_NEED`](super::VECTORS_NEED).
    pub vectors: usize,
    /// The bytes of the arrays in the program, by the kind of operation that holds them.
    pub constant_bytes: BTreeMap<String, u64>,
    /// The dense fp16 constants of at least 16 KiB, the largest first: weights that are not
    /// compressed.
    pub dense: Vec<DenseConstant>,
}

/// Checks that no weight has scales for blocks of columns, which neither Core ML's palettes nor
/// coremltools' buffers hold.
///
/// # Errors
/// [`Error::Argument`] naming the weights that have them.
pub fn check_scales(weights: UnetWeights) -> Result<()> {
    const SHOWN: usize = 4;
    let UnetWeights::Container(container) = weights else { return Ok(()) };
    let names: Vec<String> =
        container.layers().filter(|layer| layer.scale_block.is_some()).map(|layer| format!("`{}`", layer.name)).collect();
    if names.is_empty() {
        return Ok(());
    }
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(Error::Argument(format!(
        "Core ML's palettes have no scales for blocks of columns (`values: int`, `nf4`), as {shown}{more} have; --to diffusers and \
         --to single-file write them decoded"
    )))
}

/// Writes the UNet of `weights` as the new package `out`, whose name ends in `.mlpackage`.
///
/// Weights are copied one at a time. Equal input gives equal bytes.
///
/// # Errors
/// [`Error::Argument`] if `out` exists, an option does not fit the UNet, or weights have scales for
/// blocks of columns; if a weight cannot be read; [`Error::Write`]. Then there is no package.
pub fn write(weights: UnetWeights, options: &Options, out: &Path, progress: &dyn Progress) -> Result<WrittenPackage> {
    let chain = weights.chain()?;
    check_name(out)?;
    options.check_all(chain.config())?;
    check_scales(weights)?;
    write_portion((&chain, &Portion::whole(&chain)), weights, options, out, progress)
}

/// Writes a portion of a UNet as the new package `out`.
///
/// # Errors
/// As [`write`], which also checks what does not depend on the portion.
pub(super) fn write_portion(
    (chain, portion): (&UnetChain, &Portion),
    weights: UnetWeights,
    options: &Options,
    out: &Path,
    progress: &dyn Progress,
) -> Result<WrittenPackage> {
    let tensors: BTreeSet<String> = portion.tensors(chain)?.into_iter().map(|tensor| tensor.name).collect();
    let functions = options.of_functions()?;
    let names: Vec<&str> = functions.iter().map(|(name, _)| name.as_str()).collect();
    let lower = |function: usize, program| lower_unet(chain, weights, &functions[function].1, portion, program, progress);
    write_program(out, &names, lower, |blobs, has_vectors| {
        let mut metadata = metadata(weights, &tensors, options, blobs, has_vectors);
        if options.noise.as_ref().is_some_and(|noise| noise.is_made_in(portion.begins(), portion.ends())) {
            metadata.user_defined.insert(OUTPUT_TYPE.to_owned(), "epsilon".to_owned());
        }
        if !portion.is_whole() {
            describe_chunk(&mut metadata, portion);
        }
        metadata
    })
}

/// Checks the name of a package.
///
/// # Errors
/// [`Error::Argument`] if it does not end in `.mlpackage`.
pub(super) fn check_name(out: &Path) -> Result<()> {
    if out.extension() != Some("mlpackage".as_ref()) {
        return Err(Error::Argument(format!("{}: a Core ML package's name ends in .mlpackage", out.display())));
    }
    Ok(())
}

/// Writes the functions called `names`, the default one first, as the new package `out`. `lower`
/// builds each; equal constants of equal names are stored once. `metadata` is given the weights'
/// file, and whether the program has vector palettes.
///
/// # Errors
/// [`Error::Argument`] if `out` exists; an error of `lower`; [`Error::Write`]. Then there is no
/// package.
pub(super) fn write_program(
    out: &Path,
    names: &[&str],
    lower: impl Fn(usize, ProgramBuilder) -> Result<Lowered>,
    metadata: impl FnOnce(&BlobFile, bool) -> Metadata,
) -> Result<WrittenPackage> {
    let folder = NewFolder::create(out)?;
    let data = folder.path().join("Data");
    let weights_folder = data.join(manifest::WEIGHTS);
    std::fs::create_dir_all(&weights_folder).map_err(Error::write(out))?;
    let mut blobs = BlobWriter::create(&weights_folder.join(manifest::BLOBS))?;
    if names.len() > 1 {
        blobs.share();
    }

    let mut functions = Vec::new();
    let mut descriptions = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let Lowered { program, inputs, outputs } = lower(index, ProgramBuilder::new(blobs))?;
        let operations;
        (operations, blobs) = program.into_parts();
        descriptions.push(FunctionDescription {
            name: (*name).to_owned(),
            input: inputs.iter().map(feature).collect(),
            output: outputs.iter().map(feature).collect(),
        });
        functions.push(((*name).to_owned(), function(&inputs, outputs, operations)));
    }
    let blobs = blobs.finish()?;
    let default = functions.first().and_then(|(_, function)| function.block_specializations.get(OPSET));
    let operations = &default.ok_or_else(|| Error::internal("a package without functions"))?.operations;
    let mut written = WrittenPackage {
        bytes: 0,
        weight_bytes: blobs.bytes,
        program_bytes: 0,
        functions: if names.len() > 1 { names.iter().map(|name| (*name).to_owned()).collect() } else { Vec::new() },
        operations: operations.iter().filter(|op| op.r#type != "const" && !op.r#type.starts_with("constexpr_")).count(),
        constants: operations.iter().filter(|op| op.r#type == "const").count(),
        compressed: operations.iter().filter(|op| is_dense_weight(op)).count(),
        vectors: operations.iter().filter(|op| op.inputs.contains_key("vector_axis")).count(),
        constant_bytes: constants::bytes_by_kind(operations),
        dense: constants::large_and_dense(operations),
    };
    let program = Program {
        version: 1,
        functions: functions.into_iter().collect(),
        doc_string: String::new(),
        attributes: BTreeMap::default(),
    };
    let mut model = Model {
        specification_version: SPECIFICATION,
        description: Some(describe(descriptions, metadata(&blobs, written.vectors > 0))),
        r#type: Some(model::Type::MlProgram(program)),
    };
    let hash = digest::of_bytes(&model.encode_to_vec());
    let metadata = model.description.as_mut().and_then(|description| description.metadata.as_mut());
    metadata.expect("both were set above").user_defined.insert(MODEL_HASH.to_owned(), hash);
    let model = model.encode_to_vec();
    let manifest = manifest(&model);
    let put = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).map_err(Error::write(path));
    put(&data.join(manifest::MODEL), &model)?;
    put(&folder.path().join("Manifest.json"), manifest.as_bytes())?;
    written.program_bytes = model.len() as u64;
    written.bytes = written.weight_bytes + written.program_bytes + manifest.len() as u64;
    folder.commit()?;
    Ok(written)
}

/// A function of the program.
fn function(inputs: &[Var], outputs: Vec<Var>, operations: Vec<Operation>) -> Function {
    let outputs = outputs.into_iter().map(|output| output.name).collect();
    let block = Block { inputs: Vec::new(), outputs, operations, attributes: BTreeMap::default() };
    Function {
        inputs: inputs.iter().map(declared).collect(),
        opset: OPSET.to_owned(),
        block_specializations: BTreeMap::from([(OPSET.to_owned(), block)]),
        attributes: BTreeMap::default(),
    }
}

/// The description of a package. Inputs and outputs of several functions are in the functions'
/// descriptions alone (coremltools: `save_multifunction`).
fn describe(mut functions: Vec<FunctionDescription>, metadata: Metadata) -> ModelDescription {
    let metadata = Some(metadata);
    match (functions.pop(), functions.first()) {
        (Some(FunctionDescription { input, output, .. }), None) => {
            ModelDescription { input, output, metadata, ..ModelDescription::default() }
        }
        (last, first) => {
            let default_function_name = first.map_or_else(String::new, |first| first.name.clone());
            functions.extend(last);
            ModelDescription { functions, default_function_name, metadata, ..ModelDescription::default() }
        }
    }
}

/// Whether an operation decodes a compressed weight.
fn is_dense_weight(operation: &Operation) -> bool {
    matches!(operation.r#type.as_str(), "constexpr_lut_to_dense" | "constexpr_sparse_to_dense")
}

/// The package's own fields; those of a package with vector palettes say what system it needs.
/// Sizes count the weights among `tensors`, which the package has.
fn metadata(
    weights: UnetWeights,
    tensors: &BTreeSet<String>,
    options: &Options,
    blobs: &BlobFile,
    has_vectors: bool,
) -> Metadata {
    let text = |value: &Value| value.to_string();
    let mut user_defined = BTreeMap::from([
        (WEIGHTS_HASH.to_owned(), blobs.sha256.clone()),
        (LAYOUT.to_owned(), options.layout.to_string()),
        ("sdxl-squeeze.io".to_owned(), options.io.to_string()),
    ]);
    let mut about = "The UNet of an SDXL pipeline: one denoising step".to_owned();
    let mut sizes = Map::from_iter([("weight_bin_bytes".to_owned(), json!(blobs.bytes))]);
    user_defined.insert(UNET_CONFIG.to_owned(), text(&Value::Object(weights.config().clone())));
    if let Some(prediction) = weights.prediction_type() {
        user_defined.insert(PREDICTION_TYPE.to_owned(), prediction.to_owned());
    }
    if let UnetWeights::Container(container) = weights {
        let layers: Vec<_> = container.layers().filter(|layer| tensors.contains(&layer.name)).collect();
        let elements: u64 = layers.iter().map(|layer| layer.shape.iter().product::<i64>() as u64).sum();
        let (kept, bytes) = layers.iter().fold((0, 0), |(kept, bytes), layer| (kept + layer.kept, bytes + layer.bytes));
        let share = |part: f64| if elements == 0 { 0.0 } else { part / elements as f64 };
        let (sparsity, bits) = (1.0 - share(kept as f64), share(8.0 * bytes as f64));
        about = format!("{about}. {:.1} % of its weights are zero; {bits:.2} bits a weight", 100.0 * sparsity);
        if elements > 0 {
            sizes.insert("compressed_weights".into(), json!(layers.len()));
            sizes.insert("compressed_elements".into(), json!(elements));
            sizes.insert("sparsity".into(), json!(sparsity));
            sizes.insert("bits_per_weight".into(), json!(bits));
        }
        let sources = json!(container.info().sources);
        user_defined.insert("sdxl-squeeze.recipe".to_owned(), text(&container.info().recipe));
        user_defined.insert("sdxl-squeeze.sources".to_owned(), text(&sources));
    }
    user_defined.insert("sdxl-squeeze.sizes".to_owned(), text(&Value::Object(sizes)));
    if has_vectors {
        about = format!("{about}; needs {VECTORS_NEED}");
        user_defined.insert("sdxl-squeeze.needs".to_owned(), VECTORS_NEED.to_owned());
    }
    Metadata {
        short_description: about,
        version_string: version(),
        author: options.author.clone(),
        license: options.license.clone(),
        user_defined,
    }
}

/// The maker and the version of a package.
pub(super) fn version() -> String {
    format!("{MAKER} {}", env!("CARGO_PKG_VERSION"))
}
