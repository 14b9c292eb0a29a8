//! Flipped bits in a package are found in all of its files.

use std::path::Path;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{Options, verify, write};
use sdxl_squeeze::pipeline::UnetWeights;
use sdxl_squeeze::progress::Silent;

use super::file::{Package, blob_path, model_path};
use super::made_up;
use crate::squeeze::Squeeze;
use crate::support::repo;

fn package(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let out = folder.join("x.mlpackage");
    write(UnetWeights::Container(&container), &Options::new(chain.config()), &out, &Silent).unwrap();
    out
}

/// Flips each of `bits` of `file` in turn, and returns the bits with which the package is still
/// accepted.
fn missed(package: &Path, file: &Path, bits: impl Iterator<Item = usize>) -> Vec<usize> {
    let whole = std::fs::read(file).unwrap();
    let missed = bits.filter(|bit| {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(file, &damaged).unwrap();
        verify(package).is_ok()
    });
    let missed = missed.collect();
    std::fs::write(file, &whole).unwrap();
    missed
}

fn bits_of(file: &Path) -> usize {
    8 * std::fs::metadata(file).unwrap().len() as usize
}

#[test]
fn the_manifest_is_what_belongs_to_the_program_to_the_last_bit() {
    let folder = tempfile::tempdir().unwrap();
    let package = package(folder.path());
    let manifest = package.join("Manifest.json");
    // The manifest is compared with the one that is written for this program. Every seventh bit
    // suffices to show this.
    assert_eq!(missed(&package, &manifest, (0..bits_of(&manifest)).step_by(7)), [0; 0]);
    // A manifest with the same meaning but other bytes is refused too.
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.trim_end()).unwrap();
    assert!(verify(&package).unwrap_err().to_string().contains("Manifest.json is not what was written"));
}

/// The unit test `every_flipped_bit_is_found` flips every bit of a small model. This test flips
/// bits in all files of a real package.
#[test]
fn some_hundred_bits_of_each_file_count() {
    let folder = tempfile::tempdir().unwrap();
    let package = package(folder.path());
    let model = model_path(&package);
    let content = std::fs::read(&model).unwrap();
    // Every seventh bit of the metadata's keys is flipped, among them the keys of the hashes.
    let keys = (0..content.len()).filter(|at| content[*at..].starts_with(b"sdxl-squeeze"));
    let keys: Vec<usize> = keys.flat_map(|at| (8 * (at - 6)..8 * (at + 28)).step_by(7)).collect();
    assert!(keys.len() > 200, "{}", keys.len());
    let some = (0..bits_of(&model)).step_by(bits_of(&model) / 300 + 1);
    assert_eq!(missed(&package, &model, keys.into_iter().chain(some)), [0; 0]);
    let blobs = blob_path(&package);
    let some = (0..bits_of(&blobs)).step_by(bits_of(&blobs) / 300 + 1);
    // Every third bit of the header, which no hash covers, and of the first record is flipped.
    assert_eq!(missed(&package, &blobs, (0..8 * 128).step_by(3).chain(some)), [0; 0]);
    verify(&package).unwrap();
}

#[test]
fn other_files_in_a_package_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let package = package(folder.path());
    for name in ["Data/notes.txt", "Data/com.apple.CoreML/weights/other.bin", "extra", "Data/com.apple.CoreML/empty"] {
        let path = package.join(name);
        if name.ends_with("empty") {
            std::fs::create_dir(&path).unwrap()
        } else {
            std::fs::write(&path, b"x").unwrap()
        }
        let said = Squeeze::new("verify").arg(&package).ends_with(2).text();
        assert!(said.contains(&format!("`{name}` was not written with this package")), "{said}");
        if path.is_dir() { std::fs::remove_dir(&path).unwrap() } else { std::fs::remove_file(&path).unwrap() }
    }
    verify(&package).unwrap();
    // The files of a package by another writer are not known, so an extra file is accepted.
    let mut other = Package::read(&package);
    other.forget_maker();
    other.write(&package);
    std::fs::write(package.join("extra"), b"x").unwrap();
    assert!(!verify(&package).unwrap().hashed);
}
