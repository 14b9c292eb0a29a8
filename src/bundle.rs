//! All files that apple/ml-stable-diffusion's Swift pipeline for SDXL reads.
//!
//! The names, inputs and outputs are those of `StableDiffusionXL+Resources.swift` and of the files
//! beside it. A Mac compiles the packages; `compile.sh` has the commands.

mod card;
mod licence;
mod options;
mod vocabulary;

use std::path::{Path, PathBuf};

pub use options::BundleOptions;
use options::Named;
use sdxl_model::checkpoint::SourceFile;
use sdxl_pipeline::{PipelineFolder, UnetWeights};
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::NewFolder;
use squeeze_base::progress::Progress;
use squeeze_coreml::{self as coreml, Io, Options};

use crate::export::{CHUNKS, PipelinePart, apple_mismatch, coreml_chunks_in, coreml_part};

/// The factor by which Apple's pipeline scales SDXL's latents, unless an app sets its own.
const SWIFT_SCALE: f64 = 0.13025;

/// The name of the package of a UNet that is not cut.
const UNET: &str = "Unet";

/// A bundle that was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bundle {
    /// The folder.
    #[serde(serialize_with = "squeeze_base::shorten::path_as_text")]
    pub path: PathBuf,
    /// Its files, the model card excepted: names relative to the folder, bytes and hashes.
    pub files: Vec<SourceFile>,
    /// The bytes of all its files.
    pub bytes: u64,
    /// What an app must set, or its author should know.
    pub warnings: Vec<String>,
}

/// Writes the new folder `out` for Apple's Swift pipeline: the pipeline `model` with `weights` as
/// its UNet.
///
/// # Errors
/// [`Error::Argument`] if Apple's pipeline cannot draw with this model: it predicts something other
/// than noise, its VAE's latents are normalized, its UNet takes other inputs, or its tokenizers
/// differ; if the weights are of another architecture, or a file cannot be read or written. Then
/// there is no folder.
pub fn write(
    weights: UnetWeights,
    model: &PipelineFolder,
    options: &BundleOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Bundle> {
    let chain = weights.chain_of(model)?;
    let warnings = check(model)?;
    let vocabulary = vocabulary::of(model)?;
    let unet = Options {
        layout: options.layout,
        io: Io::Apple,
        batch: 2,
        latents: options.latents,
        time_ids: model.time_ids(),
        author: options.label.author.clone(),
        license: options.label.license.clone(),
        ..Options::new(chain.config())
    };
    let folder = NewFolder::create(out)?;
    let packages = packages(model, options);
    let place = |name: &str| folder.path().join(format!("{name}.mlpackage"));
    if options.chunked {
        coreml_chunks_in(weights, &unet, folder.path(), progress)?;
    } else {
        coreml::write(weights, &unet, &place(UNET), progress)?;
    }
    for Named { name, part } in &packages {
        if let Some(part) = part {
            coreml_part(model, *part, options.latents, &options.label, &place(name), progress)?;
        }
    }
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).map_err(Error::write(&path))
    };
    put("vocab.json", &vocabulary.tokens)?;
    put("merges.txt", &vocabulary.merges)?;
    put("compile.sh", &card::compile_script(&packages))?;
    let files = files_below(folder.path(), folder.path())?;
    let card = card::card(&card::Facts { weights, model, options, packages: &packages, files: &files, warnings: &warnings })?;
    put("README.md", &card)?;
    folder.commit()?;
    let bytes = files.iter().map(|file| file.bytes).sum::<u64>() + card.len() as u64;
    Ok(Bundle { path: out.to_owned(), files, bytes, warnings })
}

/// The packages of a bundle, in the order in which a picture needs them.
fn packages(model: &PipelineFolder, options: &BundleOptions) -> Vec<Named> {
    let has = |part: PipelinePart| model.text_encoders.iter().any(|text| text.encoder == part.to_string());
    let named = |name, part| Named { name, part: Some(part) };
    let mut packages = Vec::new();
    packages.extend(has(PipelinePart::TextEncoder).then(|| named("TextEncoder", PipelinePart::TextEncoder)));
    packages.push(named("TextEncoder2", PipelinePart::TextEncoder2));
    let unets: &[&'static str] = if options.chunked { &CHUNKS } else { &[UNET] };
    packages.extend(unets.iter().map(|name| Named { name, part: None }));
    packages.push(named("VAEDecoder", PipelinePart::VaeDecoder));
    packages.extend(options.vae_encoder.then(|| named("VAEEncoder", PipelinePart::VaeEncoder)));
    packages
}

/// Refuses models that Apple's pipeline draws wrong pictures with, and returns what an app must
/// set.
fn check(model: &PipelineFolder) -> Result<Vec<String>> {
    if let Some(mismatch) = apple_mismatch(&model.scheduler) {
        let remedy = "`export --to coreml` writes the UNet alone, for an app with a sampler of its own";
        return Err(Error::Argument(format!("{mismatch}. A bundle is for Apple's samplers; {remedy}")));
    }
    if model.vae.latents_mean_std.is_some() {
        return Err(Error::Argument(
            "the VAE's latents are normalized by means and deviations (`latents_mean`, `latents_std`), and Apple's pipeline \
             only scales them: its pictures would have wrong colours"
                .into(),
        ));
    }
    let scale = model.vae.scaling_factor;
    let mut warnings = Vec::new();
    if (scale - SWIFT_SCALE).abs() > 1e-9 {
        warnings.push(format!(
            "apple-vae-scale: the VAE's scaling factor is {scale}, and Apple's pipeline uses {SWIFT_SCALE}: set \
             decoderScaleFactor and encoderScaleFactor of its configuration to {scale}"
        ));
    }
    if model.vae.scale() != 8 {
        warnings.push(format!(
            "apple-vae-size: a latent has {0} x {0} pixels, and SDXL's VAE, for which Apple's pipeline is written, 8 x 8",
            model.vae.scale()
        ));
    }
    Ok(warnings)
}

/// The files in a folder, at any depth, with their hashes: sorted by name.
fn files_below(root: &Path, folder: &Path) -> Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::read(folder))? {
        let path = entry.map_err(Error::read(folder))?.path();
        if path.is_dir() {
            files.extend(files_below(root, &path)?);
        } else {
            let name = path.strip_prefix(root).expect("a folder's entries begin with its path").to_string_lossy();
            files.push(SourceFile::read(&path, name)?);
        }
    }
    files.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(files)
}
