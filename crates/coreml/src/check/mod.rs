//! Checks a package as far as that is possible without Core ML.
//!
//! The structure: manifest, blob records, names, the order of operations, their parameters, all
//! types, the counts of masks. And the content, by the hashes that the writer stored: any flipped
//! bit is found.
//!
//! Packages of other writers have no hashes, and only their structure is checked. So that no damage
//! makes a package of this library look like another writer's, several marks in two files identify
//! it, and one mark is enough: then all hashes are required, the manifest must be the program's,
//! byte for byte, and the folder must hold no other file.

mod blobs;
mod chunk;
mod files;
mod functions;
mod manifest;
mod model;
mod network;
mod program;
mod values;

use std::path::{Path, PathBuf};

use serde::Serialize;
use squeeze_base::error::{Error, Result};

/// A verified package, in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PackageVerification {
    /// The package.
    #[serde(serialize_with = "squeeze_base::shorten::path_as_text")]
    pub path: PathBuf,
    /// The bytes of manifest, program and weights.
    pub bytes: u64,
    /// The bytes of `weight.bin`.
    pub weight_bytes: u64,
    /// The bytes of `model.mlmodel`.
    pub program_bytes: u64,
    /// The specification's version: 9 for iOS 18.
    pub specification: i32,
    /// The functions of a package with several, the default one first. All numbers below are those
    /// of the default function.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<VerifiedFunction>,
    /// Inputs: name, dtype and shape.
    pub inputs: Vec<String>,
    /// Outputs: name, dtype and shape.
    pub outputs: Vec<String>,
    /// Operations that compute something.
    pub operations: usize,
    /// Weights that are stored compressed.
    pub compressed: usize,
    /// Their elements.
    pub compressed_elements: u64,
    /// The pruned elements among them.
    pub pruned: u64,
    /// Weights with vector palettes, which need iOS 18.2 or macOS 15.2.
    pub vectors: usize,
    /// Records in `weight.bin`.
    pub blobs: usize,
    /// Whether the hashes of program and weights exist and are right. Packages of other writers
    /// have none.
    pub hashed: bool,
    /// Whether the program's constants are exactly the tensors of the network in its metadata, and
    /// its inputs and outputs are that network's. Packages of other writers name no network.
    pub named: bool,
}

/// A function of a verified package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedFunction {
    /// Its name.
    pub name: String,
    /// Inputs: name, dtype and shape.
    pub inputs: Vec<String>,
    /// Outputs: name, dtype and shape.
    pub outputs: Vec<String>,
}

/// Checks the package `path`.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadFile`] naming the problem and its place.
pub fn verify(path: &Path) -> Result<PackageVerification> {
    let wrong = |problem: String| Error::bad_file(path, problem);
    let manifest = manifest::read(path)?;
    let mut model = model::read(&manifest.model)?;
    let ours = model.names_maker() || manifest.has_our_identifiers;
    // For a damaged program, the checks below name the damage more precisely.
    let whole = if ours { model.check_own_hash() } else { Ok(()) };
    if ours && whole.is_ok() {
        model.check_manifest(&manifest.text).map_err(wrong)?;
        files::check(path)?;
    }
    let blobs = blobs::Blobs::read(&manifest.weights)?;
    let (functions, named) = functions::check(&model, &blobs, ours).map_err(wrong)?;
    if ours {
        model.check_weights_hash(&blobs).map_err(wrong)?;
        whole.map_err(wrong)?;
    }
    let used = |offset: &u64| functions.iter().any(|(_, function)| function.blobs.contains(offset));
    if let Some(unused) = blobs.records.keys().find(|offset| !used(offset)) {
        return Err(wrong(format!("weight.bin: nothing uses the record at {unused}")));
    }
    let describe = |ends: &[(String, super::ArrayType)]| ends.iter().map(|(name, array)| format!("{name}: {array}")).collect();
    let several = if functions.len() > 1 { &functions[..] } else { &[] };
    let described = several.iter().map(|(name, function)| VerifiedFunction {
        name: name.clone(),
        inputs: describe(&function.inputs),
        outputs: describe(&function.outputs),
    });
    let described = described.collect();
    let Some((_, program)) = functions.into_iter().next() else { return Err(wrong("the program has no function".into())) };
    Ok(PackageVerification {
        path: path.to_owned(),
        bytes: manifest.text.len() as u64 + model.bytes + blobs.bytes,
        weight_bytes: blobs.bytes,
        program_bytes: model.bytes,
        specification: model.version(),
        functions: described,
        inputs: describe(&program.inputs),
        outputs: describe(&program.outputs),
        operations: program.operations,
        compressed: program.compressed,
        compressed_elements: program.compressed_elements,
        pruned: program.pruned,
        vectors: program.vectors,
        blobs: blobs.records.len(),
        hashed: ours,
        named,
    })
}
