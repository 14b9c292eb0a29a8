//! What people met with other programs (docs/models.md, "Traps"): here it is refused or said.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::single_file::{family, made, read, write};
use crate::squeeze::{Ended, Squeeze};
use crate::support::{copy, repo, tensors};

fn generate(model: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "2", "-o", "/dev/null"])
}

/// A merge without its text encoders, and one that lost a part of them.
#[test]
fn merges_with_missing_parts_are_named() {
    let root = repo("tests/golden/base-like");
    let (here, path) = made(&root);
    let whole = read(&path);
    let merged = here.path().join("merged.safetensors");
    let kept = |is_kept: &dyn Fn(&str) -> bool| whole.clone().into_iter().filter(|(name, _)| is_kept(name)).collect();
    write(&kept(&|name| !name.starts_with("conditioner.")), &merged);
    generate(&merged).is_refused(&["has no text_encoder and no text_encoder_2", "--base DIR|FILE"]);
    generate(&merged).with("--base", &root).succeeds();
    write(&kept(&|name| !name.ends_with("resblocks.0.attn.in_proj_weight")), &merged);
    generate(&merged).with("--base", &root).is_refused(&["missing (text_model.encoder.layers.0.self_attn."]);
    write(&kept(&|name| !name.starts_with("first_stage_model.encoder.")), &merged);
    generate(&merged).with("--base", &root).succeeds();
}

/// Pickled shards, as old converters wrote them.
#[test]
fn pickled_shards_are_refused_with_the_remedy() {
    let here = tempfile::tempdir().unwrap();
    let model = here.path().join("model");
    copy(&repo("tests/golden/base-like"), &model);
    let unet = model.join("unet");
    std::fs::remove_file(unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    for number in 1..=2 {
        std::fs::write(unet.join(format!("diffusion_pytorch_model-0000{number}-of-00002.bin")), b"PK\x03\x04").unwrap();
    }
    std::fs::write(unet.join("diffusion_pytorch_model.bin.index.json"), "{}").unwrap();
    generate(&model).is_refused(&["pickled .bin weights are not read", "save_pretrained"]);
}

/// `force_upcast` asks other programs for a VAE in fp32, which overflows in fp16. Here the VAE is
/// always fp32.
#[test]
fn the_vae_is_fp32_whatever_force_upcast_says() {
    let here = tempfile::tempdir().unwrap();
    let model = here.path().join("model");
    copy(&repo("tests/golden/base-like"), &model);
    let path = model.join("vae/config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let pictures = [json!(true), json!(false), Value::Null].map(|value| {
        config["force_upcast"] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let picture = here.path().join("x.png");
        Squeeze::new("generate")
            .model(&model)
            .args(["--prompt", "x", "--steps", "2", "--overwrite", "-o"])
            .arg(&picture)
            .succeeds();
        std::fs::read(&picture).unwrap()
    });
    assert!(pictures[0] == pictures[1] && pictures[1] == pictures[2]);
}

/// A file does not say its sampler: the names of distilled models do.
#[test]
fn distilled_models_in_files_are_told_their_sampler() {
    let here = tempfile::tempdir().unwrap();
    let draw = |name: &str, more: &[&str]| {
        let path = here.path().join(name);
        family(&path);
        let run =
            Squeeze::new("generate").model(&path).args(["--prompt", "a cat", "--height", "64", "--width", "64", "--overwrite"]);
        run.args(more).with("-o", here.path().join("x.png")).succeeds()
    };
    let said = draw("sdxl_lightning_2step.safetensors", &[]);
    said.says(&["a Lightning model is usually run with --timestep-spacing trailing (its sampler is EulerDiscreteScheduler)"]);
    said.says(&["2 steps and guidance 0"]);
    draw("sd_xl_turbo.safetensors", &[])
        .says(&["a Turbo model is usually run with --scheduler euler-ancestral --timestep-spacing trailing, and --height 512"]);
    let advised = ["--scheduler", "euler-ancestral", "--timestep-spacing", "trailing"];
    let said = draw("sd_xl_turbo.safetensors", &advised);
    said.says(&["4 steps of EulerAncestralDiscreteScheduler"]);
    let is_advised = |said: &Ended| said.text().contains("is usually run with");
    assert!(!is_advised(&said), "{said}");
    // A word alone is a hint at the steps too, whatever the sampler.
    draw("lcm.safetensors", &["--scheduler", "lcm"]).says(&["suggests an LCM model", "--guidance 1 --scheduler lcm"]);
    draw("my-tcd-merge.safetensors", &["--scheduler", "tcd"]).says(&["suggests a TCD model", "--guidance 0 --scheduler tcd"]);
    let trailing = ["--scheduler", "ddim", "--timestep-spacing", "trailing"];
    draw("hyper.safetensors", &trailing).says(&["suggests a Hyper-SD model", "--guidance 0 --timestep-spacing trailing"]);
    let said = draw("family.safetensors", &["--steps", "2"]);
    assert!(!is_advised(&said) && !said.text().contains("suggests"), "{said}");
}

/// A UNet of another kind than the base: the file knows its input channels, and whether it is told
/// the guidance scale.
#[test]
fn unets_of_other_kinds_are_completed_by_a_plain_base() {
    let here = tempfile::tempdir().unwrap();
    for name in ["lcm-like", "inpainting-like", "edit-like"] {
        let model = crate::architectures::pipeline(name, here.path());
        let base = here.path().join("base");
        std::fs::remove_dir_all(&base).ok();
        copy(&model, &base);
        let config = base.join("unet/config.json");
        let mut plain: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
        plain["in_channels"] = json!(4);
        plain["time_cond_proj_dim"] = Value::Null;
        std::fs::write(&config, plain.to_string()).unwrap();
        let file = here.path().join("unet.safetensors");
        Squeeze::new("export").arg(&model).args(["--to", "single-file", "--overwrite"]).out(&file).succeeds();
        let unet = |(name, _): &(String, _)| name.starts_with("model.diffusion_model.");
        write(&read(&file).into_iter().filter(unet).collect(), &file);
        let latents = here.path().join("latents.safetensors");
        let draw = |run: Squeeze, flags: &[&str]| {
            let run = run.args(flags);
            let golden = crate::architectures::golden;
            let run = run.args(["--prompt", "a cat", "--steps", "2", "--guidance", "4", "--overwrite", "-o", "/dev/null"]);
            let run = match name {
                "inpainting-like" => run.with("--image", golden("image.png")).with("--mask", golden("mask.png")),
                "edit-like" => run.with("--image", golden("image.png")),
                _ => run,
            };
            let said = run.with("--latents-out", &latents).succeeds();
            (std::fs::read(&latents).unwrap(), said)
        };
        let run = || Squeeze::new("generate");
        let euler = ["--scheduler", "euler"];
        let (expected, _) = draw(run().model(&model), &euler);
        let stored = model.join("unet/diffusion_pytorch_model.safetensors");
        for path in [&file, &stored] {
            let (drawn, said) = draw(run().model(path).with("--base", &base), &euler);
            assert!(drawn == expected, "{name}: {}", path.display());
            assert!(said.text().contains("steps of EulerDiscreteScheduler"), "{said}");
            // Without a sampler's name, an LCM's UNet has LCM's, whatever the base has.
            let (drawn, said) = draw(run().model(path).with("--base", &base), &[]);
            assert_eq!(drawn != expected, name == "lcm-like", "{name}: {}", path.display());
            assert_eq!(said.text().contains("steps of LCMScheduler"), name == "lcm-like", "{said}");
        }
    }
}

/// A VAE with NaNs draws black pictures elsewhere.
#[test]
fn weights_that_are_no_numbers_are_refused() {
    let root = repo("tests/golden/base-like");
    let (_here, path) = made(&root);
    let mut stored = read(&path);
    let (dtype, _, data) = stored.get_mut("first_stage_model.decoder.conv_in.weight").unwrap();
    assert_eq!(*dtype, Dtype::F16);
    data[..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    write(&stored, &path);
    generate(&path).with("--base", &root).is_refused(&["decoder.conv_in.weight"]);
    assert!(tensors(&path).len() > 100);
}
