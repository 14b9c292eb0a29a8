//! The VAE's encoder, compressed into the container of the VAE.

use std::path::Path;

use sdxl_squeeze::container::Container;
use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{emoji, pixels, report};

/// Palettes of 4 bits for both halves of the VAE, or for the decoder alone.
fn config(encoder: bool) -> String {
    format!(
        "calibration: {{prompts: calibration/emoji-varied.txt, steps: 2}}\n\
         vae:\n  encoder: {encoder}\n  nsamples: 2\n  on_misfit: smaller_group\n\
         \x20 global_config: {{n_bits: 4, granularity: per_grouped_channel, group_size: 16}}\n"
    )
}

#[test]
fn the_encoder_is_compressed_where_the_config_asks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &str| folder.path().join(name);
    let compress = |encoder: bool, solver: &str, out: &Path| {
        std::fs::write(here("c.yaml"), config(encoder)).unwrap();
        Squeeze::new("compress").config_file(here("c.yaml")).model(emoji()).with("--solver", solver).out(out).succeeds();
        out.join("vae.squeezed.safetensors")
    };
    let both = compress(true, "joint", &here("both"));
    let row = report(&here("both"))["networks"][0].clone();
    let planned = Squeeze::new("plan").arg(here("c.yaml")).model(emoji()).arg("--json").succeeds().json::<Value>();
    for key in ["payload_bytes", "dense_bytes"] {
        assert_eq!(row[key], planned[0]["networks"][0][key]);
    }
    let is_of_encoder = |name: &str| name.starts_with("encoder.") || name.starts_with("quant_conv");
    let layers = row["layers"].as_array().unwrap();
    let (of_encoder, of_decoder): (Vec<&Value>, Vec<&Value>) =
        layers.iter().partition(|layer| is_of_encoder(layer["name"].as_str().unwrap()));
    assert!(of_encoder.len() > 15 && of_decoder.len() > 15, "{layers:?}");
    assert!(layers.iter().all(|layer| layer["errors"]["output"].as_f64().is_some_and(|error| error < 0.05)), "{layers:?}");
    assert!(Container::open(&both).unwrap().has_weight("encoder.mid_block.resnets.0.conv1.weight"));
    Squeeze::new("verify").arg(&both).succeeds();
    Squeeze::new("inspect").arg(&both).succeeds().says(&["encoder.down_blocks.0.resnets.0.conv1"]);

    // The encoder changes no byte of the decoder, and palettes alone are farther off.
    let decoder = Container::open(&compress(false, "joint", &here("decoder"))).unwrap();
    let container = Container::open(&both).unwrap();
    for layer in decoder.layers() {
        assert!(!is_of_encoder(&layer.name), "{}", layer.name);
        assert_eq!(container.decode(&layer.name).unwrap(), decoder.decode(&layer.name).unwrap(), "{}", layer.name);
    }
    std::fs::write(here("judge.txt"), "a red apple\na blue fish\n").unwrap();
    let compared = |vae: &Path| {
        let compare = Squeeze::new("compare-networks").model(emoji()).with("--judge", here("judge.txt"));
        compare.args(["--steps", "2"]).with("--vae", vae)
    };
    compared(&both).succeeds().says(&["VAE's encoder", "standard deviations"]);
    let latents = |vae: &Path| compared(vae).arg("--json").succeeds().json::<Value>()["latents"].clone();
    assert_eq!(latents(&here("decoder/vae.squeezed.safetensors")), Value::Null);
    let joint = latents(&both);
    let palettes = latents(&compress(true, "sequential", &here("palettes")));
    for key in ["means", "deviations"] {
        let [joint, palettes] = [&joint, &palettes].map(|latents| latents[key].as_f64().unwrap());
        assert!(joint > 0.0 && joint < 0.8 * palettes, "{key}: {joint} {palettes}");
    }

    // Palettes in the package, and pictures that are drawn from a picture.
    let package = here("VAEEncoder.mlpackage");
    let export = Squeeze::new("export").arg(emoji()).args(["--to", "coreml", "--part", "vae_encoder"]).with("--vae", &both);
    export.out(&package).succeeds();
    let verified = Squeeze::new("verify").arg(&package).arg("--json").succeeds().json::<Value>();
    assert!(verified["compressed"].as_u64().unwrap() > 15, "{verified}");
    let draw = |image: Option<&Path>, vae: Option<&Path>| {
        let to = here("picture.png");
        let mut draw = Squeeze::new("generate").model(emoji()).args(["--prompt", "red apple", "--steps", "2", "--overwrite"]);
        draw = image.into_iter().fold(draw, |draw, image| draw.with("--image", image).with("--strength", "0.5"));
        draw = vae.into_iter().fold(draw, |draw, vae| draw.with("--vae", vae));
        draw.with("-o", &to).succeeds();
        pixels(&to).0
    };
    draw(None, None);
    let image = here("image.png");
    std::fs::rename(here("picture.png"), &image).unwrap();
    assert_ne!(draw(Some(&image), Some(&both)), draw(Some(&image), Some(&here("decoder/vae.squeezed.safetensors"))));
}

#[test]
fn rules_for_the_encoder_need_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    let run = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Squeeze::new("compress").config_file(&path).model(emoji()).out(folder.path().join("out"))
    };
    let rule = "  global_config: null\n  module_name_configs: {'encoder\\.conv_in': {n_bits: 4}}\n";
    run(&format!("solver: sequential\nvae:\n{rule}")).ends_with(2).says(&["c.yaml:4:", "encoder"]);
    run("vae: {encoder: perhaps}\n").ends_with(2).says(&["c.yaml:1:", "encoder"]);
    run(&format!("solver: sequential\nvae:\n  encoder: true\n  weight_threshold: 0\n{rule}")).succeeds();
    let container = Container::open(&folder.path().join("out/vae.squeezed.safetensors")).unwrap();
    assert_eq!(container.layers().map(|layer| layer.name).collect::<Vec<_>>(), ["encoder.conv_in.weight"]);

    // A VAE without an encoder has nothing to compress there.
    let vae = folder.path().join("vae");
    std::fs::create_dir(&vae).unwrap();
    std::fs::copy(emoji().join("vae/config.json"), vae.join("config.json")).unwrap();
    let name = "diffusion_pytorch_model.safetensors";
    let all = crate::support::tensors(&emoji().join("vae").join(name));
    let decoder: Vec<_> =
        all.iter().filter(|(name, _)| name.contains("post_quant_conv") || name.starts_with("decoder.")).collect();
    tch::Tensor::write_safetensors(&decoder, vae.join(name)).unwrap();
    run("solver: sequential\nvae: {encoder: true}\n").with("--vae", &vae).is_refused(&["encoder.conv_in"]);
}
