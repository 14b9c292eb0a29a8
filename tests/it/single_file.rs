//! Single-file checkpoints: the golden pipelines and the bundled model under LDM names.
//!
//! `tests/golden/single-file/*.json` say how diffusers folders are stored in single files, and were
//! checked with diffusers' `from_single_file`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::inspect::inspect;
use sdxl_squeeze::model::ldm::{Names, SingleFile};
use sdxl_squeeze::model::text::{ClipText, TextConfig};
use sdxl_squeeze::model::unet::{Depth, MidBlock, UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder};
use sdxl_squeeze::synth::Preset;
use serde_json::{Map, Value, json};

use crate::pipelines::computes_the_reference_of;
use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, relative_error, repo, tensors};

/// A file's tensors: dtype, shape, bytes.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

pub(crate) fn write(tensors: &Tensors, path: &Path) {
    let view = |(dtype, shape, data): &'_ (Dtype, Vec<usize>, Vec<u8>)| (*dtype, shape.clone(), data.clone());
    let owned: Vec<_> = tensors.iter().map(|(name, tensor)| (name, view(tensor))).collect();
    let views = owned.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// The tensors of a folder as a single file, by the notes that Python left.
fn as_single_file(folder: &Path) -> Tensors {
    let name = folder.file_name().unwrap().to_str().unwrap();
    let notes = std::fs::read_to_string(repo(&format!("tests/golden/single-file/{name}.json"))).unwrap();
    let notes: Value = serde_json::from_str(&notes).unwrap();
    let mut parts: BTreeMap<&str, Tensors> = BTreeMap::new();
    for (part, file) in [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "model.safetensors"),
    ] {
        let path = folder.join(part).join(file);
        if path.exists() {
            parts.insert(part, read(&path));
        }
    }
    let find = |name: &str| {
        let (part, name) = name.split_once('/').unwrap();
        // Some files have the prefix of transformers' wrapper, which Python's names may lack.
        let names = [name.to_owned(), format!("text_model.{name}"), name.replacen("text_model.", "", 1)];
        names.iter().find_map(|name| parts[part].get(name)).unwrap_or_else(|| panic!("{part} has no {name}")).clone()
    };
    let mut stored = Tensors::new();
    for (name, entry) in notes["tensors"].as_object().unwrap() {
        let of: Vec<_> = entry["of"].as_array().unwrap().iter().map(|name| find(name.as_str().unwrap())).collect();
        let (dtype, mut shape, _) = of[0].clone();
        let mut data: Vec<u8> = of.iter().flat_map(|(_, _, data)| data.clone()).collect();
        shape[0] *= of.len();
        match entry["as"].as_str() {
            None => {}
            Some("convolution") => shape.extend([1, 1]),
            Some("transposed") => {
                let (rows, columns, size) = (shape[0], shape[1], dtype.bitsize() / 8);
                let element = |row: usize, column: usize| &data[(row * columns + column) * size..][..size];
                let transposed = (0..columns).flat_map(|column| (0..rows).flat_map(move |row| element(row, column)));
                data = transposed.copied().collect();
                shape.reverse();
            }
            Some(other) => panic!("{other}"),
        }
        stored.insert(name.clone(), (dtype, shape, data));
    }
    stored
}

/// A folder's single file, in a folder of its own.
pub(crate) fn made(folder: &Path) -> (tempfile::TempDir, PathBuf) {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("model.safetensors");
    write(&as_single_file(folder), &path);
    (here, path)
}

fn with_base(model: &Path, base: &Path) -> ModelFiles {
    ModelFiles { base: Some(base.to_owned()), ..ModelFiles::of(model) }
}

#[test]
fn single_files_compute_what_diffusers_computes() {
    for root in [emoji(), repo("tests/golden/base-like"), repo("tests/golden/refiner-like")] {
        let (_here, path) = made(&root);
        computes_the_reference_of(&root, &PipelineFolder::open_files(&with_base(&path, &root)).unwrap());
    }
}

/// Every tensor of a container, as it is stored, and all metadata but the sources, the model's path
/// in the recorded config, and the hash of the metadata, which covers both.
fn container(path: &Path) -> (Tensors, BTreeMap<String, String>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata: BTreeMap<String, String> = header.metadata().clone().unwrap().into_iter().collect();
    for key in ["sources", "metadata_sha256"] {
        metadata.remove(key).unwrap();
    }
    let mut recipe: Value = serde_json::from_str(&metadata["recipe"]).unwrap();
    recipe.as_object_mut().unwrap().remove("model").unwrap();
    metadata.insert("recipe".into(), recipe.to_string());
    (read(path), metadata)
}

#[test]
fn the_bundled_model_gives_the_same_container_as_a_file_and_as_a_folder() {
    let root = emoji();
    let (here, path) = made(&root);
    let [one, other] = ["folder", "file"].map(|name| here.path().join(name));
    let run = || Squeeze::new("compress").config("emoji/squeeze-s50-4bit-gs16").samples(4, 3);
    run().model(&root).out(&one).succeeds();
    run().model(&path).with("--base", &root).out(&other).succeeds();
    let [one, other] = [one, other].map(|out| out.join("unet.squeezed.safetensors"));
    let ((tensors, metadata), (again, same)) = (container(&one), container(&other));
    assert!(tensors == again, "the tensors differ");
    let differing: Vec<_> = metadata.keys().filter(|key| metadata.get(*key) != same.get(*key)).collect();
    assert!(differing.is_empty() && metadata.len() == same.len(), "{differing:?} differ");

    // The file is a source once, with its own hash.
    let sources = Container::open(&other).unwrap().info().sources.clone();
    let names: Vec<&str> = sources.iter().map(|source| source.file.as_str()).collect();
    assert_eq!(names, ["unet/config.json", "model.safetensors"]);
    assert_eq!(sources[1], sdxl_squeeze::input::SourceFile::read(&path, "model.safetensors").unwrap());
}

#[test]
fn exported_single_files_are_those_of_python() {
    for root in [emoji(), repo("tests/golden/refiner-like")] {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().join("exported.safetensors");
        Squeeze::new("export").arg(&root).with("--to", "single-file").out(&path).succeeds();
        let (ours, theirs) = (read(&path), as_single_file(&root));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        assert!(ours == theirs, "{}", root.display());

        // From the single file again, and back to a folder.
        let again = here.path().join("again.safetensors");
        let run = Squeeze::new("export").arg(&path).with("--to", "single-file").with("--base", &root);
        run.out(&again).succeeds();
        assert!(read(&again) == theirs);
        let folder = here.path().join("folder");
        let run = Squeeze::new("export").arg(&path).with("--to", "diffusers").with("--base", &root);
        run.out(&folder).succeeds();
        computes_the_reference_of(&root, &PipelineFolder::open(&folder).unwrap());
    }
}

#[test]
fn a_container_becomes_a_single_file_of_its_decoded_weights() {
    let here = tempfile::tempdir().unwrap();
    let (model, run) = (emoji(), here.path().join("run"));
    Squeeze::new("compress").config("dense-4bit").model(&model).out(&run).succeeds();
    let squeezed = run.join("unet.squeezed.safetensors");
    let [whole, alone, folder] = ["whole.safetensors", "alone.safetensors", "folder"].map(|name| here.path().join(name));
    Squeeze::new("export").arg(&squeezed).with("--to", "single-file").model(&model).out(&whole).succeeds();
    Squeeze::new("export").arg(&squeezed).with("--to", "single-file").out(&alone).succeeds();
    Squeeze::new("export").arg(&squeezed).with("--to", "diffusers").model(&model).out(&folder).succeeds();
    let decoded = tensors(&folder.join("unet/diffusion_pytorch_model.safetensors"));
    for path in [&whole, &alone] {
        let pipeline = PipelineFolder::open_files(&with_base(path, &model)).unwrap();
        let weights = pipeline.unet_weights().unwrap();
        let source = weights.source(Placement { kind: tch::Kind::Half, ..Placement::CPU });
        for spec in pipeline.unet.tensors().unwrap() {
            use sdxl_squeeze::checkpoint::TensorSource;
            assert_eq!(source.tensor(&spec.name, &spec.shape).unwrap(), decoded[&spec.name], "{}", spec.name);
        }
    }
    assert!(read(&alone).keys().all(|name| name.starts_with("model.diffusion_model.")));
}

fn generate(model: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "1", "--overwrite"])
}

/// The latents after one step.
fn latents(run: Squeeze, here: &Path) -> Vec<u8> {
    let path = here.join("latents.safetensors");
    run.with("--latents-out", &path).with("-o", here.join("x.png")).succeeds();
    std::fs::read(path).unwrap()
}

/// SSD-1B, KOALA, LCM, inpainting and edit models: the file draws what the folder draws.
#[test]
fn single_files_of_every_architecture_are_their_folders() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    for name in crate::architectures::NAMES {
        let model = crate::architectures::pipeline(name, folder.path());
        Squeeze::new("export").arg(&model).with("--to", "single-file").out(&file).succeeds();
        let draw = |run: Squeeze| {
            // The name of a folder can make its model a few-step one, without guidance.
            let run = run.with("--guidance", "4");
            let run = match name {
                "inpainting-like" => run
                    .with("--image", crate::architectures::golden("image.png"))
                    .with("--mask", crate::architectures::golden("mask.png"))
                    .with("--strength", "1"),
                "edit-like" => run.with("--image", crate::architectures::golden("image.png")),
                _ => run,
            };
            latents(run, folder.path())
        };
        let from_file = draw(generate(&file).with("--base", &model));
        assert!(from_file == draw(generate(&model)), "{name}");
        std::fs::remove_file(&file).unwrap();
    }
    generate(&file).with("--base", emoji()).with("-o", "/dev/null").is_refused(&["cannot read", "model.safetensors"]);
}

/// As LCM-SDXL is published: a UNet under diffusers' names, with a base that is no LCM.
#[test]
fn the_unet_of_an_lcm_runs_as_one_on_a_base_that_is_none() {
    let here = tempfile::tempdir().unwrap();
    let lcm = crate::architectures::pipeline("lcm-like", here.path());
    let unet = lcm.join("unet/diffusion_pytorch_model.safetensors");
    let base = here.path().join("base");
    copy(&lcm, &base);
    let path = base.join("unet/config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(config["time_cond_proj_dim"].take(), json!(16));
    std::fs::write(&path, config.to_string()).unwrap();
    let folder = PipelineFolder::open_files(&with_base(&unet, &base)).unwrap();
    assert_eq!((folder.scheduler.class(), folder.unet.config().time_cond_proj_dim), ("LCMScheduler", Some(16)));
    let draw = |run: Squeeze| {
        let path = here.path().join("latents.safetensors");
        let ended = run
            .with("--prompt", "a cat")
            .arg("--overwrite")
            .with("--latents-out", &path)
            .with("-o", here.path().join("x.png"))
            .succeeds();
        (std::fs::read(path).unwrap(), ended)
    };
    let (drawn, ended) = draw(Squeeze::new("generate").model(&unet).with("--base", &base));
    ended.says(&["4 steps and guidance 8: its UNet is told the guidance scale, as that of an LCM", "4 steps of LCMScheduler"]);
    let flags = ["--scheduler", "lcm", "--steps", "4", "--guidance", "8"];
    assert!(drawn == draw(Squeeze::new("generate").model(&lcm).args(flags)).0);
    // A folder's own sampler is kept, and said not to be LCM's.
    let (_, ended) = draw(Squeeze::new("generate").model(&lcm));
    ended.says(&["an LCM model is usually run with --scheduler lcm (its sampler is EulerDiscreteScheduler)"]);
    // The sampler of a base that is an LCM itself is kept.
    let folder = PipelineFolder::open_files(&with_base(&unet, &lcm)).unwrap();
    assert_eq!(folder.scheduler.class(), "EulerDiscreteScheduler");
}

#[test]
fn surplus_tensors_are_skipped_and_said() {
    let root = repo("tests/golden/base-like");
    let (here, path) = made(&root);
    let expected = latents(generate(&path).with("--base", &root), here.path());
    let mut tensors = as_single_file(&root);
    for name in ["model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "betas", "alphas_cumprod", "denoiser.sigmas"]
    {
        tensors.insert(name.into(), (Dtype::F32, vec![1], vec![0; 4]));
    }
    let positions = (0..77i64).flat_map(i64::to_le_bytes).collect();
    let ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids";
    tensors.insert(ids.into(), (Dtype::I64, vec![1, 77], positions));
    tensors.insert("conditioner.embedders.1.model.logit_scale".into(), (Dtype::F32, vec![], vec![0; 4]));
    tensors.insert("global_step".into(), (Dtype::I64, vec![], vec![0; 8]));
    tensors.insert("somebody.elses".into(), (Dtype::F32, vec![1], vec![0; 4]));
    write(&tensors, &path);
    assert!(latents(generate(&path).with("--base", &root), here.path()) == expected);
    let ended = generate(&path).with("--base", &root).with("-o", here.path().join("x.png")).succeeds();
    ended.says(&["1 tensors of no known part are not read (`somebody.elses`"]);
    let said = Squeeze::new("inspect").arg(&path).succeeds();
    said.says(&[
        "SDXL base; sampler EulerDiscreteScheduler",
        "not read: 2 moving averages of the weights (EMA) (model_ema.decay, ",
        "not read: 4 tables and counters of the training (alphas_cumprod, betas, denoiser.sigmas, global_step)",
        "not read: 1 tensors of no known part (somebody.elses)",
    ]);
}

#[test]
fn what_is_surplus_in_a_part_is_refused_by_name() {
    let root = repo("tests/golden/base-like");
    let (here, path) = made(&root);
    let mut tensors = as_single_file(&root);
    tensors.insert("model.diffusion_model.input_blocks.0.0.offset".into(), (Dtype::F32, vec![1], vec![0; 4]));
    tensors.remove("model.diffusion_model.out.0.bias");
    write(&tensors, &path);
    let run = generate(&path).with("--base", &root).with("-o", here.path().join("x.png"));
    run.is_refused(&["1 missing (conv_norm_out.bias", "1 unknown to this architecture (input_blocks.0.0.offset)"]);
}

#[test]
fn what_a_file_lacks_comes_from_the_base_or_is_named() {
    let root = repo("tests/golden/base-like");
    let (here, whole) = made(&root);
    let expected = latents(generate(&whole).with("--base", &root), here.path());
    let (unet, bare, vae) = ("model.diffusion_model.", here.path().join("bare.safetensors"), here.path().join("vae.safetensors"));
    let only = |prefix: &str, strip: bool| -> Tensors {
        let kept = as_single_file(&root).into_iter().filter(|(name, _)| name.starts_with(prefix));
        kept.map(|(name, tensor)| (if strip { name[prefix.len()..].to_owned() } else { name }, tensor)).collect()
    };
    let path = here.path().join("part.safetensors");
    write(&only(unet, false), &path);
    let missing = "has no text_encoder and no text_encoder_2 and no vae; give what it lacks as --base DIR|FILE";
    generate(&path).with("-o", here.path().join("x.png")).is_refused(&["part.safetensors", missing]);
    assert!(latents(generate(&path).with("--base", &root), here.path()) == expected);
    Squeeze::new("inspect").arg(&path).succeeds().says(&["missing: text_encoder, text_encoder_2, vae", "do not tell"]);
    // A UNet without the prefix, as trainers save it, and under diffusers' names.
    write(&only(unet, true), &bare);
    assert!(latents(generate(&bare).with("--base", &root), here.path()) == expected);
    let diffusers = root.join("unet/diffusion_pytorch_model.safetensors");
    assert!(latents(generate(&diffusers).with("--base", &root), here.path()) == expected);

    // A VAE of its own: without its prefix, as published VAEs are, with other values.
    let mut other = only("first_stage_model.", true);
    let scaled = |(dtype, shape, data): &(Dtype, Vec<usize>, Vec<u8>)| (*dtype, shape.clone(), vec![0; data.len()]);
    let bias = scaled(&other["decoder.conv_out.bias"]);
    let weight = scaled(&other["decoder.conv_out.weight"]);
    other.insert("decoder.conv_out.bias".into(), bias);
    other.insert("decoder.conv_out.weight".into(), weight);
    write(&other, &vae);
    let picture = here.path().join("gray.png");
    generate(&whole).with("--base", &root).with("--vae", &vae).with("-o", &picture).succeeds();
    let mut reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&picture).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert!(pixels[..info.buffer_size()].iter().all(|value| *value == 128 || *value == 127), "a picture of zeros is gray");
    generate(&root).with("--vae", &vae).with("-o", &picture).succeeds();
    generate(&root).with("--vae", root.join("vae")).with("-o", &picture).succeeds();
    generate(&root).with("--vae", &bare).with("-o", &picture).is_refused(&["bare.safetensors", "has no VAE"]);
    generate(&root).with("--base", &root).with("-o", &picture).is_refused(&["is a folder, which has all of its parts"]);
}

#[test]
fn shapes_that_do_not_tell_the_architecture_ask_for_a_base() {
    let (here, path) = made(&repo("tests/golden/base-like"));
    let run = generate(&path).with("-o", here.path().join("x.png"));
    run.is_refused(&["does not tell the UNet's architecture by its shapes", "--base DIR|FILE"]);
}

#[test]
fn other_models_and_other_forms_are_refused_with_the_remedy() {
    let here = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &[&str]| {
        Squeeze::new("inspect").arg(path).is_refused(words);
        generate(path).with("-o", here.path().join("x.png")).is_refused(words);
    };
    let of_bytes = |name: &str, bytes: &[u8], words: &[&str]| {
        let path = here.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        refused(&path, words);
    };
    of_bytes("x.gguf", b"GGUF\x03\0\0\0\0\0\0\0", &["is a GGUF file", "take the fp16 safetensors"]);
    of_bytes("x.ckpt", b"PK\x03\x04\0\0\0\0\0\0", &["is a pickle", "convert it to safetensors"]);
    of_bytes("old.ckpt", b"\x80\x02}q\0\0\0\0\0", &["is a pickle", "convert it to safetensors"]);
    of_bytes("short.safetensors", b"abc", &["not a whole safetensors file"]);

    let unet = "model.diffusion_model.label_emb.0.0.weight";
    let f32s = |names: &[(&str, Vec<usize>)]| -> Tensors {
        let tensor = |shape: &Vec<usize>| (Dtype::F32, shape.clone(), vec![0; 4 * shape.iter().product::<usize>()]);
        names.iter().map(|(name, shape)| ((*name).to_owned(), tensor(shape))).collect()
    };
    let context = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";
    let mut fp8 = f32s(&[]);
    fp8.insert(unet.into(), (Dtype::F8_E4M3, vec![2, 2], vec![0; 4]));
    let mut nf4 = f32s(&[(unet, vec![2, 2])]);
    let state = "model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4";
    nf4.insert(state.into(), (Dtype::U8, vec![4], vec![0; 4]));
    let cases: Vec<(Tensors, &[&str])> = vec![
        (fp8, &["is an fp8 checkpoint", "take the fp16 or bf16 version"]),
        (f32s(&[(unet, vec![2, 2]), ("scaled_fp8", vec![0])]), &["is an fp8 checkpoint"]),
        (f32s(&[(unet, vec![2, 2]), ("model.diffusion_model.out.2.scale_weight", vec![1])]), &["is an fp8 checkpoint"]),
        (nf4, &["is an NF4 or FP4 checkpoint", "take the fp16 version"]),
        (f32s(&[(context, vec![320, 768])]), &["is a Stable Diffusion 1 model", "only the SDXL family is read"]),
        (f32s(&[("cond_stage_model.transformer.x", vec![1])]), &["is a Stable Diffusion 1 model"]),
        (f32s(&[(context, vec![320, 1024])]), &["is a Stable Diffusion 2 model"]),
        (f32s(&[("model.diffusion_model.joint_blocks.0.x", vec![1])]), &["is a Stable Diffusion 3 model"]),
        (f32s(&[("double_blocks.0.img_attn.norm.key_norm.scale", vec![1])]), &["is a Flux model"]),
        (f32s(&[("model.diffusion_model.double_blocks.0.x", vec![1])]), &["is a Flux model"]),
        (f32s(&[("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", vec![1])]), &["is a LoRA", "--lora"]),
        (f32s(&[("control_model.input_blocks.0.0.weight", vec![1])]), &["is a ControlNet"]),
        (
            f32s(&[("model.diffusion_model.down_blocks.0.resnets.0.conv1.weight", vec![1])]),
            &["has a UNet with diffusers' names behind the prefix", "take the prefix `model.diffusion_model.` off", "--base"],
        ),
        (f32s(&[("decoder.conv_in.weight", vec![1])]), &["has a VAE and no UNet", "--vae"]),
        (f32s(&[("text_model.embeddings.token_embedding.weight", vec![1])]), &["has text encoders and no UNet"]),
        (f32s(&[("input_blocks.0.0.weight", vec![1])]), &["has a UNet that is not of the SDXL family"]),
        (f32s(&[("a.b", vec![1])]), &["is no SDXL model", "its first tensor is `a.b`"]),
    ];
    for (number, (tensors, words)) in cases.iter().enumerate() {
        let path = here.path().join(format!("{number}.safetensors"));
        write(tensors, &path);
        refused(&path, words);
    }
    let squeezed = repo("tests/golden/container/unet.squeezed.safetensors");
    generate(&squeezed).with("-o", here.path().join("x.png")).is_refused(&["is a container of this program", "--unet"]);
}

#[test]
fn markers_tell_prediction_and_sampler() {
    let root = repo("tests/golden/base-like");
    let (_here, path) = made(&root);
    let scheduler = |markers: &[(&str, &[f32])], shape: fn(usize) -> Vec<usize>| -> (String, Map<String, Value>) {
        let mut tensors = as_single_file(&root);
        for (name, values) in markers {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.insert((*name).to_owned(), (Dtype::F32, shape(values.len()), bytes));
        }
        write(&tensors, &path);
        let row = inspect(&path).unwrap().checkpoint.unwrap();
        assert!(row.skipped.is_empty());
        (row.family, row.scheduler)
    };
    let list: fn(usize) -> Vec<usize> = |count| vec![count];
    let (family, config) = scheduler(&[], list);
    assert_eq!((family.as_str(), &config["prediction_type"]), ("SDXL base", &json!("epsilon")));
    let (family, config) = scheduler(&[("v_pred", &[]), ("ztsnr", &[])], list);
    assert_eq!(family, "SDXL base, v-prediction with zero terminal SNR");
    let keys = ["_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing"];
    let values = json!(["EulerDiscreteScheduler", "v_prediction", true, "trailing"]);
    assert_eq!(json!(keys.map(|key| &config[key])), values);
    // With a base, the markers decide.
    let folder = PipelineFolder::open_files(&with_base(&path, &root)).unwrap();
    assert_eq!(json!(keys.map(|key| &folder.scheduler.entries()[key])), values);
    let (family, config) = scheduler(&[("v_pred", &[])], list);
    assert_eq!(family, "SDXL base, v-prediction");
    let values = json!(["EulerDiscreteScheduler", "v_prediction", false, "leading"]);
    assert_eq!(json!(keys.map(|key| &config[key])), values);
    let (family, config) = scheduler(&[("edm_mean", &[0.5, 1.5, 2.0, 0.0]), ("edm_std", &[1.0; 4])], list);
    assert_eq!((family.as_str(), &config["_class_name"]), ("Playground v2.5", &json!("EDMDPMSolverMultistepScheduler")));
    let (family, config) = scheduler(&[("edm_vpred.sigma_max", &[120.0]), ("edm_vpred.sigma_min", &[0.002])], |_| vec![]);
    assert_eq!((family.as_str(), &config["_class_name"]), ("CosXL", &json!("EDMEulerScheduler")));
    assert_eq!((&config["sigma_max"], &config["sigma_data"]), (&json!(120.0), &json!(1.0)));
}

/// A checkpoint of shapes alone: its data is a hole in the file.
fn of_shapes(tensors: &[(String, Vec<i64>)], path: &Path) {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<i64>() as u64;
        header.insert(name.clone(), json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = Value::Object(header).to_string().into_bytes();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().set_len(8 + header.len() as u64 + end).unwrap();
}

fn config(value: &Value) -> ConfigFile {
    ConfigFile::from_entries("config.json".as_ref(), value.as_object().unwrap().clone())
}

/// The published configs of SDXL base and refiner.
#[test]
fn the_shapes_of_published_models_tell_their_configs() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("model.safetensors");
    let base = json!({
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": true, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    });
    let refiner = json!({
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [384, 768, 1536, 1536], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24], "cross_attention_dim": 1280,
        "use_linear_projection": true, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    });
    for (published, family, in_channels, told_guidance) in [
        (&base, "SDXL base", 4, None),
        (&base, "SDXL base, for inpainting (9 input channels)", 9, None),
        (&base, "SDXL base, LCM (told the guidance scale)", 4, Some(256)),
        (&refiner, "SDXL refiner", 4, None),
    ] {
        let mut published = published.clone();
        published["in_channels"] = json!(in_channels);
        published["time_cond_proj_dim"] = json!(told_guidance);
        let chain = UnetChain::new(UnetConfig::parse(config(&published)).unwrap());
        let shapes: BTreeMap<String, Vec<i64>> =
            chain.tensors().unwrap().into_iter().map(|spec| (spec.name, spec.shape)).collect();
        let names = Names::of_unet(&chain).unwrap();
        let unet =
            names.iter().map(|(stored, views)| (format!("model.diffusion_model.{stored}"), shapes[&views[0].name].clone()));
        of_shapes(&unet.collect::<Vec<_>>(), &path);
        let file = SingleFile::open(&path).unwrap();
        assert_eq!(file.family().to_string(), family);
        let sampler = if told_guidance.is_some() { "LCMScheduler" } else { "EulerDiscreteScheduler" };
        assert_eq!(file.family().scheduler()["_class_name"], sampler);
        assert_eq!(file.family().index()["scheduler"], json!(["diffusers", sampler]));
        let told = Value::Object(file.unet_config(None).unwrap());
        let mut told = UnetConfig::parse(config(&told)).unwrap();
        // A level without transformers may have any depth.
        if family == "SDXL refiner" {
            told.transformer_layers_per_block = chain.config().transformer_layers_per_block.clone();
        }
        assert_eq!(&told, chain.config(), "{family}");
        let told = UnetChain::new(UnetConfig::parse(config(&Value::Object(file.unet_config(None).unwrap()))).unwrap());
        assert_eq!(told.tensors().unwrap(), chain.tensors().unwrap());
        assert_eq!(inspect(&path).unwrap().parameters, told.tensors().unwrap().iter().map(|spec| spec.numel()).sum::<u64>());
    }
    // Text encoders.
    let text = |class: &str, act: &str, width: i64, layers: i64, inner: i64| {
        json!({
            "architectures": [class], "hidden_act": act, "hidden_size": width, "intermediate_size": inner, "eos_token_id": 2,
            "num_hidden_layers": layers, "num_attention_heads": width / 64, "projection_dim": width, "vocab_size": 49_408,
        })
    };
    let small = TextConfig::parse(config(&text("CLIPTextModel", "quick_gelu", 768, 12, 3072))).unwrap();
    let big = TextConfig::parse(config(&text("CLIPTextModelWithProjection", "gelu", 1280, 32, 5120))).unwrap();
    let mut tensors = vec![("model.diffusion_model.label_emb.0.0.weight".to_owned(), vec![1280, 2816])];
    let shapes = |config: &TextConfig| -> BTreeMap<String, Vec<i64>> {
        ClipText::tensors(config).unwrap().into_iter().map(|spec| (spec.name, spec.shape)).collect()
    };
    for (prefix, names, shapes) in [
        ("conditioner.embedders.0.transformer.", Names::of_clip(&small).unwrap(), shapes(&small)),
        ("conditioner.embedders.1.model.", Names::of_open_clip(&big), shapes(&big)),
    ] {
        for (stored, views) in names.iter() {
            let mut shape = shapes[&views[0].name].clone();
            shape[0] *= views.len() as i64;
            tensors.push((format!("{prefix}{stored}"), shape));
        }
    }
    of_shapes(&tensors, &path);
    let file = SingleFile::open(&path).unwrap();
    for (part, published) in [("text_encoder", &small), ("text_encoder_2", &big)] {
        let told = Value::Object(file.text_config(part).unwrap());
        assert_eq!(&TextConfig::parse(config(&told)).unwrap(), published, "{part}");
    }
}

/// The tensors of a UNet as a checkpoint has them: names and shapes.
fn stored_unet(chain: &UnetChain) -> Vec<(String, Vec<i64>)> {
    let shapes: BTreeMap<String, Vec<i64>> = chain.tensors().unwrap().into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let names = Names::of_unet(chain).unwrap();
    let stored = names.iter();
    stored.map(|(stored, views)| (format!("model.diffusion_model.{stored}"), shapes[&views[0].name].clone())).collect()
}

/// Depths of the transformers in the order of a checkpoint's input and output blocks, and the depth
/// of the middle block: -1 is a resnet alone, -2 is no middle block. Source: the table of models
/// in ComfyUI (`comfy/model_detection.py`), whose output blocks are listed from full resolution.
const DEPTHS: [(Preset, &[usize], &[usize], i64); 9] = [
    (Preset::SdxlBase, &[0, 0, 2, 2, 10, 10], &[0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    (Preset::SdxlInpainting, &[0, 0, 2, 2, 10, 10], &[0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    (Preset::SdxlEdit, &[0, 0, 2, 2, 10, 10], &[0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    (Preset::LcmSdxl, &[0, 0, 2, 2, 10, 10], &[0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    (Preset::SdxlRefiner, &[0, 0, 4, 4, 4, 4, 0, 0], &[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0], 4),
    (Preset::Ssd1b, &[0, 0, 2, 2, 4, 4], &[0, 0, 0, 1, 1, 2, 10, 4, 4], -1),
    (Preset::Vega, &[0, 0, 1, 1, 2, 2], &[0, 0, 0, 1, 1, 1, 2, 2, 2], -1),
    (Preset::Koala700m, &[0, 2, 5], &[0, 0, 2, 2, 5, 5], -2),
    (Preset::Koala1b, &[0, 2, 6], &[0, 0, 2, 2, 6, 6], 6),
];

/// Full published shapes, no weights.
#[test]
fn the_shapes_of_every_architecture_tell_its_config() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("model.safetensors");
    for (name, preset) in Preset::all().filter(|(_, preset)| *preset != Preset::Tiny) {
        let chain = UnetChain::new(UnetConfig::parse(preset.unet_config()).unwrap());
        let stored = stored_unet(&chain);
        let (_, inputs, outputs, middle) = DEPTHS.iter().find(|(known, ..)| *known == preset).unwrap();
        let depth = |block: &str| {
            let blocks =
                |i: &usize| stored.iter().any(|(name, _)| name.contains(&format!("{block}.transformer_blocks.{i}.norm1.w")));
            (0..).take_while(blocks).count()
        };
        let is_resnet = |block: &str| stored.iter().any(|(name, _)| name.contains(&format!("{block}.0.in_layers.0.weight")));
        let depths = |kind: &str| -> Vec<usize> {
            let blocks = (0..30).map(|n| format!("{kind}_blocks.{n}")).filter(|block| is_resnet(block));
            blocks.map(|block| depth(&format!("{block}.1"))).collect()
        };
        assert_eq!(depths("input"), *inputs, "{name}");
        assert_eq!(depths("output").into_iter().rev().collect::<Vec<_>>(), *outputs, "{name}");
        let has_middle = stored.iter().any(|(name, _)| name.contains("middle_block."));
        let found = if has_middle { depth("middle_block.1") as i64 } else { -2 };
        assert_eq!(found, if *middle == -1 { 0 } else { *middle }, "{name}");

        of_shapes(&stored, &path);
        let file = SingleFile::open(&path).unwrap();
        let told = UnetConfig::parse(config(&Value::Object(file.unet_config(None).unwrap()))).unwrap();
        // A level without transformers may have any depth; that of the last level is the middle's.
        let counted = |config: &UnetConfig| {
            let mut config = config.clone();
            let last = config.block_out_channels.len() - 1;
            for level in 0..=last {
                let is_middle = level == last && config.mid_block == MidBlock::CrossAttention;
                if !config.down_attention[level] && !is_middle {
                    config.transformer_layers_per_block[level] = Depth::Same(0);
                }
                let up = config.up_attention[last - level];
                if let (Some(reverse), false) = (&mut config.reverse_transformer_layers_per_block, up) {
                    reverse[last - level] = Depth::Same(0);
                }
            }
            config
        };
        assert_eq!(counted(&told), counted(chain.config()), "{name}");
        let tensors = UnetChain::new(told).tensors().unwrap();
        assert_eq!(tensors, chain.tensors().unwrap(), "{name}");

        // What no config describes is left to a base: a resnet without the transformer that its
        // neighbour has, and a middle block of another depth than its level's transformers.
        let without = |gone: &str| {
            let kept: Vec<_> = stored.iter().filter(|(name, _)| !name.contains(gone)).cloned().collect();
            assert!(kept.len() < stored.len(), "{name} has no {gone}");
            of_shapes(&kept, &path);
            SingleFile::open(&path).unwrap().unet_config(None)
        };
        assert_eq!(
            without(if preset == Preset::SdxlRefiner { "output_blocks.4.1." } else { "output_blocks.1.1." }),
            None,
            "{name}"
        );
        if *middle > 0 && preset != Preset::SdxlRefiner {
            assert_eq!(without(&format!("middle_block.1.transformer_blocks.{}.", middle - 1)), None, "{name}");
        }
    }
    // Heads that are not 64 wide, and groups that are not 32.
    let tiny = UnetChain::new(UnetConfig::parse(Preset::Tiny.unet_config()).unwrap());
    of_shapes(&stored_unet(&tiny), &path);
    assert_eq!(SingleFile::open(&path).unwrap().unet_config(None), None);
}

/// A transformer of depth 0 has a norm and projections alone.
#[test]
fn transformers_of_no_blocks_are_seen() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("model.safetensors");
    let mut published = Value::Object(Preset::Ssd1b.unet_config().into_entries());
    published["mid_block_type"] = json!("UNetMidBlock2DCrossAttn");
    published["transformer_layers_per_block"] = json!([0, [0, 2], [0, 4]]);
    let chain = UnetChain::new(UnetConfig::parse(config(&published)).unwrap());
    of_shapes(&stored_unet(&chain), &path);
    let told = SingleFile::open(&path).unwrap().unet_config(None).unwrap();
    assert_eq!(told["mid_block_type"], json!("UNetMidBlock2DCrossAttn"));
    let told = UnetChain::new(UnetConfig::parse(config(&Value::Object(told))).unwrap());
    assert_eq!(told.tensors().unwrap(), chain.tensors().unwrap());
}

/// `values` of `tests/golden/make_family.py`.
pub(crate) fn values(name: &str, shape: &[usize]) -> Vec<u8> {
    let offset = u64::from(crc32fast::hash(name.as_bytes()));
    let count: usize = shape.iter().product();
    let unit = |place: usize| {
        let mut x = (place as u64 + offset) & 0xFFFF_FFFF;
        for factor in [2_654_435_761, 73_244_475] {
            x = (x * factor) & 0xFFFF_FFFF;
            x ^= x >> 16;
        }
        x as f64 / 4_294_967_296.0 - 0.5
    };
    let value = |place: usize| match shape {
        [_] => 0.1 * unit(place) + if name.ends_with("weight") { 1.0 } else { 0.0 },
        _ => 3.0 * unit(place) / ((count / shape[0]) as f64).sqrt(),
    };
    (0..count).flat_map(|place| half::f16::from_f64(value(place)).to_le_bytes()).collect()
}

/// Writes the checkpoint of `tests/golden/make_family.py`.
pub(crate) fn family(path: &Path) {
    let notes = std::fs::read_to_string(repo("tests/golden/single-file/family.json")).unwrap();
    let notes: Value = serde_json::from_str(&notes).unwrap();
    let tensor = |(name, shape): (&String, &Value)| {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
        (name.clone(), (Dtype::F16, shape.clone(), values(name, &shape)))
    };
    write(&notes["tensors"].as_object().unwrap().iter().map(tensor).collect(), path);
}

/// No base: configs by the shapes, tokenizers by CLIP, the sampler by the family.
#[test]
fn a_file_of_the_family_needs_nothing_else() {
    let golden = repo("tests/golden/single-file/family");
    let notes: Value = serde_json::from_str(&std::fs::read_to_string(golden.with_extension("json")).unwrap()).unwrap();
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("family.safetensors");
    family(&path);
    let text = |key: &str| notes[key].as_str().map_or_else(|| notes[key].to_string(), str::to_owned);
    let draw = |model: &Path| {
        let run = Squeeze::new("generate").model(model).with("--prompt", text("prompt")).arg("--overwrite");
        let run = run.with("--negative-prompt", text("negative_prompt")).with("--steps", text("steps"));
        let run = run.with("--guidance", text("guidance")).with("--seed", text("seed"));
        let run = run.with("--height", text("size")).with("--width", text("size"));
        let out = here.path().join("latents.safetensors");
        run.with("--latents-out", &out).with("-o", here.path().join("x.png")).succeeds();
        tensors(&out)["latents"].shallow_clone()
    };
    let drawn = draw(&path);
    let error = relative_error(&drawn, &tensors(&golden.with_extension("safetensors"))["latents"]);
    assert!(error < 1e-4, "relative error {error:.2e}");

    // The folder that is made of it has all configs and tokenizers.
    let folder = here.path().join("folder");
    Squeeze::new("export").arg(&path).with("--to", "diffusers").out(&folder).succeeds();
    assert!(draw(&folder) == drawn);
}

/// Playground v2.5, CosXL and CosXL Edit in small: what diffusers draws with them.
#[test]
fn edm_models_draw_what_diffusers_draws() {
    let notes = |name: &str| -> Value {
        let path = repo(&format!("tests/golden/single-file/{name}.json"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let (family, notes) = (notes("family"), notes("edm"));
    let golden = tensors(&repo("tests/golden/single-file/edm.safetensors"));
    let here = tempfile::tempdir().unwrap();
    let text = |key: &str| notes[key].as_str().map_or_else(|| notes[key].to_string(), str::to_owned);
    for (name, markers) in notes["markers"].as_object().unwrap() {
        let path = here.path().join(format!("{name}.safetensors"));
        let tensor = |(tensor, shape): (&String, &Value)| {
            let mut shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
            if name == "cosxl-edit" && tensor == "model.diffusion_model.input_blocks.0.0.weight" {
                shape[1] = 8;
            }
            (tensor.clone(), (Dtype::F16, shape.clone(), values(tensor, &shape)))
        };
        let mut made: Tensors = family["tensors"].as_object().unwrap().iter().map(tensor).collect();
        for (marker, entry) in markers.as_object().unwrap() {
            let numbers: Vec<f32> = serde_json::from_value(entry["values"].clone()).unwrap();
            let shape = serde_json::from_value(entry["shape"].clone()).unwrap();
            made.insert(marker.clone(), (Dtype::F32, shape, numbers.into_iter().flat_map(f32::to_le_bytes).collect()));
        }
        write(&made, &path);
        let draw = |model: &Path, base: Option<&Path>| {
            let run = Squeeze::new("generate").model(model).with("--prompt", text("prompt")).arg("--overwrite");
            let run = run.with("--negative-prompt", text("negative_prompt")).with("--steps", text("steps"));
            let run = run.with("--guidance", text("guidance")).with("--seed", text("seed"));
            let run = match name.as_str() {
                "cosxl-edit" => {
                    let image = crate::architectures::golden("image.png");
                    run.with("--image", image).with("--image-guidance", text("image_guidance"))
                }
                _ => run.with("--height", text("size")).with("--width", text("size")),
            };
            let run = if let Some(base) = base { run.with("--base", base) } else { run };
            let [out, picture] = ["latents.safetensors", "x.png"].map(|name| here.path().join(name));
            run.with("--latents-out", &out).with("-o", &picture).succeeds();
            (tensors(&out)["latents"].shallow_clone(), pixels_of(&picture))
        };
        let (drawn, picture) = draw(&path, None);
        let error = relative_error(&drawn, &golden[&format!("{name}/latents")]);
        assert!(error < 1e-4, "{name}: relative error {error:.2e}");
        // The scale of the latents counts in the picture alone.
        let expected = (&golden[&format!("{name}/picture")] * 255.0).round().squeeze().permute([1, 2, 0]).contiguous();
        let expected = Vec::<f32>::try_from(expected.flatten(0, -1)).unwrap();
        assert_eq!(picture.len(), expected.len());
        let most = picture.iter().zip(&expected).map(|(ours, theirs)| (f32::from(*ours) - theirs).abs()).fold(0.0, f32::max);
        assert!(most <= 1.0, "{name}: a pixel differs by {most}");

        // The folder that is made of it says the same, and so does the file that is made of that.
        let folder = here.path().join(format!("{name}-folder"));
        Squeeze::new("export").arg(&path).with("--to", "diffusers").out(&folder).succeeds();
        assert!(draw(&folder, None) == (drawn.shallow_clone(), picture.clone()), "{name}: as a folder");
        let again = here.path().join(format!("{name}-again.safetensors"));
        Squeeze::new("export").arg(&folder).with("--to", "single-file").out(&again).succeeds();
        assert!(draw(&again, None) == (drawn.shallow_clone(), picture.clone()), "{name}: as a file again");

        // A base of plain SDXL completes it, and the markers decide.
        let plain = here.path().join("plain");
        if !plain.exists() {
            copy(&folder, &plain);
            for (file, key) in [("vae/config.json", "latents_mean"), ("vae/config.json", "latents_std")] {
                edit(&plain.join(file), |config| drop(config.remove(key)));
            }
            edit(&plain.join("vae/config.json"), |config| drop(config.insert("scaling_factor".into(), json!(0.13025))));
            let euler = repo("tests/golden/base-like/scheduler/scheduler_config.json");
            std::fs::copy(euler, plain.join("scheduler/scheduler_config.json")).unwrap();
            edit(&plain.join("model_index.json"), |index| {
                index.insert("scheduler".into(), json!(["diffusers", "EulerDiscreteScheduler"]));
            });
        }
        assert!(draw(&path, Some(&plain)) == (drawn, picture), "{name}: with a base");
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut config: Map<String, Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(path, Value::Object(config).to_string()).unwrap();
}

fn pixels_of(path: &Path) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    pixels.truncate(info.buffer_size());
    pixels
}

/// 4-D attention of the VAE, its old names, and other dtypes in one folder.
#[test]
fn folders_that_older_converters_wrote() {
    let here = tempfile::tempdir().unwrap();
    let root = repo("tests/golden/base-like");
    let picture = |model: &Path| {
        let out = here.path().join("x.png");
        generate(model).with("-o", &out).succeeds();
        std::fs::read(&out).unwrap()
    };
    let pixels = |model: &Path| {
        let bytes = picture(model);
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    };
    let model = here.path().join("model");
    copy(&root, &model);
    let vae = model.join("vae/diffusion_pytorch_model.safetensors");
    let old = read(&vae).into_iter().map(|(mut name, (dtype, mut shape, data))| {
        if name.contains(".attentions.") {
            for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
                name = name.replace(&format!(".{new}."), &format!(".{old}."));
            }
            if shape.len() == 2 {
                shape.extend([1, 1]);
            }
        }
        // Halves become 32-bit numbers, which hold them exactly.
        let single = data.as_chunks::<2>().0.iter().flat_map(|half| half::f16::from_le_bytes(*half).to_f32().to_le_bytes());
        match dtype {
            Dtype::F16 => (name, (Dtype::F32, shape, single.collect())),
            other => (name, (other, shape, data)),
        }
    });
    write(&old.collect(), &vae);
    assert!(pixels(&model) == pixels(&root));

    // Pickles alone.
    std::fs::rename(&vae, model.join("vae/diffusion_pytorch_model.bin")).unwrap();
    generate(&model).with("-o", here.path().join("x.png")).is_refused(&["pickled .bin weights are not read", "save_pretrained"]);
}
