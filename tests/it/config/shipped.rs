//! The shipped files in configs/ and calibration/.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sdxl_squeeze::codebook::{Grid, LayerKind, PruneMethod, Quantizer, Sparsity};
use sdxl_squeeze::config::{
    BudgetTarget, Choice, Finding, LayerInfo, Prompts, Resolution, RunConfig, SequencingWord, Severity, SolverKind, Target,
    TimestepWeighting, Why, read_prompts,
};
use sdxl_squeeze::inspect::{Inspection, inspect};

use crate::support::{emoji, repo};
use crate::synth::PUBLISHED_SDXL_BASE;

/// The configs in a folder that compress the UNet, by their names without `.yaml`.
fn configs(folder: &str) -> BTreeMap<String, RunConfig> {
    let mut all = all_configs(folder);
    all.retain(|_, config| config.compresses_unet());
    all
}

/// All configs in a folder, by their names without `.yaml`.
fn all_configs(folder: &str) -> BTreeMap<String, RunConfig> {
    let entries = std::fs::read_dir(repo(folder)).unwrap().map(|entry| entry.unwrap().path());
    let entries = entries.filter(|path| path.extension() == Some("yaml".as_ref()));
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    entries.map(|path| (name(&path), RunConfig::read(&path).unwrap_or_else(|why| panic!("{why}")))).collect()
}

fn layers(model: &Inspection) -> Vec<LayerInfo> {
    let ends = [0, model.stages.len() - 1];
    let rows = model.stages.iter().enumerate().flat_map(|(at, stage)| stage.layers.iter().map(move |layer| (at, stage, layer)));
    rows.map(|(at, stage, layer)| LayerInfo {
        name: layer.name.clone(),
        stage: (!ends.contains(&at)).then(|| stage.name.clone()),
        module_type: if layer.kind == "Linear" { LayerKind::Linear } else { LayerKind::Conv2d },
        shape: layer.shape.clone(),
    })
    .collect()
}

fn sdxl() -> Inspection {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), PUBLISHED_SDXL_BASE).unwrap();
    inspect(folder.path()).unwrap()
}

/// The bytes of the weights: a mask bit for each element of a pruned layer, n bits for each kept
/// element or vector, fp16 palettes, and fp16 for all other parameters.
fn payload(model: &Inspection, layers: &[LayerInfo], resolution: &Resolution) -> f64 {
    let mut bytes = 0.0;
    let mut counted = 0.0;
    for (layer, resolved) in layers.iter().zip(&resolution.layers) {
        let elements = layer.shape.iter().product::<i64>() as f64;
        counted += elements;
        let pruned = resolved.prune.settings().map(|settings| settings.sparsity.target());
        let stored = elements * (1.0 - pruned.unwrap_or(0.0));
        bytes += if pruned.is_some() { elements / 8.0 } else { 0.0 };
        bytes += match resolved.palettize.settings() {
            Some(settings) => {
                let groups = settings.grouping.group_size().map_or(1, |size| layer.shape[settings.axis] / size as i64);
                let vector = settings.vector_length as f64;
                let palettes = (groups * 2 * settings.bits.entries() as i64) as f64 * vector;
                let columns = layer.shape[1..].iter().product::<i64>() as usize;
                let blocks = settings.quantizer.map_or(0, |quantizer| columns.div_ceil(quantizer.block_size));
                let scales = (layer.shape[0] as usize * blocks * 2) as f64;
                stored / vector * f64::from(settings.bits.bits()) / 8.0 + palettes + scales
            }
            None => stored * 2.0,
        };
    }
    bytes + (model.parameters as f64 - counted) * 2.0
}

#[test]
fn a_file_for_each_row_of_the_tutorial_has_sdxls_size() {
    // Sizes in GiB that were computed independently of this program. They equal those of the
    // tutorial's table without the Core ML program.
    let table = [
        ("dense-8bit", 2.393),
        ("dense-6bit", 1.795),
        ("dense-4bit", 1.198),
        ("dense-4bit-gs4", 1.209),
        ("dense-4bit-gs16", 1.201),
        ("dense-4bit-gs32", 1.199),
        ("tutorial-s40-4bit-gs4", 1.030),
        ("tutorial-s40-4bit-gs16", 1.021),
        ("tutorial-s50-4bit-gs4", 0.910),
        ("tutorial-s50-4bit-gs16", 0.902),
        ("tutorial-2of4-4bit-gs16", 0.902),
        ("magnitude-s40-4bit-gs16", 1.021),
        // The tutorial has no such rows; these are configs of this project.
        ("squeeze-s40-4bit-gs16", 1.021),
        ("squeeze-s50-4bit-gs16", 0.902),
        ("squeeze-4bit-gs16", 1.201),
        ("squeeze-3bits", 0.902),
        ("squeeze-6bit-v2", 0.899),
        // 4 bits and 2 bytes for every 64 columns.
        ("rtn-int4-g64", 1.272),
        ("nf4-g64", 1.272),
        ("gptq-int4-g64", 1.272),
    ];
    let configs = configs("configs");
    assert_eq!(configs.keys().map(String::as_str).collect::<BTreeSet<_>>(), table.iter().map(|(name, _)| *name).collect());
    let model = sdxl();
    let layers = layers(&model);
    assert_eq!(layers.len(), 794);
    for (name, gib) in table {
        let config = &configs[name];
        let resolution = config.resolve(&layers).checked().unwrap_or_else(|why| panic!("{name}: {why}"));
        let found = match config.budget.as_ref().map(|budget| budget.target) {
            None => payload(&model, &layers, &resolution),
            // The target is taken for all parameters here. It actually holds for the weights of the
            // stages, beside which layers outside of the stages and small tensors count as they
            // are; the bound below allows for the difference.
            Some(BudgetTarget::Bits(bits)) => model.parameters as f64 * bits / 8.0,
            Some(BudgetTarget::Size(bytes)) => bytes as f64,
            Some(target @ (BudgetTarget::Error(_) | BudgetTarget::Psnr(_))) => panic!("{name}: {target:?} is no size"),
        } / (1u64 << 30) as f64;
        let bound = if config.budget.is_some() { 0.006 } else { 0.0011 };
        assert!((found - gib).abs() < bound, "{name}: {found:.4} GiB, not {gib}");
        let header = std::fs::read_to_string(repo(&format!("configs/{name}.yaml"))).unwrap();
        assert!(header.lines().take(3).all(|line| line.starts_with("# ")), "{name} says what it is");
        assert!(header.contains(&format!("SDXL's UNet: {gib:.3} GiB")), "{name} says its size");
        let warnings: Vec<&Finding> =
            resolution.findings.iter().filter(|finding| finding.severity() == Severity::Warning).collect();
        let conv_out =
            |finding: &&Finding| matches!(finding, Finding::GroupMisfit { layer, channels: 4, .. } if layer == "conv_out");
        assert!(warnings.iter().all(conv_out), "{name}: {warnings:?}");
        let groups = ["gs16", "gs32", "3bits"].iter().any(|end| name.ends_with(end));
        assert_eq!(warnings.len(), usize::from(groups), "{name}: {warnings:?}");
    }
}

#[test]
fn names_say_what_is_in_the_files_and_the_bundled_model_takes_them() {
    let model = inspect(&emoji()).unwrap();
    let layers = layers(&model);
    let others = |name: &str| name.starts_with("squeeze") || name.ends_with("-g64");
    for (name, config) in configs("configs").into_iter().filter(|(name, _)| !others(name)) {
        assert_eq!(config.solver, SolverKind::Sequential, "{name}");
        let rules = config.palettize.as_ref().unwrap().rules.clone();
        let settings = rules.global_config.unwrap();
        let mut said = String::new();
        if let Some(prune) = &config.prune {
            said += &match prune.rules.global_config.unwrap().sparsity {
                Sparsity::Unstructured(share) if prune.algorithm == PruneMethod::Magnitude => {
                    format!("magnitude-s{:.0}-", share * 100.0)
                }
                Sparsity::Unstructured(share) => format!("tutorial-s{:.0}-", share * 100.0),
                Sparsity::NOfM(ratio) => format!("tutorial-{}of{}-", ratio.n, ratio.m),
            };
        } else {
            said += "dense-";
        }
        said += &format!("{}bit", settings.bits);
        said += &settings.grouping.group_size().map_or(String::new(), |size| format!("-gs{size}"));
        assert_eq!(name, said);
        if config.is_calibrated() {
            assert_eq!(config.calibration.prompts, Prompts::File("calibration/tutorial.txt".into()), "{name}");
            assert_eq!(config.calibration.calibration_nsamples, 128, "{name}");
        }
        assert_eq!((rules.module_type_configs.len(), rules.module_name_configs.len()), (0, 0));
        let resolution = config.resolve(&layers).checked().unwrap_or_else(|why| panic!("{name}: {why}"));
        for layer in resolution.layers.iter().filter(|layer| layer.palettize.settings().is_none()) {
            let small = layer.palettize == Choice::Leave(Why::Small { weight_threshold: 2048 });
            assert!(small || layer.name == "conv_out", "{name}: {layer:?}");
        }
        let pruned = resolution.layers.iter().filter(|layer| layer.prune.settings().is_some()).count();
        let in_stages = layers.iter().filter(|layer| layer.stage.is_some()).count();
        assert_eq!(pruned, if config.prune.is_some() { in_stages } else { 0 }, "{name}");
        let written = RunConfig::parse("x".as_ref(), config.to_yaml().as_bytes()).unwrap();
        assert_eq!(written, config);
    }
}

#[test]
fn our_own_configs_ask_for_everything_that_pays() {
    let emoji = configs("configs/emoji");
    let of_sdxl = configs("configs");
    let ours = emoji.iter().chain(&of_sdxl).filter(|(name, _)| name.starts_with("squeeze"));
    assert_eq!(ours.clone().count(), 6 + 5);
    for (name, config) in ours {
        assert_eq!(
            (config.solver, config.sequencing, config.target),
            (SolverKind::Joint, SequencingWord::Sublayer, Target::Dense),
            "{name}"
        );
        assert!(config.calibration.calibration_nsamples == 384, "{name}");
        assert_eq!(config.calibration.timestep_weighting, TimestepWeighting::Uniform, "{name}: others do not pay");
        let prompts = config.calibration.prompts.load().unwrap();
        assert_eq!(prompts.len(), 48, "{name}");
    }
    let model = inspect(&crate::support::emoji()).unwrap();
    let layers = layers(&model);
    for (name, config) in emoji {
        config.resolve(&layers).checked().unwrap_or_else(|why| panic!("{name}: {why}"));
        if let Some(tutorial) = name.strip_prefix("tutorial-") {
            assert_eq!((config.solver, config.calibration.calibration_nsamples), (SolverKind::Sequential, 128), "{name}");
            // The two configs that are compared differ in the method, but not in sparsity and
            // palettes.
            let ours = RunConfig::read(&repo(&format!("configs/emoji/squeeze-{tutorial}.yaml"))).unwrap();
            assert_eq!((&ours.prune, &ours.palettize), (&config.prune, &config.palettize), "{name}");
        }
    }
}

/// Round to nearest, NF4 and GPTQ have equal bytes, which are those of 4.25 bits a weight.
#[test]
fn baselines_of_other_programs_have_equal_bytes() {
    let folders = [("configs/emoji", inspect(&emoji()).unwrap()), ("configs", sdxl())];
    for (folder, model) in folders {
        let (layers, configs) = (layers(&model), configs(folder));
        let mut sizes = Vec::new();
        for (name, grid, feedback) in
            [("rtn-int4-g64", Grid::Int, false), ("nf4-g64", Grid::Nf4, false), ("gptq-int4-g64", Grid::Int, true)]
        {
            let config = &configs[name];
            assert_eq!((config.solver, config.is_calibrated()), (SolverKind::Sequential, feedback), "{name}");
            let settings = config.palettize.as_ref().unwrap().rules.global_config.unwrap();
            assert_eq!(settings.quantizer, Some(Quantizer { grid, block_size: 64, feedback }), "{name}");
            if feedback {
                let ours = &configs["squeeze-4bit-gs16"];
                assert_eq!((&config.calibration, config.sequencing), (&ours.calibration, SequencingWord::Sublayer));
            }
            let resolution = config.resolve(&layers).checked().unwrap();
            assert!(resolution.findings.iter().all(|finding| finding.severity() != Severity::Warning), "{name}");
            sizes.push(payload(&model, &layers, &resolution));
        }
        assert!(sizes.windows(2).all(|pair| pair[0] == pair[1]), "{folder}: {sizes:?}");
        // 64 divides the columns of nearly all weights; palettes and small tensors are little.
        let bits = 8.0 * sizes[0] / model.parameters as f64;
        assert!((4.25..4.45).contains(&bits), "{folder}: {bits:.3} bits a parameter");
    }
    let kmeans = &configs("configs/emoji")["kmeans-4bit"];
    let dense = &configs("configs")["dense-4bit"];
    assert_eq!(kmeans.palettize.as_ref().unwrap().rules, dense.palettize.as_ref().unwrap().rules);
    assert!(kmeans.solver == SolverKind::Sequential && !kmeans.is_calibrated());
}

/// The name of the emoji in a prompt.
fn subject(prompt: &str) -> String {
    let prefixes = ["an emoji of an ", "an emoji of a ", "a picture of an ", "a picture of a "];
    prefixes.iter().find_map(|prefix| prompt.strip_prefix(prefix)).unwrap_or(prompt).to_owned()
}

fn subjects(file: &str) -> Vec<String> {
    let known: BTreeSet<String> =
        std::fs::read_to_string(emoji().join("prompts.txt")).unwrap().lines().map(str::to_owned).collect();
    let subjects: Vec<String> =
        read_prompts(&repo("calibration").join(file)).unwrap().iter().map(|prompt| subject(prompt)).collect();
    for subject in &subjects {
        assert!(known.contains(subject), "{file}: the bundled model does not know `{subject}`");
    }
    assert_eq!(subjects.iter().collect::<BTreeSet<_>>().len(), subjects.len(), "{file}: twice the same");
    subjects
}

#[test]
fn what_is_judged_on_is_never_calibrated_on() {
    let files: Vec<String> =
        std::fs::read_dir(repo("calibration")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let others = ["emoji-judge.txt", "emoji-captions.txt"];
    let calibration: Vec<&String> =
        files.iter().filter(|file| file.starts_with("emoji") && !others.contains(&file.as_str())).collect();
    assert_eq!(calibration.len(), 2, "{calibration:?}");
    let judge = subjects("emoji-judge.txt");
    assert_eq!(judge.len(), 16);
    for file in calibration {
        for subject in subjects(file) {
            assert!(!judge.contains(&subject), "{file}: `{subject}` is judged on");
        }
    }
    let captions = read_prompts(&repo("calibration/emoji-captions.txt")).unwrap();
    assert_eq!(captions.len(), 3 * (420 - 16));
    assert!(captions.iter().all(|caption| !judge.contains(&subject(caption))));
    let (captions, varied) =
        (read_prompts(&repo("calibration/captions.txt")).unwrap(), read_prompts(&repo("calibration/varied.txt")).unwrap());
    assert!(captions.len() == 3000 && varied.len() == 48 && varied.iter().all(|prompt| captions.contains(prompt)));
    let judge = read_prompts(&repo("calibration/judge.txt")).unwrap();
    let tutorial = read_prompts(&repo("calibration/tutorial.txt")).unwrap();
    assert!(judge.len() == 16 && judge.iter().all(|prompt| !captions.contains(prompt) && !tutorial.contains(prompt)));
    assert_eq!((subjects("emoji.txt").len(), subjects("emoji-varied.txt").len()), (3, 48));
    assert_eq!(read_prompts(&repo("calibration/tutorial.txt")).unwrap().len(), 3);
}

#[test]
fn files_of_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.txt");
    let read = |content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        read_prompts(&file)
    };
    assert_eq!(read("\u{feff}# c\r\n a cat \r\n\n  # d\nun été\n".as_bytes()).unwrap(), ["a cat", "un été"]);
    for (content, words) in [(&b""[..], "no prompts"), (b"# x\n\n", "no prompts"), (b"a\xff", "not UTF-8 text from byte 1")] {
        let error = read(content).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(words), "{error}");
    }
    let absent = Prompts::File(folder.path().join("absent.txt")).load().unwrap_err();
    assert!(absent.is_bad_input() && absent.to_string().contains("absent.txt"));
    assert_eq!(Prompts::List(vec!["a".into()]).load().unwrap(), ["a"]);
    let absent = RunConfig::read(&folder.path().join("absent.yaml")).unwrap_err();
    assert!(absent.is_bad_input() && absent.to_string().contains("cannot read"));
}

/// The configs for text encoders and VAE: the same settings for the bundled model and for SDXL, and
/// the ends of the decoder stay fp16.
#[test]
fn the_configs_for_text_encoders_and_vae_compress_nothing_else() {
    let of = |folder: &str| -> BTreeMap<String, RunConfig> {
        all_configs(folder).into_iter().filter(|(_, config)| !config.compresses_unet()).collect()
    };
    let (sdxl, emoji) = (of("configs"), of("configs/emoji"));
    assert_eq!(sdxl.keys().collect::<Vec<_>>(), ["squeeze-text-vae"]);
    assert_eq!(emoji.keys().collect::<Vec<_>>(), ["squeeze-text-vae"]);
    let (sdxl, emoji) = (&sdxl["squeeze-text-vae"], &emoji["squeeze-text-vae"]);
    assert_eq!((&sdxl.text_encoders, sdxl.solver), (&emoji.text_encoders, SolverKind::Joint));
    assert_eq!(sdxl.vae, emoji.vae);
    for config in [sdxl, emoji] {
        assert_eq!(config.calibration.prompts.load().unwrap().len(), 48);
        assert!(config.calibration.captions.as_ref().is_some_and(|path| repo(&path.to_string_lossy()).is_file()));
        let rules = &config.vae.as_ref().unwrap().network.palettize.rules;
        let ends = rules.module_name_configs.iter().find(|(pattern, _)| pattern.value.matches("decoder.conv_out"));
        assert!(ends.unwrap().1.is_none());
        let written = RunConfig::parse("x".as_ref(), config.to_yaml().as_bytes()).unwrap();
        assert_eq!(&written, config);
    }
}
