//! `Manifest.json`: which files a package consists of (coremltools:
//! `modelpackage/src/ModelPackage.cpp`).

use serde_json::json;
use sha2::{Digest, Sha256};

/// The program's path in the package's `Data`.
pub(super) const MODEL: &str = "com.apple.CoreML/model.mlmodel";
/// The weights' folder in the package's `Data`.
pub(super) const WEIGHTS: &str = "com.apple.CoreML/weights";
/// The weights, in their folder.
pub(super) const BLOBS: &str = "weight.bin";
/// The version of the manifest.
pub(super) const VERSION: &str = "1.0.0";

/// The manifest of a package whose program is `model`. The items' identifiers are hashes of the
/// program, so that equal packages have equal bytes and different ones different identifiers.
pub(super) fn manifest(model: &[u8]) -> String {
    let (program, weights) = (identifier("model.mlmodel", model), identifier("weights", model));
    let manifest = json!({
        "fileFormatVersion": VERSION,
        "itemInfoEntries": {
            &program: {
                "author": "com.apple.CoreML",
                "description": "CoreML Model Specification",
                "name": "model.mlmodel",
                "path": MODEL,
            },
            &weights: {
                "author": "com.apple.CoreML",
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": WEIGHTS,
            },
        },
        "rootModelIdentifier": &program,
    });
    format!("{manifest:#}\n")
}

/// Whether an item's identifier has the form of [`manifest`]'s. Apple's writer makes random ones,
/// of version 4.
pub(super) fn is_ours(identifier: &str) -> bool {
    let parts: Vec<&str> = identifier.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    lengths == [8, 4, 4, 4, 12] && parts[2].starts_with('8') && parts[3].starts_with('a')
}

/// A UUID of version 8 (RFC 9562: of the maker's own content).
fn identifier(name: &str, model: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(name.as_bytes());
    hash.update([0]);
    hash.update(model);
    let mut digits: Vec<char> = squeeze_base::digest::hex(hash).chars().take(32).collect();
    (digits[12], digits[16]) = ('8', 'a');
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| digits[range].iter().collect());
    <[String]>::join(&parts, "-")
}
