//! The model card and the script of a bundle.

use std::fmt::Write;
use std::path::Path;

use sdxl_model::checkpoint::SourceFile;
use sdxl_pipeline::{NetworkWeights, PipelineFolder, UnetWeights};
use squeeze_base::error::Result;
use squeeze_base::number;
use squeeze_container::Container;
use squeeze_coreml::{Predicted, VECTORS_NEED};

use super::licence::stated_licence;
use super::options::{BundleOptions, Named, Network};
use super::refiner::Refiner;
use crate::config::file_name;
use crate::export::{PipelinePart, apple_noise};

/// Everything that a card tells.
pub(super) struct Facts<'a> {
    pub weights: UnetWeights<'a>,
    pub model: &'a PipelineFolder,
    pub refiner: Option<&'a Refiner<'a>>,
    pub options: &'a BundleOptions,
    pub packages: &'a [Named],
    /// All files but the card.
    pub files: &'a [SourceFile],
    pub warnings: &'a [String],
}

/// The commands that compile the packages on a Mac.
pub(super) fn compile_script(packages: &[Named]) -> String {
    let mut script = "#!/bin/sh\n\
        # Compiles the packages for apple/ml-stable-diffusion, on a Mac with Xcode:\n\
        #   sh compile.sh [FOLDER]\n\
        # The new folder (Compiled, if none is named) is the one that Swift reads.\n\
        set -eu\n\
        here=$(cd \"$(dirname \"$0\")\" && pwd)\n\
        out=${1:-\"$here/Compiled\"}\n\
        mkdir -p \"$out\"\n"
        .to_owned();
    for Named { name, .. } in packages {
        let _ = writeln!(script, "xcrun coremlcompiler compile \"$here/{name}.mlpackage\" \"$out\"");
    }
    script.push_str("cp \"$here/vocab.json\" \"$here/merges.txt\" \"$out\"\n");
    script
}

/// The network of a package in words.
fn about(network: Network) -> &'static str {
    match network {
        Network::Unet => "the UNet",
        Network::Chunk(0) => "the first half of the UNet",
        Network::Chunk(_) => "the second half of the UNet",
        Network::Refiner => "the refiner's UNet, for the last steps",
        Network::Part(PipelinePart::TextEncoder) => "the first text encoder",
        Network::Part(PipelinePart::TextEncoder2) => "the second text encoder",
        Network::Part(PipelinePart::VaeDecoder) => "latents to a picture",
        Network::Part(PipelinePart::VaeEncoder) => "a picture to latents, for image to image",
    }
}

/// The model card.
///
/// # Errors
/// If a source file cannot be read.
pub(super) fn card(facts: &Facts) -> Result<String> {
    let Facts { weights, model, refiner, options, packages, files, warnings } = facts;
    let mut card = String::new();
    let scale = model.vae.scale();
    let [height, width] = options.latents.map(|latent| latent * scale);
    let name = model.name.as_deref().unwrap_or("SDXL");
    let mut line = |text: &str| {
        card.push_str(text);
        card.push('\n');
    };
    line(&format!("# {name} for Core ML\n"));
    line(&format!(
        "Packages for the Swift pipeline of apple/ml-stable-diffusion (SDXL), pictures of {height} x {width}, iOS 18 or macOS 15. \
         Written by sdxl-squeeze {}.\n",
        env!("CARGO_PKG_VERSION")
    ));
    line("On a Mac with Xcode, `sh compile.sh` compiles them into the folder `Compiled`, which Swift reads:\n");
    line("```sh\nsh compile.sh\nswift run StableDiffusionSample \"a prompt\" --xl --resource-path Compiled\n```\n");
    line("Nothing here has run on a Mac or an iPhone.\n");
    line("## Files\n\n| file | | size |\n|---|---|---:|");
    for Named { name, network } in *packages {
        let within = format!("{name}.mlpackage/");
        let bytes = files.iter().filter(|file| file.file.starts_with(&within)).map(|file| file.bytes).sum();
        line(&format!("| `{name}.mlpackage` | {} | {} |", about(*network), number::size(bytes)));
    }
    for (name, what) in
        [("vocab.json", "the tokens"), ("merges.txt", "the merges of tokens"), ("compile.sh", "compiles the packages")]
    {
        let bytes = files.iter().filter(|file| file.file == name).map(|file| file.bytes).sum();
        line(&format!("| `{name}` | {what} | {} |", number::size(bytes)));
    }
    let all: u64 = files.iter().map(|file| file.bytes).sum();
    line(&format!("| all | | {} ({} bytes) |\n", number::size(all), number::count(all)));
    if options.chunked {
        line(
            "The UNet is in two packages, so that each is small enough for a phone; Swift looks for them before it looks for \
             one. The first passes its results on to the second, and each weight is in one of them.\n",
        );
    }
    let vae = if model.vae.force_upcast { "fp32" } else { "fp16" };
    let networks = networks(model)?;
    let compressed: Vec<String> = networks.iter().filter_map(NetworkWeights::container).map(compressed_network).collect();
    line(&match compressed.as_slice() {
        [] => format!("Text encoders and VAE have weights in fp16; the encoders compute in fp16, the VAE in {vae}.\n"),
        names => format!(
            "Compressed beside the UNet: {}. What is not compressed of text encoders and VAE has weights in fp16; the encoders compute \
             in fp16, the VAE in {vae}.\n",
            names.join(", ")
        ),
    });

    line("## What Apple's pipeline does otherwise than diffusers\n");
    line("- It tells the UNet an original and a target size of 1024 x 1024, unless an app sets `originalSize` and `targetSize`.");
    if model.force_zeros_for_empty_prompt {
        line("- It encodes an empty negative prompt; this model's own pipeline takes zeros for it.");
    }
    line("- Its samplers are PNDM and DPM-Solver++ (2M); 50 steps with a guidance of 7.5 by default.");
    if refiner.is_some() {
        line("- The refiner takes the last fifth of the steps, unless an app sets `refinerStart`.");
    }
    if apple_noise(*weights, &model.scheduler)?.output.is_some_and(|output| output.predicted != Predicted::Noise) {
        let prediction = model.scheduler.prediction();
        line(&format!(
            "- It takes the UNet's output for noise. This UNet predicts `{prediction}`, of which the package makes noise."
        ));
    }
    line(
        "- Its tokenizer works on characters and splits texts at spaces alone: texts in other than Latin letters, and punctuation \
         that follows a word without a space, become other tokens.\n",
    );
    if !warnings.is_empty() {
        line("## To set and to know in an app\n");
        warnings.iter().for_each(|warning| line(&format!("- {warning}.")));
        line("");
    }

    line("## Recipe\n");
    let mut unets = vec![("UNet", *weights)];
    unets.extend(refiner.map(|refiner| ("refiner's UNet", refiner.weights)));
    for (what, weights) in &unets {
        match weights {
            UnetWeights::Container(container) => {
                line(&format!("{} weights of the {what} are compressed:\n", number::count(container.layers().count() as u64)));
                line(&format!("```json\n{:#}\n```\n", container.info().recipe));
            }
            UnetWeights::Dense { .. } => line(&format!("The {what} is not compressed: its weights are fp16.\n")),
        }
    }
    for container in networks.iter().filter_map(NetworkWeights::container) {
        line(&format!("The {}:\n\n```json\n{:#}\n```\n", container.info().network, container.info().recipe));
    }
    let unets = unets.iter().filter_map(|(_, weights)| match weights {
        UnetWeights::Container(container) => Some(*container),
        UnetWeights::Dense { .. } => None,
    });
    let has_vectors =
        |container: &Container| container.layers().any(|layer| layer.vector_length.is_some_and(|length| length > 1));
    if unets.chain(networks.iter().filter_map(NetworkWeights::container)).any(has_vectors) {
        line(&format!("Palettes of vectors need {VECTORS_NEED}.\n"));
    }

    line("## Licence\n");
    line(&match (options.label.license.as_str(), stated_licence(model)?) {
        ("", Some(stated)) => format!("The model's files state the licence `{stated}`; it holds for these packages too.\n"),
        ("", None) => "The model's files state no licence: ask the publisher of the model.\n".to_owned(),
        (given, _) => format!("{given}\n"),
    });

    line("## Sources\n\n| file | bytes | SHA-256 |\n|---|---:|---|");
    sources(*weights, model)?.iter().for_each(|source| line(&row(source)));
    if let Some(refiner) = refiner {
        line("\n## Sources of the refiner\n\n| file | bytes | SHA-256 |\n|---|---:|---|");
        unet_sources(refiner.weights, refiner.model)?.iter().for_each(|source| line(&row(source)));
    }
    line("\n## Hashes\n\n| file | bytes | SHA-256 |\n|---|---:|---|");
    files.iter().for_each(|file| line(&row(file)));
    Ok(card)
}

/// The networks beside the UNet, as the packages have them.
fn networks(model: &PipelineFolder) -> Result<Vec<NetworkWeights>> {
    let text = model.text_encoders.iter().map(|part| model.text_network(part));
    text.chain([model.vae_network()]).collect()
}

/// A compressed network, with its mean of bits.
fn compressed_network(container: &Container) -> String {
    let elements = |shape: &[i64]| shape.iter().product::<i64>() as f64;
    let (bits, all) = container.layers().fold((0.0, 0.0), |(bits, all), layer| {
        let elements = elements(&layer.shape);
        (bits + elements * layer.bits_per_weight, all + elements)
    });
    format!("{} ({:.2} bits a weight)", container.info().network, if all > 0.0 { bits / all } else { 16.0 })
}

/// A file in a table. One from outside of the model's folder is named by its path, of which the
/// card has the name alone: it is given to others.
fn row(file: &SourceFile) -> String {
    let SourceFile { bytes, file, scale, sha256 } = file;
    let path = Path::new(file);
    let file = if path.is_absolute() { file_name(path).to_string_lossy().into_owned() } else { file.clone() };
    let scale = scale.map_or(String::new(), |scale| format!(", a LoRA times {scale}"));
    format!("| `{file}`{scale} | {bytes} | `{sha256}` |")
}

/// The files that the packages were made from, each once, sorted by name.
fn sources(weights: UnetWeights, model: &PipelineFolder) -> Result<Vec<SourceFile>> {
    let mut sources: Vec<SourceFile> = [unet_sources(weights, model)?, model.prompt_files()?, model.vae_files()?].concat();
    for network in networks(model)? {
        sources.extend(network.container().into_iter().flat_map(|container| container.info().sources.clone()));
    }
    sources.sort_by(|a, b| (&a.file, &a.sha256).cmp(&(&b.file, &b.sha256)));
    sources.dedup_by(|a, b| a.file == b.file && a.sha256 == b.sha256);
    Ok(sources)
}

/// The files that a UNet's package was made from.
fn unet_sources(weights: UnetWeights, model: &PipelineFolder) -> Result<Vec<SourceFile>> {
    match weights {
        UnetWeights::Container(container) => Ok(container.info().sources.clone()),
        UnetWeights::Dense { .. } => model.unet_files(),
    }
}
