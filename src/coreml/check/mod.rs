//! Checks a package as far as that is possible without Core ML.
//!
//! The structure: manifest, blob records, names, the order of operations, their parameters, the
//! types of everything, the counts of masks. And the content, by the hashes that the writer left:
//! one flipped bit anywhere is found.
//!
//! Packages of other writers have no hashes, and only their structure is checked. So that no damage
//! makes a package of ours look like one of theirs, several signs in two files say whose it is, and
//! one is enough: then all hashes must be there, the manifest must be the one that belongs to the
//! program, byte for byte, and the folder must hold nothing else.

mod blobs;
mod files;
mod manifest;
mod model;
mod network;
mod program;
mod values;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

/// A package that holds what was written, in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PackageVerification {
    /// The package.
    #[serde(serialize_with = "crate::shorten::path_as_text")]
    pub path: PathBuf,
    /// The bytes of manifest, program and weights.
    pub bytes: u64,
    /// The bytes of `weight.bin`.
    pub weight_bytes: u64,
    /// The bytes of `model.mlmodel`.
    pub program_bytes: u64,
    /// The specification's version: 9 for iOS 18.
    pub specification: i32,
    /// Inputs and outputs: name, dtype and shape.
    pub inputs: Vec<String>,
    /// The same.
    pub outputs: Vec<String>,
    /// Operations that compute something.
    pub operations: usize,
    /// Weights that are stored compressed.
    pub compressed: usize,
    /// Their elements.
    pub compressed_elements: u64,
    /// The pruned elements among them.
    pub pruned: u64,
    /// Records in `weight.bin`.
    pub blobs: usize,
    /// Whether the hashes of program and weights are there, and hold. Packages of other writers
    /// have none.
    pub hashed: bool,
    /// Whether the program's constants are exactly the tensors of the UNet that it says it is.
    /// Packages of other writers do not say.
    pub named: bool,
}

/// Checks the package `path`.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadFile`] naming what is wrong and where.
pub fn verify(path: &Path) -> Result<PackageVerification> {
    let wrong = |problem: String| Error::bad_file(path, problem);
    let manifest = manifest::read(path)?;
    let model = model::read(&manifest.model)?;
    let ours = model.names_maker() || manifest.has_our_identifiers;
    // Of a damaged program the checks below can say more than that it is damaged.
    let whole = if ours { model.check_own_hash() } else { Ok(()) };
    if ours && whole.is_ok() {
        model.check_manifest(&manifest.text).map_err(wrong)?;
        files::check(path)?;
    }
    let blobs = blobs::Blobs::read(&manifest.weights)?;
    let program = program::check(model.program(), &blobs).map_err(wrong)?;
    model.check_description(&program).map_err(wrong)?;
    let named = network::check(&model, &program).map_err(wrong)?;
    if ours {
        model.check_weights_hash(&blobs).map_err(wrong)?;
        whole.map_err(wrong)?;
    }
    if let Some(unused) = blobs.records.keys().find(|offset| !program.blobs.contains(offset)) {
        return Err(wrong(format!("weight.bin: nothing uses the record at {unused}")));
    }
    let describe = |(name, array): &(String, super::ArrayType)| format!("{name}: {array}");
    Ok(PackageVerification {
        path: path.to_owned(),
        bytes: manifest.text.len() as u64 + model.bytes + blobs.bytes,
        weight_bytes: blobs.bytes,
        program_bytes: model.bytes,
        specification: model.version(),
        inputs: program.inputs.iter().map(describe).collect(),
        outputs: program.outputs.iter().map(describe).collect(),
        operations: program.operations,
        compressed: program.compressed,
        compressed_elements: program.compressed_elements,
        pruned: program.pruned,
        blobs: blobs.records.len(),
        hashed: ours,
        named,
    })
}
