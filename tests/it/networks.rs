//! Text encoders and the VAE, compressed into containers of their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use sdxl_squeeze::container::{Container, Network};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder};
use serde_json::Value;
use tch::Kind;

use crate::squeeze::{Squeeze, same_on_all_threads};
use crate::support::{emoji, pixels, repo, report, tensors};

/// The containers of all networks beside the UNet.
const NAMES: [&str; 3] = ["text_encoder", "text_encoder_2", "vae"];

/// Writes a config for all networks beside the UNet, with `bits` for each index.
fn config(folder: &Path, bits: u8, more: &str) -> PathBuf {
    config_of(folder, bits, false, more)
}

/// The same, for the VAE's encoder too if `encoder` says so.
fn config_of(folder: &Path, bits: u8, encoder: bool, more: &str) -> PathBuf {
    let path = folder.join(format!("networks-{bits}.yaml"));
    let settings = format!("global_config: {{n_bits: {bits}, granularity: per_grouped_channel, group_size: 16}}");
    let text = format!(
        "calibration: {{prompts: calibration/emoji-varied.txt, steps: 4}}\n\
         text_encoders:\n  nsamples: 24\n  on_misfit: smaller_group\n  {settings}\n\
         vae:\n  encoder: {encoder}\n  nsamples: 2\n  on_misfit: smaller_group\n  {settings}\n  module_name_configs: {{'decoder\\.conv_out': null}}\n{more}"
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn compress(config: &Path, out: &Path) -> Squeeze {
    Squeeze::new("compress").config_file(config).model(emoji()).out(out)
}

fn path(out: &Path, network: &str) -> PathBuf {
    out.join(format!("{network}.squeezed.safetensors"))
}

/// The flags that put the containers in `out` in the place of a pipeline's own networks.
fn flags(out: &Path) -> Vec<String> {
    let flag = |name: &str| [format!("--{}", name.replace('_', "-")), path(out, name).to_string_lossy().into_owned()];
    NAMES.iter().flat_map(|name| flag(name)).collect()
}

fn containers(out: &Path) -> Vec<u8> {
    NAMES.iter().flat_map(|name| std::fs::read(path(out, name)).unwrap()).collect()
}

fn psnr(a: &Path, b: &Path) -> f64 {
    let ((a, size), (b, other)) = (pixels(a), pixels(b));
    assert_eq!(size, other);
    let squares: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    10.0 * (255.0 * 255.0 * a.len() as f64 / squares.max(1e-9)).log10()
}

#[test]
fn each_network_has_a_container_that_pictures_are_drawn_with() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let config = config(folder.path(), 6, "");
    let plan = || Squeeze::new("plan").arg(&config).model(emoji());
    plan().succeeds().says(&["text_encoder_2", "in fp16", "peak memory"]);
    let of_architecture = Squeeze::new("plan").arg(&config).args(["--architecture", "sdxl-base"]);
    of_architecture.is_refused(&["are planned with --model"]);
    let planned = plan().arg("--json").succeeds().json::<Value>();
    let ended = compress(&config, &out).succeeds();
    ended.says(&["text_encoder.squeezed.safetensors: ", " in fp16; "]);
    assert!(!out.join("unet.squeezed.safetensors").exists(), "the config has no section for the UNet");
    let left: Vec<_> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), NAMES.len() + 2, "{left:?}");

    let report = report(&out);
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let planned = planned[0]["networks"].as_array().unwrap();
    for ((name, row), planned) in NAMES.iter().zip(report["networks"].as_array().unwrap()).zip(planned) {
        assert_eq!(row["network"], *name);
        for key in ["payload_bytes", "dense_bytes"] {
            assert_eq!(row[key], planned[key], "{name}");
        }
        assert!(planned["peak_bytes"].as_u64().unwrap() > row["dense_bytes"].as_u64().unwrap());
        let (bytes, dense) = (row["payload_bytes"].as_u64().unwrap(), row["dense_bytes"].as_u64().unwrap());
        // The VAE's encoder and the ends of its decoder stay fp16.
        let most = if *name == "vae" { 0.75 } else { 0.5 };
        assert!((bytes as f64) < most * dense as f64, "{name}: {bytes} of {dense}");
        for layer in row["layers"].as_array().unwrap() {
            let error = layer["errors"]["output"].as_f64();
            let is_table = layer["name"].as_str().unwrap().ends_with("token_embedding");
            assert_eq!(error.is_none(), is_table, "{layer}");
            assert!(error.is_none_or(|error| error < 0.01), "{layer}");
        }
        let verified = Squeeze::new("verify").arg(path(&out, name)).arg("--json").succeeds().json::<Value>();
        assert_eq!(verified["network"], *name);
        Squeeze::new("verify").arg(path(&out, name)).succeeds().says(&[&format!("{name}: ")]);
        Squeeze::new("inspect").arg(path(&out, name)).succeeds().says(&[&format!("{name}: ")]);
        let container = Container::open(&path(&out, name)).unwrap();
        assert_eq!(container.info().network.name(), *name);
        assert!(!container.info().sources.is_empty());
        // What is not compressed is the model's own, in fp16.
        let weights = match container.info().network {
            Network::Vae => pipeline.vae_weights().unwrap(),
            network => {
                let part = pipeline.text_encoders.iter().find(|part| part.encoder == network.name()).unwrap();
                pipeline.text_weights(part).unwrap()
            }
        };
        for (tensor, shape, _) in container.tensors() {
            assert_eq!(container.tensor(tensor).unwrap(), weights.halves(tensor, shape).unwrap(), "{tensor}");
        }
    }
    assert!(Container::open(&path(&out, "vae")).unwrap().has_weight("decoder.mid_block.resnets.0.conv1.weight"));

    let picture = |name: &str, flags: &[String]| {
        let to = folder.path().join(name);
        let draw =
            Squeeze::new("generate").model(emoji()).args(["--prompt", "red apple", "--steps", "8", "--overwrite"]).args(flags);
        draw.with("-o", &to).succeeds();
        to
    };
    let dense = picture("dense.png", &[]);
    let all = flags(&out);
    for flags in [&all[..2], &all[2..4], &all[4..], &all[..]] {
        let distance = psnr(&dense, &picture("compressed.png", flags));
        assert!((25.0..70.0).contains(&distance), "{flags:?}: {distance}");
    }

    // Palettes in the packages, which the card names.
    let bundle = folder.path().join("Resources");
    Squeeze::new("bundle").model(emoji()).args(&all).out(&bundle).succeeds();
    for (package, fewest) in [("TextEncoder", 10), ("TextEncoder2", 10), ("VAEDecoder", 15)] {
        let package = bundle.join(format!("{package}.mlpackage"));
        let verified = Squeeze::new("verify").arg(&package).arg("--json").succeeds().json::<Value>();
        assert!(verified["compressed"].as_u64().unwrap() > fewest, "{verified}");
    }
    let card = std::fs::read_to_string(bundle.join("README.md")).unwrap();
    // The card is given to others: it names the containers, and no folders of their maker.
    assert!(card.contains("| `text_encoder.squeezed.safetensors` |"), "{card}");
    assert!(!card.contains(folder.path().to_str().unwrap()), "{card}");
    for part in
        ["Compressed beside the UNet: text_encoder (", "vae (", "text_encoder_2.squeezed.safetensors", "\"text_encoders\": {"]
    {
        assert!(card.contains(part), "{part}: {card}");
    }

    // The decoded weights, for other programs.
    let diffusers = folder.path().join("diffusers");
    Squeeze::new("export").arg(emoji()).args(["--to", "diffusers"]).args(&all).out(&diffusers).succeeds();
    let weights = tensors(&diffusers.join("text_encoder_2/model.safetensors"));
    let name = "text_model.encoder.layers.1.mlp.fc2.weight";
    let decoded = Container::open(&path(&out, "text_encoder_2")).unwrap().decode(name).unwrap();
    assert_eq!(Vec::<half::f16>::try_from(&weights[name].flatten(0, -1)).unwrap(), decoded);
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (config_of(folder.path(), 4, true, ""), folder.path().join("out"));
    same_on_all_threads(&["1", "3"], &compress(&config, &out), || {
        let bytes = containers(&out);
        std::fs::remove_dir_all(&out).unwrap();
        bytes
    });
}

#[test]
fn killed_and_resumed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let more = "palettize: {module_name_configs: {'mid_block.*': {n_bits: 4}}}\nsolver: sequential\n";
    let config = config_of(folder.path(), 4, true, more);
    let (whole, out) = (folder.path().join("whole"), folder.path().join("killed"));
    let joint = |out: &Path| compress(&config, out).with("--solver", "joint").with("--calibration-nsamples", "4");
    let begin = Instant::now();
    joint(&whole).succeeds().says(&["24 texts are few for `target: dense`"]);
    let time = begin.elapsed();
    let resume = joint(&out).arg("--resume");
    for moment in [0.3, 0.4, 0.6] {
        let mut child = resume.starts();
        std::thread::sleep(time.mul_f64(moment));
        let _ended = child.kill();
        child.wait().unwrap();
    }
    resume.succeeds();
    assert!(containers(&out) == containers(&whole));
    let unet = |out: &Path| std::fs::read(path(out, "unet")).unwrap();
    assert!(unet(&out) == unet(&whole));
    let folders = std::fs::read_dir(&out).unwrap().flatten().filter(|entry| entry.path().is_dir());
    assert_eq!(folders.count(), 0);
}

#[test]
fn the_joint_solver_keeps_embeddings_and_pictures_closer_than_palettes_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), 3, "");
    let compared = |solver: &str| {
        let out = folder.path().join(solver);
        // 24 texts are few for the dense outputs, which a run says.
        let said = compress(&config, &out).with("--solver", solver).with("--target", "current").succeeds();
        assert!(!said.text().contains("texts are few"), "{said}");
        let compare = Squeeze::new("compare-networks").model(emoji()).with("--judge", repo("calibration/emoji-judge.txt"));
        let compare = compare.args(["--steps", "4"]).args(flags(&out));
        if solver == "joint" {
            compare.clone().succeeds().says(&["hidden_embeds", "text_encoder, text_encoder_2, vae"]);
        }
        compare.arg("--json").succeeds().json::<Value>()
    };
    let [joint, palettes] = ["joint", "sequential"].map(compared);
    assert_eq!(joint["prompts"], 16);
    for (joint, palettes) in joint["embeddings"].as_array().unwrap().iter().zip(palettes["embeddings"].as_array().unwrap()) {
        let error = |row: &Value| row["hidden_embeds"].as_f64().unwrap();
        assert!(error(joint) < error(palettes), "{joint} {palettes}");
    }
    let psnr = |compared: &Value, row: usize| compared["pictures"][row]["psnr"].as_f64().unwrap();
    assert_eq!(joint["pictures"][1]["networks"], serde_json::json!(["vae"]));
    assert!(psnr(&joint, 1) > psnr(&palettes, 1) + 1.0, "{joint} {palettes}");
    // Both together are not closer than the farther of the two.
    assert!(psnr(&joint, 2) < psnr(&joint, 0).min(psnr(&joint, 1)) + 0.5, "{joint}");
    let judge = repo("calibration/emoji-judge.txt");
    Squeeze::new("compare-networks").model(emoji()).with("--judge", judge).is_refused(&["nothing is compressed"]);
}

#[test]
fn containers_in_a_wrong_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&config(folder.path(), 6, ""), &out).succeeds();
    let [text, text_2, vae] = NAMES.map(|name| path(&out, name));
    let draw = |flag: &str, file: &Path| {
        let draw = Squeeze::new("generate").model(emoji()).args(["--prompt", "x", "--steps", "1"]);
        draw.with(flag, file).with("-o", folder.path().join("x.png"))
    };
    draw("--text-encoder", &text_2).is_refused(&["holds a text_encoder_2, where a text_encoder is needed"]);
    draw("--vae", &text).is_refused(&["holds a text_encoder, where a vae is needed"]);
    draw("--unet", &vae).is_refused(&["holds a vae, where a UNet is needed"]);
    let weights = emoji().join("text_encoder/model.safetensors");
    draw("--text-encoder", &weights).is_refused(&["not a container"]);
    let other = Squeeze::new("generate").model(repo("tests/golden/base-like")).args(["--prompt", "x", "--steps", "1"]);
    let other = other.with("-o", folder.path().join("x.png"));
    other.clone().with("--text-encoder", &text).is_refused(&["holds another architecture than"]);
    other.with("--vae", &vae).is_refused(&["holds another architecture than"]);
    let package = Squeeze::new("export").arg(&text).args(["--to", "coreml", "--part", "text_encoder"]);
    package.out(folder.path().join("x.mlpackage")).is_refused(&["is a container; name the pipeline in its place"]);
    Squeeze::new("export")
        .arg(&vae)
        .args(["--to", "diffusers", "--model"])
        .arg(emoji())
        .out(folder.path().join("d"))
        .is_refused(&["holds a vae, where a UNet is needed"]);
    // What is compressed cannot be compressed again.
    let again = compress(&config(folder.path(), 4, ""), &folder.path().join("again")).with("--vae", &vae);
    again.is_refused(&["is compressed already"]);
    // A flipped bit is found before anything is drawn.
    let mut bytes = std::fs::read(&text).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let damaged = folder.path().join("damaged.safetensors");
    std::fs::write(&damaged, bytes).unwrap();
    draw("--text-encoder", &damaged).is_refused(&["damaged.safetensors"]);
    Squeeze::new("verify").arg(&damaged).ends_with(2);
}

#[test]
fn mistakes_in_the_sections_are_listed_with_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.yaml");
    let run = |text: &str| {
        std::fs::write(&path, text).unwrap();
        compress(&path, &folder.path().join("out"))
    };
    run("text_encoders:\n  nsamples: 0\n  global_config: {n_bits: 5}\nvae: {global_config: {values: nf4}, bits: 3}\n")
        .ends_with(2)
        .says(&["bad.yaml:2:", "bad.yaml:3:", "bad.yaml:4:", "unknown key `bits` in vae", "`vae` has fitted palettes alone"]);
    run("text_encoders:\n  module_name_configs: {'text_model\\.layers.*': {}}\n")
        .ends_with(2)
        .says(&["text_encoders: `text_model", "is no layer's whole name"]);
    run("vae: {}\n").with("--samples-out", folder.path().join("s")).is_refused(&["--samples-out", "has no effect"]);
}

/// A rule may be about one encoder, and a network without compressed layers is fp16 as a whole.
#[test]
fn rules_are_about_the_layers_of_both_encoders() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("c.yaml"), folder.path().join("out"));
    let text = "solver: sequential\ntext_encoders:\n  module_name_configs: {'text_encoder_2\\..*\\.mlp\\.fc1': {n_bits: 8}}\n";
    std::fs::write(&file, text).unwrap();
    compress(&file, &out).succeeds();
    let compressed =
        |name: &str| Container::open(&path(&out, name)).unwrap().layers().map(|layer| layer.name).collect::<Vec<_>>();
    assert_eq!(compressed("text_encoder"), [""; 0]);
    let expected = [0, 1].map(|layer| format!("text_model.encoder.layers.{layer}.mlp.fc1.weight"));
    assert_eq!(compressed("text_encoder_2"), expected);

    // Eight bits for each of 36,864 elements lose next to nothing.
    let files = ModelFiles { text_encoder_2: Some(path(&out, "text_encoder_2")), ..ModelFiles::of(emoji()) };
    let [own, ours] = [ModelFiles::of(emoji()), files].map(|files| PipelineFolder::open_files(&files).unwrap());
    let source = |folder: &PipelineFolder| -> BTreeMap<String, tch::Tensor> {
        let weights = folder.text_network(&folder.text_encoders[1]).unwrap();
        let source = weights.source(Placement::CPU);
        weights.tensors().into_iter().map(|spec| (spec.name.clone(), source.tensor(&spec.name, &spec.shape).unwrap())).collect()
    };
    let (own, ours) = (source(&own), source(&ours));
    for (name, tensor) in &ours {
        let error = crate::support::relative_error(tensor, &own[name].to_kind(Kind::Half));
        assert!(if expected.contains(name) { error > 0.0 && error < 0.02 } else { error == 0.0 }, "{name}: {error}");
    }
}

/// The error of the first encoder at 3 bits, fitted to the outputs that `target` names.
fn error_at_three_bits(folder: &Path, target: &str) -> f64 {
    let (file, out, judge) = (folder.join("c.yaml"), folder.join(target), folder.join("judge.txt"));
    let text = "calibration: {prompts: calibration/emoji-varied.txt}\ntext_encoders:\n  on_misfit: smaller_group\n  \
                global_config: {n_bits: 3, granularity: per_grouped_channel, group_size: 16}\n  \
                module_name_configs: {'text_encoder_2\\..*': null, 'text_encoder\\.text_model\\.embeddings\\..*': null}\n";
    std::fs::write(&file, text).unwrap();
    std::fs::write(&judge, "a red apple\na blue fish with a hat\n").unwrap();
    compress(&file, &out).with("--target", target).succeeds();
    let compare = Squeeze::new("compare-networks").model(emoji()).with("--judge", judge).args(["--steps", "1"]);
    let compare = compare.with("--text-encoder", path(&out, "text_encoder")).arg("--json").succeeds();
    compare.json::<Value>()["embeddings"][0]["hidden_embeds"].as_f64().unwrap()
}

#[test]
fn layers_are_fitted_to_the_outputs_that_the_config_names() {
    let folder = tempfile::tempdir().unwrap();
    let [dense, current] = ["dense", "current"].map(|target| error_at_three_bits(folder.path(), target));
    assert!(dense < 0.95 * current, "{dense} {current}");
}

#[test]
fn too_little_memory_is_refused_with_what_would_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), 4, "");
    let with = |command: &str, memory: &str| {
        let run = Squeeze::new(command).model(emoji()).with("--memory-budget", memory);
        if command == "plan" { run.arg(&config) } else { run.config_file(&config).out(folder.path().join("out")) }
    };
    for command in ["plan", "compress"] {
        with(command, "300MiB").is_refused(&["of memory are too little to compress the text_encoder; ", "would do"]);
    }
    assert!(!folder.path().join("out").exists());
    let plan = with("plan", "2GiB").arg("--json").succeeds().json::<Value>();
    let networks = plan[0]["networks"].as_array().unwrap();
    for network in networks {
        let disk = |key: &str| network["disk"][key].as_u64().unwrap();
        assert_eq!(disk("result"), network["payload_bytes"].as_u64().unwrap());
        assert!(disk("parts") > 0 && disk("parts") < disk("result"), "{network}");
        assert_eq!(disk("samples") > 0, network["network"] == "vae", "{network}");
    }
    let most = networks.iter().map(|network| network["peak_bytes"].as_u64().unwrap()).max().unwrap();
    with("plan", &format!("{}B", most - 1)).is_refused(&["would do"]);
    with("plan", &format!("{most}B")).succeeds().says(&["on the disk"]);
}
