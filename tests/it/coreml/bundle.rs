//! `bundle`: everything that Apple's Swift pipeline reads, read as Swift does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::verify;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::input::SourceFile;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::text::ClipText;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::file::{Package, declared};
use super::interpreter::evaluate;
use super::made_up;
use super::parts::run;
use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, relative_error, repo};

/// Apple's `BPETokenizer`, on ASCII texts.
struct SwiftTokenizer {
    vocabulary: BTreeMap<String, i64>,
    ranks: BTreeMap<(String, String), usize>,
}

impl SwiftTokenizer {
    /// `BPETokenizer+Reading.swift`.
    fn read(folder: &Path) -> Self {
        let vocabulary = serde_json::from_slice(&std::fs::read(folder.join("vocab.json")).unwrap()).unwrap();
        let text = std::fs::read_to_string(folder.join("merges.txt")).unwrap();
        // The last line is dropped if it has no end.
        let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let lines = lines.enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let merge = |(rank, line): (usize, &str)| match line.split(' ').collect::<Vec<_>>()[..] {
            [first, second] => ((first.to_owned(), second.to_owned()), rank),
            _ => panic!("`{line}` is not a merge"),
        };
        SwiftTokenizer { vocabulary, ranks: lines.map(merge).collect() }
    }

    /// `BPETokenizer.swift`, `tokenize` with a minimum count of 77.
    fn ids(&self, text: &str, pad: &str) -> Vec<i64> {
        let mut tokens = vec!["<|startoftext|>".to_owned()];
        text.trim().to_lowercase().split(' ').for_each(|word| tokens.extend(self.encode(word)));
        tokens.truncate(76);
        tokens.push("<|endoftext|>".to_owned());
        tokens.resize(77, pad.to_owned());
        tokens.iter().map(|token| self.vocabulary.get(token).copied().unwrap_or(self.vocabulary["<|endoftext|>"])).collect()
    }

    fn encode(&self, word: &str) -> Vec<String> {
        let mut tokens: Vec<String> = word.chars().map(String::from).collect();
        if let Some(last) = tokens.last_mut() {
            last.push_str("</w>");
        }
        loop {
            let pairs = tokens.windows(2).map(|pair| (pair[0].clone(), pair[1].clone()));
            let Some(best) = pairs.filter(|pair| self.ranks.contains_key(pair)).min_by_key(|pair| self.ranks[pair]) else {
                return tokens;
            };
            let mut merged = Vec::new();
            let mut at = 0;
            while at < tokens.len() {
                if at + 1 < tokens.len() && (&tokens[at], &tokens[at + 1]) == (&best.0, &best.1) {
                    merged.push(format!("{}{}", best.0, best.1));
                    at += 2;
                } else {
                    merged.push(tokens[at].clone());
                    at += 1;
                }
            }
            tokens = merged;
        }
    }
}

fn bundle(model: &Path) -> Squeeze {
    Squeeze::new("bundle").model(model)
}

#[test]
fn a_bundle_has_what_swift_reads() {
    let folder = tempfile::tempdir().unwrap();
    let (container, out) = (folder.path().join("c.safetensors"), folder.path().join("Resources"));
    made_up::container(&emoji(), &container);
    let run = bundle(&emoji()).with("--unet", &container).out(&out).args(["--vae-encoder", "--license", "MIT", "--json"]);
    let said = run.succeeds();
    said.says(&["apple-vae-scale: the VAE's scaling factor is 0.54852", "decoderScaleFactor"]);
    let written: Value = serde_json::from_str(&said.stdout).unwrap();
    let names: BTreeSet<String> =
        std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let packages = ["TextEncoder", "TextEncoder2", "Unet", "VAEDecoder", "VAEEncoder"];
    let expected = packages.map(|name| format!("{name}.mlpackage"));
    let rest = ["README.md", "compile.sh", "merges.txt", "vocab.json"].map(str::to_owned);
    assert_eq!(names, expected.iter().cloned().chain(rest).collect());
    for package in &expected {
        let found = verify(&out.join(package)).unwrap();
        assert!(found.hashed && found.named, "{package}");
    }
    let unet = verify(&out.join("Unet.mlpackage")).unwrap();
    assert!(unet.compressed > 0);
    assert_eq!(
        unet.inputs,
        [
            "sample: fp16 [2, 4, 16, 16]",
            "timestep: fp16 [2]",
            "encoder_hidden_states: fp16 [2, 160, 1, 77]",
            "time_ids: fp16 [2, 6]",
            "text_embeds: fp16 [2, 96]"
        ]
    );
    assert_eq!(unet.outputs, ["noise_pred: fp32 [2, 4, 16, 16]"]);

    // The card has the size and the hash of every other file, and the hashes of the sources.
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    let files: Vec<SourceFile> = serde_json::from_value(written["files"].clone()).unwrap();
    assert_eq!(files.len(), 3 * packages.len() + 3);
    for file in &files {
        let found = SourceFile::read(&out.join(&file.file), file.file.clone()).unwrap();
        assert_eq!(found, *file);
        assert!(card.contains(&format!("| `{}` | {} | `{}` |", file.file, file.bytes, file.sha256)), "{}", file.file);
    }
    for source in ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer_2/vocab.json"] {
        let source = SourceFile::read(&emoji().join(source), source).unwrap();
        assert!(card.contains(&format!("| `{}` | {} | `{}` |", source.file, source.bytes, source.sha256)), "{card}");
    }
    for part in
        ["## Licence\n\nMIT\n", "\"made\": \"up\"", "an original and a target size of 1024", "the VAE in fp32", "apple-vae-scale"]
    {
        assert!(card.contains(part), "{part} is not in {card}");
    }
    // All bytes are counted, the card's too.
    let bytes = files.iter().map(|file| file.bytes).sum::<u64>() + card.len() as u64;
    assert_eq!(written["bytes"].as_u64(), Some(bytes));
}

/// The UNet in two packages under the names that Swift looks for: run one after the other as Swift
/// runs them, they predict what the one package of another bundle predicts.
#[test]
fn a_bundle_can_have_the_unet_in_two_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let [container, whole, chunked] = ["c.safetensors", "whole", "chunked"].map(|name| folder.path().join(name));
    made_up::container(&emoji(), &container);
    let run = |out: &Path, more: &[&str]| bundle(&emoji()).with("--unet", &container).out(out).args(more).succeeds().text();
    run(&whole, &[]);
    let said = run(&chunked, &["--chunks", "2"]);
    assert!(said.contains("UnetChunk1.mlpackage: ") && said.contains("UnetChunk2.mlpackage: "), "{said}");
    assert!(!chunked.join("Unet.mlpackage").exists());
    let chunks = super::chunks::paths(&chunked);
    for path in &chunks {
        let found = verify(path).unwrap();
        assert!(found.hashed && found.named && found.compressed > 0, "{found:?}");
    }
    let read = |name: &str| std::fs::read_to_string(chunked.join(name)).unwrap();
    let (script, card) = (read("compile.sh"), read("README.md"));
    for name in ["UnetChunk1", "UnetChunk2"] {
        assert!(script.contains(&format!("xcrun coremlcompiler compile \"$here/{name}.mlpackage\" \"$out\"\n")), "{script}");
    }
    assert!(!script.contains("Unet.mlpackage"), "{script}");
    for part in ["| `UnetChunk1.mlpackage` | the first half of the UNet |", "The UNet is in two packages"] {
        assert!(card.contains(part), "{card}");
    }

    let mut package = Package::read(&whole.join("Unet.mlpackage"));
    let inputs = super::write::random_inputs(&mut package);
    assert!(super::chunks::predict(&chunks, &inputs).equal(&evaluate(&mut package, &inputs)["noise_pred"]));
}

/// The script calls the compiler once for each package, and puts the vocabulary beside the models.
#[cfg(unix)]
#[test]
fn the_script_compiles_every_package() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("Resources of mine");
    bundle(&emoji()).out(&out).succeeds();
    let tools = folder.path().join("tools");
    std::fs::create_dir(&tools).unwrap();
    // In the place of Apple's compiler, which only a Mac has: it makes the folder that is named
    // after the package.
    let xcrun = "#!/bin/sh\n[ \"$1 $2\" = \"coremlcompiler compile\" ] && [ -f \"$3/Manifest.json\" ] && \
                 mkdir \"$4/$(basename \"$3\" .mlpackage).mlmodelc\"\n";
    std::fs::write(tools.join("xcrun"), xcrun).unwrap();
    std::fs::set_permissions(tools.join("xcrun"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let compile = |arguments: &[&str], compiled: &Path| {
        let mut command = std::process::Command::new("sh");
        let ended = command.arg(out.join("compile.sh")).args(arguments).env("PATH", &path).output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let names = std::fs::read_dir(compiled).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<BTreeSet<String>>()
    };
    let expected =
        ["TextEncoder.mlmodelc", "TextEncoder2.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "merges.txt", "vocab.json"];
    assert_eq!(compile(&[], &out.join("Compiled")), expected.map(str::to_owned).into());
    let named = folder.path().join("for the app");
    assert_eq!(compile(&[named.to_str().unwrap()], &named), expected.map(str::to_owned).into());
}

#[test]
fn swift_reads_the_vocabulary_of_every_kind_of_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let contents = |out: &Path| ["vocab.json", "merges.txt"].map(|name| std::fs::read(out.join(name)).unwrap());
    let out = folder.path().join("a");
    bundle(&emoji()).out(&out).succeeds();
    let swift = SwiftTokenizer::read(&out);
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    for (part, pad) in pipeline.text_encoders.iter().zip(["<|endoftext|>", "!"]) {
        let tokenizer = pipeline.tokenizer(part).unwrap();
        for text in ["", "a", "an emoji of a red apple", "Grinning Face with smiling eyes", "rocket"] {
            assert_eq!(swift.ids(text, pad), tokenizer.encode(text).unwrap().ids, "{text}");
        }
    }
    // Folders by transformers 5 may have tokenizer.json alone, and older ones the two files alone.
    for (name, removed) in [("b", &["vocab.json", "merges.txt"][..]), ("c", &["tokenizer.json"])] {
        let model = folder.path().join(format!("model-{name}"));
        copy(&emoji(), &model);
        for tokenizer in ["tokenizer", "tokenizer_2"] {
            removed.iter().for_each(|file| std::fs::remove_file(model.join(tokenizer).join(file)).unwrap());
        }
        let other = folder.path().join(name);
        bundle(&model).out(&other).succeeds();
        assert!(contents(&other) == contents(&out), "{name}");
    }
}

/// One step of Swift's pipeline on the packages alone: its tokens, its order of rows, the encoded
/// empty negative prompt, and sizes of 1024.
#[test]
fn a_step_as_swift_feeds_it_equals_the_unet() {
    let folder = tempfile::tempdir().unwrap();
    let (container, out) = (folder.path().join("c.safetensors"), folder.path().join("Resources"));
    made_up::container(&emoji(), &container);
    bundle(&emoji()).with("--unet", &container).out(&out).succeeds();
    let swift = SwiftTokenizer::read(&out);
    let prompts = ["", "an emoji of a red apple"];
    let encoded = ["TextEncoder", "TextEncoder2"].map(|name| {
        let pad = if name == "TextEncoder" { "<|endoftext|>" } else { "!" };
        prompts.map(|prompt| {
            let ids = Tensor::from_slice(&swift.ids(prompt, pad)).to_kind(Kind::Float).unsqueeze(0);
            run(&out.join(format!("{name}.mlpackage")), "input_ids", &ids)
        })
    });
    let [first, second] = &encoded;
    let row = |i: usize| Tensor::cat(&[&first[i]["hidden_embeds"], &second[i]["hidden_embeds"]], 2);
    // Row 0 is the negative prompt.
    let states = Tensor::cat(&[row(0), row(1)], 0);
    let pooled = Tensor::cat(&[&second[0]["pooled_outputs"], &second[1]["pooled_outputs"]], 0);
    let time_ids = Tensor::from_slice(&[1024f32, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat([2, 1]);
    let latents = noise(&[1, 4, 16, 16], 231, Kind::Float).unwrap();
    let sample = latents.repeat([2, 1, 1, 1]);
    let given = [
        ("sample", sample.shallow_clone()),
        ("timestep", Tensor::full([2], 741.0, (Kind::Float, Device::Cpu))),
        ("encoder_hidden_states", states.transpose(1, 2).unsqueeze(2)),
        ("time_ids", time_ids.shallow_clone()),
        ("text_embeds", pooled),
    ];
    let mut package = Package::read(&out.join("Unet.mlpackage"));
    for (input, (name, x)) in package.program().functions["main"].inputs.iter().zip(&given) {
        assert_eq!((input.name.as_str(), declared(input.r#type.as_ref()).1), (*name, x.size()));
    }
    let inputs = given.into_iter().map(|(name, x)| (name.to_owned(), x)).collect();
    let made = evaluate(&mut package, &inputs).remove("noise_pred").unwrap();

    // The same in Rust, from the model's own tokenizers.
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let mut columns = Vec::new();
    let mut pooled = None;
    for part in &pipeline.text_encoders {
        let encoder = ClipText::load(&part.config, &pipeline.text_weights(part).unwrap().source(Placement::CPU)).unwrap();
        let tokenizer = pipeline.tokenizer(part).unwrap();
        let rows = prompts.map(|prompt| Tensor::from_slice(&tokenizer.encode(prompt).unwrap().ids));
        let states = encoder.forward(&Tensor::stack(&rows, 0)).unwrap();
        columns.push(states.penultimate);
        pooled = states.pooled;
    }
    let conditioning = Conditioning {
        encoder_hidden_states: Tensor::cat(&columns, 2),
        text_embeds: pooled.unwrap(),
        time_ids,
        timestep_cond: None,
    };
    let container = Container::open(&container).unwrap();
    let weights = UnetWeights::from(&container);
    let unet = Unet::resident(weights.chain().unwrap(), weights.source(Placement::CPU), &Silent).unwrap();
    let expected = unet.forward(&sample, 741.0, &conditioning, &mut Unobserved).unwrap();
    let error = relative_error(&made, &expected);
    assert!(error < 2e-4, "{error}");
}

#[test]
fn the_same_bundle_has_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut hashes = Vec::new();
    for (name, threads) in [("a", "1"), ("b", "4")] {
        let out = folder.path().join(name);
        let said = bundle(&emoji()).out(&out).arg("--json").env("OMP_NUM_THREADS", threads).succeeds();
        let written: Value = serde_json::from_str(&said.stdout).unwrap();
        hashes.push((written["files"].clone(), std::fs::read(out.join("README.md")).unwrap()));
    }
    assert!(hashes[0] == hashes[1]);
}

/// Models that Apple's pipeline would draw wrong pictures with.
#[test]
fn what_swift_cannot_draw_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("Resources");
    let refused = |run: Squeeze, parts: &[&str]| {
        run.out(&out).is_refused(parts);
        assert!(!out.exists());
    };
    refused(bundle(&repo("tests/golden/v-prediction")), &["predicts `v_prediction`, not noise", "export --to coreml"]);
    let changed = |file: &str, change: &dyn Fn(&mut Value)| {
        let model = folder.path().join("model");
        std::fs::remove_dir_all(&model).ok();
        copy(&emoji(), &model);
        let path = model.join(file);
        let mut entries: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut entries);
        std::fs::write(&path, entries.to_string()).unwrap();
        model
    };
    let sample = changed("scheduler/scheduler_config.json", &|config| config["prediction_type"] = json!("sample"));
    refused(bundle(&sample), &["predicts `sample`, not noise"]);
    let normalized = changed("vae/config.json", &|config| {
        (config["latents_mean"], config["latents_std"]) = (json!([0.0, 0.0, 0.0, 0.0]), json!([1.0, 1.0, 1.0, 1.0]));
    });
    refused(bundle(&normalized), &["latents are normalized", "wrong colours"]);
    let pad = changed("tokenizer_2/special_tokens_map.json", &|config| config["pad_token"] = json!("<|endoftext|>"));
    refused(bundle(&pad), &["Apple's pipeline pads texts with `!`, and tokenizer_2 does not"]);
    let differing =
        changed("tokenizer_2/tokenizer.json", &|config| drop(config["model"]["merges"].as_array_mut().unwrap().pop()));
    refused(bundle(&differing), &["the tokenizers of the two text encoders differ"]);
    let inpainting = crate::architectures::pipeline("inpainting-like", folder.path());
    refused(bundle(&inpainting), &["Apple's pipeline gives 4 channels of latents"]);
    refused(bundle(&emoji()).args(["--height", "66"]), &["height 66 is not a multiple of 4"]);
    refused(bundle(&emoji()).with("--unet", emoji().join("unet/diffusion_pytorch_model.safetensors")), &["not a container"]);
    let other = folder.path().join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &other);
    refused(bundle(&emoji()).with("--unet", &other), &["another architecture"]);
    refused(bundle(&emoji()).arg("--no-verify"), &["required arguments"]);
    let inside = emoji().join("Resources");
    bundle(&emoji()).out(&inside).is_refused(&["--out would write"]);
}

/// The licence in the head of a model's card, as model hubs write it.
#[test]
fn the_card_tells_the_licence_of_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let card = |name: &str, readme: &str| {
        std::fs::write(model.join("README.md"), readme).unwrap();
        let out = folder.path().join(name);
        bundle(&model).out(&out).succeeds();
        std::fs::read_to_string(out.join("README.md")).unwrap()
    };
    assert!(card("a", "---\nlicense: openrail++\ntags: [x]\n---\n# Model\n").contains("state the licence `openrail++`"));
    assert!(card("b", "---\nlicense: other\nlicense_name: \"my-own\"\n---\n").contains("state the licence `my-own`"));
    assert!(card("c", "# Model\nlicense: none\n").contains("state no licence"));
}
