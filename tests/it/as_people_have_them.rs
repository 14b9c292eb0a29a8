//! Models, configs and prompts as users have them: from other programs, other systems and the cache
//! of a hub.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sdxl_squeeze::config::{RunConfig, read_prompts};
use sdxl_squeeze::container::Container;
use sdxl_squeeze::pipeline::verify;

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo, tiny};

/// The tensors of a file by name: dtype, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Changes the tensors of a safetensors file.
fn edit(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let whole = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(path, whole).unwrap();
}

/// The latents of the picture that `model` draws in one step.
fn picture(model: &Path, out: &Path) -> Vec<u8> {
    let latents = out.join("latents.safetensors");
    let png = out.join("x.png");
    let run = Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "1", "--overwrite"]);
    run.with("--latents-out", &latents).with("-o", &png).succeeds();
    std::fs::read(latents).unwrap()
}

/// transformers before 4.31 stored the positions 0 to 76 with the weights, as 64-bit integers.
#[test]
fn text_encoders_with_their_positions_stored() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    for encoder in ["text_encoder", "text_encoder_2"] {
        edit(&model.join(encoder).join("model.safetensors"), |tensors| {
            let positions = (0..77i64).flat_map(i64::to_le_bytes).collect();
            tensors.insert("text_model.embeddings.position_ids".into(), (Dtype::I64, vec![1, 77], positions));
        });
    }
    Squeeze::new("inspect").arg("--summary").arg(&model).succeeds();
    assert!(picture(&model, folder.path()) == picture(tiny(), folder.path()));
}

/// In the cache of the Hugging Face hub, the files in `snapshots/REVISION/` are relative links to
/// `blobs/HASH`.
#[cfg(unix)]
#[test]
fn a_snapshot_of_links_into_a_folder_of_blobs() {
    fn link(from: &Path, snapshot: &Path, blobs: &Path, depth: usize) {
        std::fs::create_dir_all(snapshot).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = snapshot.join(path.file_name().unwrap());
            if path.is_dir() {
                link(&path, &target, blobs, depth + 1);
            } else {
                let blob = format!("{:04}", std::fs::read_dir(blobs).unwrap().count());
                std::fs::copy(&path, blobs.join(&blob)).unwrap();
                std::os::unix::fs::symlink(Path::new(&"../".repeat(depth)).join("blobs").join(blob), target).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (folder.path().join("models--x/blobs"), folder.path().join("models--x/snapshots/0123abcd"));
    std::fs::create_dir_all(&blobs).unwrap();
    link(tiny(), &snapshot, &blobs, 2);
    assert!(picture(&snapshot, folder.path()) == picture(tiny(), folder.path()));

    // The exported pipeline does not depend on the snapshot that it was exported from.
    let out = folder.path().join("out");
    Squeeze::new("compress").config("dense-4bit").model(&snapshot).out(&out).succeeds();
    let (container, dense) = (out.join("unet.squeezed.safetensors"), folder.path().join("dense"));
    Squeeze::new("export").arg(&container).with("--to", "diffusers").model(&snapshot).out(&dense).succeeds();
    std::fs::remove_dir_all(folder.path().join("models--x")).unwrap();
    picture(&dense, folder.path());
}

/// Notepad writes a byte-order mark and ends lines with CR and LF.
#[test]
fn configs_and_prompts_from_windows() {
    let folder = tempfile::tempdir().unwrap();
    let windows = |path: &Path| {
        let there = std::fs::read_to_string(path).unwrap();
        let here = folder.path().join(path.file_name().unwrap());
        std::fs::write(&here, format!("\u{feff}{}", there.replace('\n', "\r\n"))).unwrap();
        here
    };
    let mut configs = 0;
    for entry in std::fs::read_dir(repo("configs")).unwrap().chain(std::fs::read_dir(repo("configs/emoji")).unwrap()) {
        let path = entry.unwrap().path();
        if path.extension() == Some("yaml".as_ref()) {
            assert_eq!(RunConfig::read(&windows(&path)).unwrap(), RunConfig::read(&path).unwrap(), "{}", path.display());
            configs += 1;
        }
    }
    assert!(configs > 10);
    for name in ["calibration/emoji.txt", "calibration/captions.txt"] {
        let prompts = read_prompts(&windows(&repo(name))).unwrap();
        assert_eq!(prompts, read_prompts(&repo(name)).unwrap(), "{name}");
        assert!(prompts.iter().all(|prompt| !prompt.contains(['\r', '\u{feff}'])));
    }
}

/// Latents of 72 pixels are 18 wide. The UNet halves them to 9 and then to 5, so stages have odd
/// sizes.
#[test]
fn pictures_of_72_and_96_pixels() {
    let (folder, model) = (tempfile::tempdir().unwrap(), emoji());
    for (height, width) in [("72", "72"), ("96", "96"), ("72", "96"), ("96", "72")] {
        let png = folder.path().join("x.png");
        let run = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "1", "--overwrite"]);
        run.args(["--height", height, "--width", width]).with("-o", &png).succeeds();
        let bytes = std::fs::read(&png).unwrap();
        let side = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()).to_string();
        assert_eq!((side(20), side(16)), (height.to_owned(), width.to_owned()));
    }
}

/// Weights that were saved again in shards beside the single file of before. diffusers (UNet and
/// VAE) reads the shards, transformers (text encoders) the single file; what is not read is named.
#[test]
fn weights_that_are_there_twice_are_read_as_diffusers_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    for (part, stem, reads_shards) in [
        ("unet", "diffusion_pytorch_model", true),
        ("vae", "diffusion_pytorch_model", true),
        ("text_encoder", "model", false),
        ("text_encoder_2", "model", false),
    ] {
        std::fs::remove_dir_all(&model).ok();
        copy(tiny(), &model);
        let whole = model.join(part).join(format!("{stem}.safetensors"));
        let shard = model.join(part).join(format!("{stem}-00001-of-00001.safetensors"));
        std::fs::copy(&whole, &shard).unwrap();
        let mut map = serde_json::Map::new();
        edit(&shard, |tensors| map.extend(tensors.keys().map(|name| (name.clone(), shard.file_name().unwrap().to_str().into()))));
        let index = model.join(part).join(format!("{stem}.safetensors.index.json"));
        std::fs::write(&index, serde_json::json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
        let stale = if reads_shards { &whole } else { &shard };
        edit(stale, |tensors| {
            tensors.values_mut().filter(|(dtype, ..)| *dtype == Dtype::F16).for_each(|(_, _, data)| data.fill(0));
        });
        let run = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "1", "--overwrite"]);
        let latents = folder.path().join("latents.safetensors");
        let said = run.with("--latents-out", &latents).with("-o", folder.path().join("x.png")).succeeds();
        let (read, left) = (format!("{stem}.safetensors.index.json"), format!("{stem}.safetensors"));
        let (read, left) = if reads_shards { (read, left) } else { (left, read) };
        said.says(&["the weights are there twice", &format!("reads {read} and not {left}")]);
        assert_eq!(said.text().matches("there twice").count(), 1, "{said}");
        assert!(std::fs::read(&latents).unwrap() == picture(tiny(), folder.path()), "{part}");
    }
}

/// What diffusers reads over: marks of single files and averages among the UNet's tensors, and
/// lists that say the same for each level.
#[test]
fn unets_with_surplus_tensors_and_lists_of_equal_values() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let expected = picture(tiny(), folder.path());
    copy(tiny(), &model);
    edit(&model.join("unet/diffusion_pytorch_model.safetensors"), |tensors| {
        for name in ["v_pred", "ztsnr"] {
            tensors.insert(name.into(), (Dtype::F32, vec![0], Vec::new()));
        }
        tensors.insert("model_ema.decay".into(), (Dtype::I64, vec![], vec![1; 8]));
    });
    let path = model.join("unet/config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let levels = config["down_block_types"].as_array().unwrap().len();
    let width = config["cross_attention_dim"].clone();
    config["only_cross_attention"] = vec![false; levels].into();
    config["cross_attention_dim"] = vec![width; levels].into();
    std::fs::write(&path, config.to_string()).unwrap();
    assert!(picture(&model, folder.path()) == expected);
    let out = folder.path().join("out");
    let said = Squeeze::new("compress").config("dense-4bit").model(&model).out(&out).succeeds();
    said.says(&["3 tensors are not read (model_ema.decay, v_pred, ztsnr)"]);
    verify(&out.join("unet.squeezed.safetensors")).unwrap();

    let refused = |key: &str, value: serde_json::Value, parts: &[&str]| {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        Squeeze::new("inspect").arg(&model).is_refused(parts);
    };
    refused("only_cross_attention", vec![true; levels].into(), &["only_cross_attention", "is not supported"]);
    refused("cross_attention_dim", (1..=levels).collect::<Vec<_>>().into(), &["cross_attention_dim", "the same one for each"]);
}

/// SDXL's refiner is trained for the last fifth of the timesteps. diffusers runs it there with
/// `denoising_start=0.8`.
#[test]
fn refiners_are_calibrated_where_they_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let (out, samples) = (folder.path().join("out"), folder.path().join("samples.safetensors"));
    let run = |model: &Path, flags: &[&str]| {
        std::fs::remove_dir_all(&out).ok();
        std::fs::remove_file(&samples).ok();
        let run = Squeeze::new("compress").config("emoji/tutorial-s50-4bit-gs16").model(model).out(&out).args(flags);
        let said = run.samples(8, 20).with("--samples-out", &samples).succeeds();
        let timesteps = Vec::<f64>::try_from(&crate::support::tensors(&samples)["timestep"].to_kind(tch::Kind::Double)).unwrap();
        (timesteps, said)
    };
    let refiner = repo("tests/golden/refiner-like");
    let (timesteps, said) = run(&refiner, &[]);
    assert!(timesteps.len() == 8 && timesteps.iter().all(|timestep| *timestep < 200.0), "{timesteps:?}");
    said.says(&["samples are taken after the share 0.8 of the timesteps (`denoising_start`): of 4 of the 20 calls"]);
    let (timesteps, said) = run(&refiner, &["--denoising-start", "0"]);
    assert!(timesteps.iter().any(|timestep| *timestep > 800.0), "{timesteps:?}");
    assert!(!said.text().contains("denoising_start"), "{said}");
    let (timesteps, _) = run(tiny(), &["--denoising-start", "0.5"]);
    assert!(timesteps.iter().all(|timestep| *timestep < 500.0), "{timesteps:?}");
    let (timesteps, _) = run(tiny(), &[]);
    assert!(timesteps.iter().any(|timestep| *timestep > 800.0), "{timesteps:?}");
    let config = repo("configs/emoji/tutorial-s50-4bit-gs16.yaml");
    let plan = Squeeze::new("plan").arg(&config).model(&refiner).args(["--steps", "20"]).succeeds();
    plan.says(&["of whose calls the last 4 give samples (denoising_start 0.8)"]);
    let late = Squeeze::new("plan").arg(&config).model(&refiner).args(["--denoising-start", "0.999", "--steps", "2"]);
    late.is_refused(&["none of 2 steps is after the share 0.999 of `denoising_start`", "more steps"]);
}

/// The joint solver leaves palettes along input channels and scales to the palettizer: plan, log
/// and report say it, also for convolutions, and the run is no worse than with the sequential
/// solver.
#[test]
fn plan_and_log_name_what_is_not_solved_jointly() {
    let folder = tempfile::tempdir().unwrap();
    let said = "`solver: joint` does not find palettes along input channels (`channel_axis: 1`) or with scales";
    for keys in ["channel_axis: 1", "enable_per_channel_scale: true"] {
        let config = folder.path().join("config.yaml");
        let groups = "n_bits: 3, granularity: per_grouped_channel, group_size: 8";
        std::fs::write(
            &config,
            format!("palettize:\n  on_misfit: dense\n  weight_threshold: 0\n  global_config: {{{groups}, {keys}}}\n"),
        )
        .unwrap();
        Squeeze::new("plan").arg(&config).model(tiny()).succeeds().says(&[said]);
        let outputs = ["joint", "sequential"].map(|solver| {
            let out = folder.path().join(solver);
            std::fs::remove_dir_all(&out).ok();
            let run = Squeeze::new("compress").config_file(&config).model(tiny()).out(&out).samples(16, 4);
            let ended = run.with("--solver", solver).with("--target", "current").succeeds();
            assert_eq!(ended.text().contains(said), solver == "joint", "{ended}");
            verify(&out.join("unet.squeezed.safetensors")).unwrap();
            let report = crate::support::report(&out);
            let layers = report["layers"].as_array().unwrap().clone();
            let is_convolution = |layer: &serde_json::Value| layer["name"].as_str().unwrap().ends_with(".conv1");
            assert!(layers.iter().any(is_convolution), "convolutions too");
            let notes = report["notes"].as_array().unwrap().iter();
            let notes = notes.filter(|note| note.as_str().unwrap().contains("are made after pruning, not jointly")).count();
            assert_eq!(notes, if solver == "joint" { layers.len() } else { 0 });
            layers.iter().map(|layer| layer["errors"]["weight"].as_f64().unwrap()).sum::<f64>()
        });
        // Without pruning the weights are those of the sequential solver.
        assert!(outputs[0] <= 1.0001 * outputs[1], "{keys}: {outputs:?}");
    }
}

/// What a UNet predicts is in its container and in its package, for whoever samples with them.
#[test]
fn the_prediction_type_is_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    let path = model.join("scheduler/scheduler_config.json");
    for prediction in ["epsilon", "v_prediction", "sample"] {
        let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config["prediction_type"] = prediction.into();
        std::fs::write(&path, config.to_string()).unwrap();
        let out = folder.path().join(prediction);
        Squeeze::new("compress").config("dense-4bit").model(&model).out(&out).succeeds();
        let container = out.join("unet.squeezed.safetensors");
        assert_eq!(Container::open(&container).unwrap().info().prediction_type.as_deref(), Some(prediction));
        Squeeze::new("inspect").arg(&container).succeeds().says(&[&format!("predicts {prediction}")]);
        for source in [&container, &model] {
            let package = folder.path().join("unet.mlpackage");
            std::fs::remove_dir_all(&package).ok();
            Squeeze::new("export").arg(source).with("--to", "coreml").out(&package).succeeds();
            let program = std::fs::read(package.join("Data/com.apple.CoreML/model.mlmodel")).unwrap();
            let key = b"sdxl-squeeze.prediction_type";
            let at = program.windows(key.len()).position(|window| window == key).expect("the key is there") + key.len();
            // A tag and the length stand between key and value.
            assert_eq!(&program[at + 2..at + 2 + prediction.len()], prediction.as_bytes());
        }
        let package = folder.path().join("apple.mlpackage");
        std::fs::remove_dir_all(&package).ok();
        let said = Squeeze::new("export").arg(&container).with("--to", "coreml").with("--io", "apple").out(&package).succeeds();
        if prediction == "epsilon" {
            assert!(!said.text().contains("apple-scheduler"), "{said}");
        } else {
            said.says(&[&format!("apple-scheduler: the model predicts `{prediction}`, not noise"), "with --model"]);
        }
    }
}

/// A UNet without its pipeline does for a run that needs no calibration: the container has the
/// tensors of the whole pipeline's, and does not record what the UNet predicts.
#[test]
fn a_unet_alone_does_where_nothing_is_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("my-unet");
    copy(&tiny().join("unet"), &alone);
    let compressed = |model: &Path, out: &str| {
        let out = folder.path().join(out);
        let said = Squeeze::new("compress").config("dense-4bit").model(model).out(&out).succeeds();
        (out.join("unet.squeezed.safetensors"), said)
    };
    let ((whole, _), (own, said)) = (compressed(tiny(), "whole"), compressed(&alone, "own"));
    said.says(&["my-unet is a UNet alone, without the sampler's config that says what the UNet predicts"]);
    let notes = crate::support::report(own.parent().unwrap())["notes"].to_string();
    assert!(notes.contains("is a UNet alone"), "{notes}");
    verify(&own).unwrap();
    let tensors = |path: &Path| -> Tensors {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        file.tensors().into_iter().map(tensor).collect()
    };
    assert!(tensors(&own) == tensors(&whole));
    let [whole, opened] = [&whole, &own].map(|path| Container::open(path).unwrap());
    assert_eq!(opened.info().sources, whole.info().sources);
    assert_eq!(opened.info().config, whole.info().config);
    assert_eq!((opened.info().prediction_type.as_deref(), whole.info().prediction_type.as_deref()), (None, Some("epsilon")));
    // With its pipeline the container draws.
    let png = folder.path().join("x.png");
    let draw = Squeeze::new("generate").model(tiny()).with("--unet", &own).args(["--prompt", "a cat", "--steps", "1"]);
    draw.with("-o", &png).succeeds();
    let planned = |model: &Path| {
        let plan = Squeeze::new("plan").arg(repo("configs/dense-4bit.yaml")).model(model).arg("--json").succeeds();
        let plans: serde_json::Value = serde_json::from_str(&plan.stdout).unwrap();
        plans[0]["plan"]["payload_bytes"].clone()
    };
    assert_eq!(planned(&alone), planned(tiny()));
}

/// What needs the pipeline around a UNet is refused before any work.
#[test]
fn what_needs_the_pipeline_is_refused_for_a_unet_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (alone, out) = (folder.path().join("my-unet"), folder.path().join("out"));
    copy(&tiny().join("unet"), &alone);
    let compress = || Squeeze::new("compress").model(&alone).out(&out);
    let gives = "my-unet seems to be one part of a model, without the folder around it";
    let calibrated = ["calibration needs the pipeline and not its UNet alone", gives];
    compress().config("emoji/tutorial-s50-4bit-gs16").is_refused(&calibrated);
    Squeeze::new("plan").arg(repo("configs/emoji/tutorial-s50-4bit-gs16.yaml")).model(&alone).is_refused(&calibrated);
    compress().with("--size", "1MB").is_refused(&["a budget needs the pipeline", gives]);
    compress().config("squeeze-text-vae").is_refused(&["compression of text encoders and VAE needs the pipeline", gives]);
    let dense = || compress().config("dense-4bit");
    dense().with("--samples-out", folder.path().join("s.safetensors")).is_refused(&["--samples-out needs the pipeline", gives]);
    dense().with("--vae", tiny().join("vae")).is_refused(&["another VAE needs the pipeline", gives]);
    assert!(!out.exists());
    // The folder of another part is no UNet.
    let vae = Squeeze::new("compress").config("dense-4bit").model(tiny().join("vae")).out(&out);
    vae.is_refused(&["vae is one part of the model"]);
}

/// Tensors of one file in fp16, fp32 and fp64, all of which hold fp16's values.
#[test]
fn tensors_of_several_dtypes_in_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    for part in
        ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    {
        edit(&model.join(part), |tensors| {
            let halves = tensors.values_mut().filter(|(dtype, ..)| *dtype == Dtype::F16);
            for (number, (dtype, _, data)) in halves.enumerate() {
                let values = data.chunks_exact(2).map(|half| half::f16::from_le_bytes([half[0], half[1]]));
                match number % 3 {
                    0 => (*dtype, *data) = (Dtype::F32, values.flat_map(|value| value.to_f32().to_le_bytes()).collect()),
                    1 => (*dtype, *data) = (Dtype::F64, values.flat_map(|value| value.to_f64().to_le_bytes()).collect()),
                    _ => {}
                }
            }
        });
    }
    assert!(picture(&model, folder.path()) == picture(tiny(), folder.path()));
}

/// Sets the elements that `which` picks to bytes that are zero except for the last one, which is
/// `last`.
fn fill(tensors: &mut Tensors, name: &str, last: u8, which: impl Fn(usize) -> bool) {
    let (_, shape, data) = tensors.get_mut(name).unwrap_or_else(|| panic!("there is no {name}"));
    let size = data.len() / shape.iter().product::<usize>();
    for (_, element) in data.chunks_mut(size).enumerate().filter(|(at, _)| which(*at)) {
        element.fill(0);
        element[size - 1] = last;
    }
}

#[test]
fn layers_of_zeros_dead_inputs_and_negative_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    let block = "down_blocks.1.attentions.0.transformer_blocks.0";
    let (zeros, negative) = (format!("{block}.attn1.to_q.weight"), format!("{block}.attn2.to_out.0.weight"));
    edit(&model.join("unet/diffusion_pytorch_model.safetensors"), |tensors| {
        fill(tensors, &zeros, 0, |_| true);
        fill(tensors, &negative, 0x80, |at| at % 2 == 0);
        // The first half of the rows makes the states that the gates are multiplied with. As half
        // of these rows are zero, half of the inputs of `ff.net.2` are always zero.
        let rows = tensors[&format!("{block}.ff.net.0.proj.weight")].1.clone();
        fill(tensors, &format!("{block}.ff.net.0.proj.weight"), 0, |at| at / rows[1] < rows[0] / 4);
        fill(tensors, &format!("{block}.ff.net.0.proj.bias"), 0, |at| at < rows[0] / 4);
    });
    for config in ["emoji/tutorial-s50-4bit-gs16", "emoji/squeeze-s50-4bit-gs16"] {
        let out = folder.path().join(config);
        Squeeze::new("compress").config(config).model(&model).out(&out).samples(4, 3).succeeds();
        let path = out.join("unet.squeezed.safetensors");
        verify(&path).unwrap();
        let container = Container::open(&path).unwrap();
        assert!(container.decode(&zeros).unwrap().iter().all(|value| value.to_f32() == 0.0), "{config}");
        // Pruned elements are stored as +0, even if they were -0.
        let weight = container.weight(&negative).unwrap();
        let (mask, dense) = (weight.mask.as_ref().unwrap(), weight.decode().unwrap());
        assert!(dense.iter().enumerate().all(|(at, value)| mask.get(at) || value.to_bits() == 0));
        for layer in container.layers() {
            assert!(container.decode(&layer.name).unwrap().iter().all(|value| value.is_finite()), "{}", layer.name);
        }
        picture(&model, folder.path());
    }
}
