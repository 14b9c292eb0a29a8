//! What people give in the place of a model, by mistake or as their downloads left it. Each mistake
//! is named with its remedy, before any work.

use std::path::Path;

use safetensors::{Dtype, SafeTensors, serialize_to_file};

use crate::squeeze::Squeeze;
use crate::support::{copy, tiny};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// A copy of the small model in `folder`.
fn model(folder: &Path) -> std::path::PathBuf {
    let model = folder.join("model");
    copy(tiny(), &model);
    model
}

/// Writes the tensors of the file `path` again, under the names and with the bytes that `change`
/// makes.
fn rewrite(path: &Path, change: impl Fn(&str, &mut Vec<u8>) -> Option<String>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .iter()
        .filter_map(|(name, view)| {
            let mut data = view.data().to_vec();
            Some((change(name, &mut data)?, view.dtype(), view.shape().to_vec(), data))
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, path).unwrap();
}

#[test]
fn downloads_that_are_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 5135149760\n", "a".repeat(64));
    let page = "<!DOCTYPE html><html><title>401</title></html>\n".repeat(3);
    let contents: [(&[u8], &[&str]); 4] = [
        (pointer.as_bytes(), &["pointer of git-lfs", "git lfs pull", "hf download"]),
        (page.as_bytes(), &["web page", "hf auth login"]),
        (b"GGUF\x03\0\0\0\0\0\0\0", &["GGUF", "take the fp16 safetensors"]),
        (b"PK\x03\x04\x14\0\0\0\0\0", &["pickle", "save_pretrained"]),
    ];
    for (content, words) in contents {
        std::fs::write(model.join(UNET), content).unwrap();
        Squeeze::new("inspect").arg(&model).is_refused(&[&[UNET], words].concat());
    }
    for content in [pointer.as_str(), page.as_str()] {
        std::fs::write(model.join("unet/config.json"), content).unwrap();
        Squeeze::new("inspect").arg(&model).is_refused(&["unet/config.json: is a"]);
    }
}

#[cfg(unix)]
#[test]
fn links_whose_target_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    for part in [UNET, "unet/config.json", "model_index.json"] {
        std::fs::remove_file(model.join(part)).unwrap();
        std::os::unix::fs::symlink("../../../blobs/0123abcd", model.join(part)).unwrap();
        let said = Squeeze::new("inspect").arg(&model);
        said.is_refused(&[part, "is a link to ../../../blobs/0123abcd, which does not exist", "cp -rL"]);
    }
}

#[test]
fn names_of_wrapped_networks() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let unet = model.join(UNET);
    let original = std::fs::read(&unet).unwrap();
    for prefix in ["_orig_mod.", "module.", "model.diffusion_model."] {
        std::fs::write(&unet, &original).unwrap();
        rewrite(&unet, |name, _| Some(format!("{prefix}{name}")));
        let begin = format!("all names of tensors begin with `{prefix}`");
        Squeeze::new("inspect").arg(&model).is_refused(&[&begin, "save the network inside the wrapper"]);
    }
}

#[test]
fn names_and_folders_that_are_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &[&str]| {
        Squeeze::new("inspect").arg(path).is_refused(words);
        Squeeze::new("compress").config("dense-4bit").model(path).out(folder.path().join("out")).is_refused(words);
    };
    let repository = Path::new("stabilityai/stable-diffusion-xl-base-1.0");
    refused(repository, &["hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir DIR"]);
    refused(
        &folder.path().join("nothing.safetensors"),
        &["there is no", "nothing.safetensors; a model is a folder", "single-file checkpoint"],
    );
    let cache = folder.path().join("models--owner--name");
    let snapshot = cache.join("snapshots/abc");
    std::fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    refused(&cache, &["models--owner--name/model_index.json: No such file", "a model is a folder"]);
    copy(tiny(), &snapshot);
    refused(&cache, &["is the hub's cache of a model; name the snapshot in it", "snapshots/abc"]);
    // Of a UNet alone, a package can be written, and it can be compressed without calibration; all
    // else needs the pipeline.
    let package = folder.path().join("unet.mlpackage");
    Squeeze::new("export").arg(tiny().join("unet")).with("--to", "coreml").out(&package).succeeds();
    let whole = folder.path().join("whole.mlpackage");
    Squeeze::new("export").arg(tiny()).with("--to", "coreml").out(&whole).succeeds();
    let weights = |package: &Path| std::fs::read(package.join("Data/com.apple.CoreML/weights/weight.bin")).unwrap();
    assert!(weights(&package) == weights(&whole));
    let alone = Squeeze::new("generate").model(tiny().join("unet")).args(["--prompt", "a cat"]);
    alone.with("-o", folder.path().join("x.png")).is_refused(&["is one part of the model"]);
}

/// A VAE that cannot be read is found before the prompt is encoded; so is a UNet.
#[test]
fn parts_that_cannot_be_read_are_found_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let vae = model.join("vae/diffusion_pytorch_model.safetensors");
    rewrite(&vae, |name, _| (name != "decoder.conv_in.weight").then(|| name.to_owned()));
    let draw = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--progress", "json"]);
    let refused = draw.with("-o", folder.path().join("x.png")).is_refused(&["decoder.conv_in.weight", "1 missing"]);
    assert!(!refused.text().contains("\"begin\""), "{refused}");
    let config = folder.path().join("one.yaml");
    std::fs::write(&config, "palettize: {}\n").unwrap();
    let judge = folder.path().join("judge.txt");
    std::fs::write(&judge, "a cat\n").unwrap();
    let compare = Squeeze::new("compare").arg(&config).model(&model).with("--judge", &judge).args(["--progress", "json"]);
    let refused = compare.out(folder.path().join("compared")).is_refused(&["decoder.conv_in.weight"]);
    assert!(!refused.text().contains("\"layer\""), "{refused}");
}

/// Latents that become NaN because of a weight are blamed on the weight.
#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let layer = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight";
    rewrite(&model.join(UNET), |name, data| {
        if name == layer {
            // The exponent and mantissa of all ones are NaN in every floating-point dtype.
            data[4..8].fill(0xff);
        }
        Some(name.to_owned())
    });
    let words = [layer, "has NaN or infinite values (first at index"];
    let draw = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "1"]);
    draw.with("-o", folder.path().join("x.png")).is_refused(&words);
    Squeeze::new("compress").config("dense-4bit").model(&model).out(folder.path().join("out")).is_refused(&words);
}
