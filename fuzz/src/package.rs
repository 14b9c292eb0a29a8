//! Verifies a Core ML package: manifest, program and weights.

use std::path::Path;

use prost::Message;
use sdxl_squeeze::coreml::proto::specification::{Metadata, Model};
use sdxl_squeeze::coreml::verify;
use sha2::{Digest, Sha256};

use crate::choices::Choices;
use crate::edit::edit;
use crate::scratch;

/// The three files of a small package that coremltools wrote.
const MANIFEST: &[u8] = include_bytes!("../../tests/golden/coreml/by-coremltools.mlpackage/Manifest.json");
const MODEL: &[u8] = include_bytes!("../../tests/golden/coreml/by-coremltools.mlpackage/Data/com.apple.CoreML/model.mlmodel");
const BLOBS: &[u8] =
    include_bytes!("../../tests/golden/coreml/by-coremltools.mlpackage/Data/com.apple.CoreML/weights/weight.bin");

/// Runs one input: three files, preceded by the lengths of the first two, or changes to the package
/// of coremltools, with or without corrected hashes.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let package = scratch::folder().join("x.mlpackage");
    if choices.rarely(4) {
        let (first, second) = (usize::from(choices.short()), usize::from(choices.short()));
        let rest = choices.rest();
        let (manifest, rest) = rest.split_at(first.min(rest.len()));
        let (model, blobs) = rest.split_at(second.min(rest.len()));
        write(&package, manifest, model, blobs);
        let _ = verify(&package);
        return;
    }
    let (mut manifest, mut model, mut blobs) = (MANIFEST.to_vec(), MODEL.to_vec(), BLOBS.to_vec());
    let hashed = choices.below(2) == 1;
    // At most three changes are made, most of them to the model: a fault in one file would keep the
    // reader from the other files.
    for _ in 0..choices.below(4) {
        match choices.below(8) {
            0 => flip(&mut manifest, &mut choices),
            1 => flip(&mut blobs, &mut choices),
            2 => set_number(&mut blobs, &mut choices),
            _ => model = edit(&model, &mut choices),
        }
    }
    if hashed {
        model = with_hashes(&model, &blobs);
    }
    write(&package, &manifest, &model, &blobs);
    if let Ok(found) = verify(&package) {
        assert_eq!(found.bytes, (manifest.len() + model.len() + blobs.len()) as u64);
        assert!(found.pruned <= found.compressed_elements);
    }
}

fn write(package: &Path, manifest: &[u8], model: &[u8], blobs: &[u8]) {
    let inner = package.join("Data/com.apple.CoreML");
    std::fs::create_dir_all(inner.join("weights")).expect("the folder for files can be written");
    for (path, content) in [
        (package.join("Manifest.json"), manifest),
        (inner.join("model.mlmodel"), model),
        (inner.join("weights/weight.bin"), blobs),
    ] {
        std::fs::write(path, content).expect("the folder for files can be written");
    }
}

fn flip(bytes: &mut [u8], choices: &mut Choices) {
    let at = usize::from(choices.short()) % bytes.len();
    bytes[at] ^= 1 << choices.below(8);
}

/// Sets a number in the header or in a record of `weight.bin`. Header and records begin at
/// multiples of 64 bytes.
fn set_number(blobs: &mut [u8], choices: &mut Choices) {
    let unit = 64 * (usize::from(choices.byte()) % (blobs.len() / 64));
    let at = unit + 8 * choices.below(4);
    let number = choices.number().to_le_bytes();
    blobs[at..at + 8].copy_from_slice(&number);
}

/// Adds the hashes that this project's writer stores. A model that cannot be decoded is returned as
/// it is.
fn with_hashes(model: &[u8], blobs: &[u8]) -> Vec<u8> {
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let Ok(mut decoded) = Model::decode(model) else { return model.to_vec() };
    let Some(description) = decoded.description.as_mut() else { return model.to_vec() };
    let entries = &mut description.metadata.get_or_insert_with(Metadata::default).user_defined;
    entries.insert("sdxl-squeeze.weights_sha256".into(), hex(blobs.get(64..).unwrap_or_default()));
    entries.remove("sdxl-squeeze.model_sha256");
    let hash = hex(&decoded.encode_to_vec());
    if let Some(metadata) = decoded.description.as_mut().and_then(|description| description.metadata.as_mut()) {
        metadata.user_defined.insert("sdxl-squeeze.model_sha256".into(), hash);
    }
    decoded.encode_to_vec()
}
