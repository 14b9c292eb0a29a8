//! The program ends with one clear line and exit code 2 on bad input.

use std::path::Path;

use serde_json::{Value, json};

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, ended_with, repo, squeeze};

/// A copy of a small pipeline for a test to damage. Its weights take 1 MB.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&repo("tests/golden/base-like"), folder.path());
    folder
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Asserts that `generate` with `model` and `more` arguments is refused in one line that contains
/// all `words`.
fn refused(model: &Path, more: &[&str], words: &[&str]) {
    let out = tempfile::tempdir().unwrap();
    let picture = out.path().join("x.png");
    let run = Squeeze::new("generate").model(model).args(["--steps", "2", "-o"]).arg(&picture).args(more);
    let run = if more.contains(&"--prompt") { run } else { run.args(["--prompt", "a cat"]) };
    let ended = run.is_refused(words);
    // The paths are removed from the text first, because random names of folders may contain "0x",
    // which the test takes for an address.
    let text = ended.text().replace(model.to_str().unwrap(), "").replace(out.path().to_str().unwrap(), "");
    assert!(!text.contains("panicked") && !text.contains("0x"), "{ended}");
    assert!(!picture.exists());
}

#[test]
fn a_missing_folder_or_part_is_named() {
    refused(Path::new("/nowhere/model"), &[], &["cannot read", "/nowhere/model/model_index.json", "No such file"]);
    let folder = model();
    std::fs::remove_file(folder.path().join("vae/config.json")).unwrap();
    refused(folder.path(), &[], &["cannot read", "vae/config.json"]);
    let folder = model();
    std::fs::remove_file(folder.path().join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    refused(folder.path(), &[], &["unet", "no diffusion_pytorch_model.safetensors"]);
    std::fs::write(folder.path().join("unet/diffusion_pytorch_model.bin"), b"pickle").unwrap();
    refused(folder.path(), &[], &["pickled .bin weights are not read"]);
}

#[test]
fn damaged_safetensors_are_refused() {
    let folder = model();
    let path = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        refused(folder.path(), &[], &["diffusion_pytorch_model.safetensors", "not a whole safetensors file"]);
    }
    // The header claims a length that is far beyond the end of the file.
    let mut lying = whole.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &lying).unwrap();
    refused(folder.path(), &[], &["not a whole safetensors file"]);
}

/// Changes the header of a safetensors file and keeps its data.
fn edit_header(path: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    let whole = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    std::fs::write(path, whole).unwrap();
}

#[test]
fn tensors_of_a_wrong_dtype_shape_or_name() {
    let file = "unet/diffusion_pytorch_model.safetensors";
    let folder = model();
    edit_header(&folder.path().join(file), |header| header["conv_in.bias"]["dtype"] = json!("I16"));
    refused(folder.path(), &[], &["conv_in.bias", "I16"]);

    let folder = model();
    edit_header(&folder.path().join(file), |header| {
        let entry = header.as_object_mut().unwrap().remove("conv_in.bias").unwrap();
        header["conv_in.offset"] = entry;
    });
    refused(folder.path(), &[], &["1 missing (conv_in.bias", "1 unknown to this architecture (conv_in.offset)"]);

    let folder = model();
    edit(&folder.path().join("unet/config.json"), |config| config["cross_attention_dim"] = json!(64));
    edit(&folder.path().join("text_encoder/config.json"), |config| config["hidden_size"] = json!(32));
    let said = ended_with(2, &squeeze(&["inspect", folder.path().to_str().unwrap()]));
    assert!(said.contains("of another shape") || said.contains("cross_attention_dim"), "{said}");

    let folder = model();
    edit(&folder.path().join("unet/config.json"), |config| config["out_channels"] = json!(8));
    refused(folder.path(), &[], &["out_channels"]);
    let folder = model();
    edit(&folder.path().join("unet/config.json"), |config| config["conv_in_kernel"] = json!(5));
    refused(folder.path(), &[], &["of another shape (conv_in.weight is [8, 4, 3, 3], not [8, 4, 5, 5])"]);
}

#[test]
fn configs_that_ask_for_what_is_not_implemented() {
    let cases = [
        (
            "unet/config.json",
            "down_block_types",
            json!(["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
            "AttnDownBlock2D",
        ),
        ("unet/config.json", "class_embed_type", json!("timestep"), "class_embed_type"),
        ("unet/config.json", "addition_embed_type", json!("text"), "addition_embed_type"),
        ("unet/config.json", "mid_block_type", json!(null), "mid_block"),
        ("unet/config.json", "time_cond_proj_dim", json!(256), "cond_proj"),
        ("unet/config.json", "time_cond_proj_dim", json!(0), "time_cond_proj_dim"),
        ("unet/config.json", "mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn"), "mid_block_type"),
        ("unet/config.json", "block_out_channels", json!([-1, 32, 32]), "block_out_channels"),
        ("unet/config.json", "block_out_channels", json!(4_000_000_000_000_000_000u64), "block_out_channels"),
        ("unet/config.json", "layers_per_block", json!(1_000_000_000), "layers_per_block"),
        ("unet/config.json", "norm_num_groups", json!(7), "norm_num_groups"),
        ("unet/config.json", "attention_head_dim", json!([3, 3, 3]), "attention_head_dim"),
        ("unet/config.json", "in_channels", json!("four"), "in_channels"),
        ("scheduler/scheduler_config.json", "beta_schedule", json!("sigmoid"), "beta_schedule"),
        ("text_encoder/config.json", "hidden_act", json!("relu"), "hidden_act"),
        (
            "vae/config.json",
            "up_block_types",
            json!(["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]),
            "AttnUpDecoderBlock2D",
        ),
        ("model_index.json", "scheduler", json!(["diffusers", "LMSDiscreteScheduler"]), "LMSDiscreteScheduler"),
        ("model_index.json", "_class_name", json!("StableDiffusionPipeline"), "StableDiffusionPipeline"),
        ("model_index.json", "text_encoder_2", json!([null, null]), "text_encoder_2"),
    ];
    for (file, key, value, word) in cases {
        let folder = model();
        edit(&folder.path().join(file), |config| config[key] = value);
        refused(folder.path(), &[], &[word]);
    }
    let folder = model();
    std::fs::write(folder.path().join("unet/config.json"), "{\"in_channels\": 4,,}").unwrap();
    refused(folder.path(), &[], &["unet/config.json", "not valid JSON", "line 1"]);
}

#[test]
fn keys_that_nobody_knows_are_said() {
    let folder = model();
    edit(&folder.path().join("unet/config.json"), |config| config["min_decay"] = json!(0.5));
    let said = ended_with(0, &squeeze(&["inspect", folder.path().to_str().unwrap(), "--summary"]));
    assert!(said.contains("unknown key `min_decay` = 0.5 is ignored"), "{said}");
}

#[test]
fn arguments_that_cannot_be_honoured() {
    let root = emoji();
    refused(&root, &["--seed", "-2"], &["-1 for one by chance"]);
    refused(&root, &["--height", "60", "--width", "64"], &["height 60", "multiple of 8"]);
    refused(&root, &["--height", "64", "--width", "-8"], &["width -8"]);
    refused(&root, &["--height", "64", "--width", "9999999999"], &["width 9999999999"]);
    refused(&root, &["--steps", "0"], &["steps"]);
    refused(&root, &["--steps", "100000"], &["steps"]);
    refused(&root, &["--guidance", "NaN"], &["guidance"]);
    refused(&root, &["--scheduler", "eular"], &["eular", "euler"]);
    refused(&root, &["--device", "tpu"], &["unknown device `tpu`"]);
    refused(&root, &["--device", "cuda:99"], &["device `cuda:99` is not there"]);
    refused(&root, &["--dtype", "int4"], &["unknown dtype `int4`"]);
    refused(&root, &["--latents-out", "/nowhere/latents.safetensors"], &["no folder /nowhere"]);
}

#[test]
fn tokenizers_that_do_not_fit() {
    let folder = model();
    std::fs::write(folder.path().join("tokenizer/vocab.json"), "{\"a\": 0}").unwrap();
    refused(folder.path(), &[], &["tokenizer"]);
    let folder = model();
    std::fs::remove_file(folder.path().join("tokenizer/merges.txt")).unwrap();
    refused(folder.path(), &[], &["tokenizer", "merges.txt"]);
    let folder = model();
    edit(&folder.path().join("tokenizer_2/tokenizer_config.json"), |config| config["model_max_length"] = json!(100));
    refused(folder.path(), &[], &["makes 100 tokens", "77 positions"]);
}

#[test]
fn shard_indexes_that_lie() {
    let folder = tempfile::tempdir().unwrap();
    copy(&repo("tests/golden/v-prediction"), folder.path());
    let unet = folder.path().join("unet");
    let index = std::fs::read_dir(&unet)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.to_string_lossy().ends_with("index.json"))
        .unwrap();
    edit(&index, |value| value["weight_map"]["conv_in.bias"] = json!("../../../etc/passwd"));
    refused(folder.path(), &[], &["is not a file name"]);
    edit(&index, |value| value["weight_map"]["conv_in.bias"] = json!("absent.safetensors"));
    refused(folder.path(), &[], &["cannot read", "absent.safetensors"]);
}

#[test]
fn synth_refuses_what_it_cannot_write() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let out = out.to_str().unwrap();
    assert!(ended_with(2, &squeeze(&["synth", "--preset", "sdxl-huge", "--out", out])).contains("unknown preset `sdxl-huge`"));
    assert!(ended_with(2, &squeeze(&["synth", "--preset", "tiny", "--dtype", "f8", "--out", out])).contains("unknown dtype"));
    ended_with(0, &squeeze(&["synth", "--preset", "tiny", "--out", out]));
    assert!(ended_with(2, &squeeze(&["synth", "--preset", "tiny", "--out", out])).contains("is there already"));
}

#[test]
fn a_folder_that_is_no_package_and_numbers_that_the_model_is_not_told() {
    let model = emoji();
    let model = model.to_str().unwrap();
    let said = ended_with(2, &squeeze(&["verify", model]));
    assert!(said.contains("no Core ML package") && said.contains("`inspect` shows models"), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("Unet.mlpackage");
    let said = ended_with(2, &squeeze(&["export", model, "--to", "coreml", "--time-ids", "7", "--out", out.to_str().unwrap()]));
    assert!(said.contains("is told 6 numbers of size and crop, not 7") && !out.exists(), "{said}");
}

#[test]
fn inspect_refuses_what_is_no_model() {
    assert!(ended_with(2, &squeeze(&["inspect", "/nowhere"])).contains("there is no /nowhere; a model is a folder"));
    let folder = tempfile::tempdir().unwrap();
    assert!(
        ended_with(2, &squeeze(&["inspect", folder.path().to_str().unwrap()]))
            .contains("model_index.json: No such file or directory; a model is a folder")
    );
}
