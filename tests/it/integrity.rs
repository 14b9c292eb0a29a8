//! Damage is found before results are made from it: in containers, in work folders, and in models
//! that change while they are read.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use sdxl_squeeze::container::Container;

use crate::coreml::made_up;
use crate::squeeze::Squeeze;
use crate::support::{copy, ended_with, repo, tiny};

/// A pseudorandom number that depends only on `i`.
fn scrambled(i: usize) -> usize {
    let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20) as usize
}

fn flip(path: &Path, bit: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let bit = bit % (8 * bytes.len());
    bytes[bit / 8] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}

/// `generate` with one step.
fn generate(model: &Path, picture: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).args(["--prompt", "a", "--steps", "1", "--overwrite"]).with("-o", picture)
}

/// Writes a small model whose weights are fp32.
fn synth_in_fp32(out: &Path) {
    Squeeze::new("synth").args(["--preset", "tiny", "--dtype", "f32"]).out(out).succeeds();
}

// --- containers

/// Writes a container of the small model's UNet.
fn container(folder: &Path) -> PathBuf {
    let path = folder.join("unet.squeezed.safetensors");
    // One that can be exported to every format.
    made_up::container_without_masked_vectors(&repo("tests/golden/base-like"), &path);
    path
}

#[test]
fn a_flipped_bit_anywhere_in_a_container_is_found_on_opening() {
    let folder = tempfile::tempdir().unwrap();
    let path = container(folder.path());
    let whole = std::fs::read(&path).unwrap();
    for i in 0..300 {
        let bit = scrambled(i) % (8 * whole.len());
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, bytes).unwrap();
        assert!(Container::open(&path).unwrap_err().is_bad_input(), "bit {bit}");
    }
}

#[test]
fn every_command_that_reads_a_container_refuses_a_damaged_one_as_verify_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = container(folder.path());
    let model = repo("tests/golden/base-like");
    let out = |name: &str| folder.path().join(name);
    let (picture, decoded, package, buffers) = (out("x.png"), out("decoded"), out("x.mlpackage"), out("b.safetensors"));
    let commands = [
        Squeeze::new("inspect").arg(&path),
        Squeeze::new("export").arg(&path).with("--to", "diffusers").model(&model).out(&decoded),
        Squeeze::new("export").arg(&path).with("--to", "coreml").out(&package),
        Squeeze::new("export").arg(&path).with("--to", "coremltools").with("--small-weights", "move").out(&buffers),
        generate(&model, &picture).with("--unet", &path),
    ];
    // The changed bits are the lowest one of a tensor that is stored without compression, and the
    // lowest one of the last palette. Only a check of hashes finds these changes.
    let whole = std::fs::read(&path).unwrap();
    let parsed = SafeTensors::deserialize(&whole).unwrap();
    let at = |name: &str| {
        let view = parsed.tensor(name).unwrap();
        view.data().as_ptr() as usize - whole.as_ptr() as usize
    };
    let palettes = parsed.names().into_iter().filter(|name| name.ends_with(".palettes")).max().unwrap().to_owned();
    for at in [at("conv_in.bias"), at(&palettes)] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let said = Squeeze::new("verify").arg(&path).ends_with(2).text();
        for command in &commands {
            assert_eq!(command.ends_with(2).text(), said, "{command:?}");
        }
        assert!(![&picture, &decoded, &package, &buffers].iter().any(|path| path.exists()));
    }
    for command in &commands {
        command.clone().arg("--no-verify").succeeds();
    }
    assert!([&picture, &decoded, &package, &buffers].iter().all(|path| path.exists()));
}

// --- runs

/// A model and prompts in a folder of their own, and the config of a run.
struct Run {
    folder: tempfile::TempDir,
    config: PathBuf,
}

impl Run {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(tiny(), &folder.path().join("model"));
        std::fs::write(folder.path().join("prompts.txt"), "a cat\na dog\na red fish\n").unwrap();
        std::fs::write(folder.path().join("captions.txt"), "a house\na tree\na very old car\n").unwrap();
        Run { folder, config: repo("configs/tutorial-s50-4bit-gs16.yaml") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("out")
    }

    fn unet(&self) -> PathBuf {
        self.path("model/unet/diffusion_pytorch_model.safetensors")
    }

    fn work(&self) -> PathBuf {
        self.path("out/unet.squeezed.work")
    }

    fn squeeze(&self) -> Squeeze {
        Squeeze::new("compress")
            .config_file(&self.config)
            .model(self.path("model"))
            .out(self.out())
            .with("--prompts", self.path("prompts.txt"))
            .with("--captions", self.path("captions.txt"))
            .args(["--calibration-nsamples", "6", "--steps", "4"])
    }

    fn ends(&self, code: i32, more: &[&str]) -> String {
        self.squeeze().args(more).ends_with(code).text()
    }

    fn start(&self) -> Child {
        self.squeeze().command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Starts a run and waits until it has written the file `name` to its work folder.
    fn started_until(&self, name: &str) -> Child {
        let mut child = self.start();
        let begin = Instant::now();
        while !self.work().join(name).exists() {
            assert!(child.try_wait().unwrap().is_none() && begin.elapsed() < Duration::from_secs(300), "no {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child
    }

    /// Starts a run and kills it when it has written the file `name`.
    fn killed_at(&self, name: &str) {
        let mut child = self.started_until(name);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn result(&self) -> Vec<u8> {
        std::fs::read(self.out().join("unet.squeezed.safetensors")).unwrap()
    }
}

/// The container of a run that is not disturbed.
fn undisturbed() -> &'static [u8] {
    static RESULT: OnceLock<Vec<u8>> = OnceLock::new();
    RESULT.get_or_init(|| {
        let run = Run::new();
        run.ends(0, &[]);
        run.result()
    })
}

/// Waits for a child, which must end with the exit code `code`, and returns its output.
fn waited(child: Child, code: i32) -> String {
    ended_with(code, &child.wait_with_output().unwrap())
}

/// Returns whether the result of `run` equals that of an undisturbed run. Only data and sources are
/// compared, because other metadata has the paths of the run.
fn is_undisturbed(run: &Run) -> bool {
    let data = |bytes: &[u8]| bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..].to_vec();
    let sources = |bytes: &[u8]| SafeTensors::read_metadata(bytes).unwrap().1.metadata().as_ref().unwrap()["sources"].clone();
    let ours = run.result();
    data(&ours) == data(undisturbed()) && sources(&ours) == sources(undisturbed())
}

#[test]
fn a_damaged_file_of_the_work_folder_is_made_again_and_said() {
    undisturbed();
    let run = Run::new();
    run.killed_at("part-0003.safetensors");
    let (kept, work) = (run.path("kept"), run.work());
    copy(&work, &kept);
    let files = [
        ("part-0000.safetensors", "and all that were finished after it, are made again"),
        ("part-0002.safetensors", "and all that were finished after it, are made again"),
        ("samples.safetensors", "the samples are made again"),
        ("samples.safetensors.sha256", "the samples are made again"),
        ("samples.json", "is damaged, and made again"),
        ("run.json", "run.json is damaged"),
    ];
    for (number, (name, words)) in files.into_iter().enumerate() {
        std::fs::remove_dir_all(run.out()).unwrap();
        copy(&kept, &work);
        flip(&work.join(name), scrambled(number));
        let said = run.ends(0, &["--resume"]);
        assert!(said.contains(words) && said.contains("note: "), "{name}: {said}");
        assert!(is_undisturbed(&run), "{name}");
    }
}

#[test]
fn settings_that_were_found_are_found_again_if_they_are_damaged() {
    let mut run = Run::new();
    run.config = run.path("budget.yaml");
    let yaml = "solver: joint\npalettize:\n  global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 16}\n  \
                module_name_configs: {'(up|down)_blocks\\..*': null}\n  \
                on_misfit: dense\nbudget: {target_bits: 6.0, min_bits: 3, max_sparsity: 0.4}\n";
    std::fs::write(&run.config, yaml).unwrap();
    run.ends(0, &[]);
    let whole = run.result();
    std::fs::remove_dir_all(run.out()).unwrap();
    run.killed_at("recipe.yaml.sha256");
    // The flipped bit is in the middle of the settings, where it changes a width or the name of a
    // rule.
    let recipe = run.work().join("recipe.yaml");
    flip(&recipe, 4 * std::fs::metadata(&recipe).unwrap().len() as usize);
    let said = run.ends(0, &["--resume"]);
    assert!(said.contains("recipe.yaml is damaged, and made again"), "{said}");
    assert!(run.result() == whole);
}

#[test]
fn a_resumed_run_reads_what_it_read_before() {
    let run = Run::new();
    run.killed_at("part-0000.safetensors");
    for (name, word) in [
        ("prompts.txt", "prompts"),
        ("captions.txt", "captions"),
        ("model/text_encoder/model.safetensors", "text encoders and scheduler"),
        ("model/scheduler/scheduler_config.json", "text encoders and scheduler"),
        ("model/unet/config.json", "model"),
    ] {
        let path = run.path(name);
        let before = std::fs::read(&path).unwrap();
        match name.rsplit('.').next() {
            // The flipped bit is the lowest bit of a small number.
            Some("safetensors") => flip(&path, 8 * (before.len() - 4)),
            Some("json") => std::fs::write(&path, [&before[..], b"\n"].concat()).unwrap(),
            _ => std::fs::write(&path, [&before[..], b"another line\n"].concat()).unwrap(),
        }
        let said = run.ends(2, &["--resume"]);
        assert!(said.contains(&format!("changed since it began: {word} (")), "{name}: {said}");
        std::fs::write(&path, before).unwrap();
    }
    run.ends(0, &["--resume"]);
    assert!(is_undisturbed(&run));
}

/// Waits longer than the resolution of file times, so that the next write gets a later time.
fn tick() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn a_model_that_is_overwritten_or_cut_short_under_way_ends_the_run_in_a_line() {
    let overwrite = |path: &Path| {
        let mut file = File::options().write(true).open(path).unwrap();
        let end = file.seek(SeekFrom::End(-1000)).unwrap();
        assert!(end > 0);
        file.write_all(&[1; 8]).unwrap();
    };
    let cut = |path: &Path| File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
    for change in [&overwrite as &dyn Fn(&Path), &cut] {
        let run = Run::new();
        tick();
        let child = run.started_until("run.json");
        change(&run.unet());
        let said = waited(child, 1);
        let line = format!("{}: changed while the run was under way", run.unet().display());
        assert!(said.lines().any(|said| said.contains("error") && said.contains(&line)), "{said}");
        assert!(!run.out().join("unet.squeezed.safetensors").exists());
    }
}

#[test]
fn a_model_that_is_replaced_under_way_is_used_as_it_was() {
    let run = Run::new();
    let replace = |path: &Path, content: Vec<u8>| {
        let other = path.with_extension("other");
        std::fs::write(&other, content).unwrap();
        std::fs::rename(&other, path).unwrap();
    };
    let child = run.started_until("run.json");
    let weights = std::fs::read(run.unet()).unwrap();
    replace(&run.unet(), weights.iter().map(|byte| byte ^ 1).collect());
    replace(&run.path("model/unet/config.json"), b"{}".to_vec());
    replace(&run.path("prompts.txt"), b"something else\n".to_vec());
    replace(&run.path("captions.txt"), b"something else\n".to_vec());
    waited(child, 0);
    assert!(is_undisturbed(&run));
}

/// `generate` and `export` read a container too quickly for a test to overwrite it meanwhile, so
/// the test uses the library.
#[test]
fn a_container_that_changes_after_it_was_opened_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = container(folder.path());
    tick();
    let open = Container::open(&path).unwrap();
    let layer = open.layers().next().unwrap().name;
    open.weight(&layer).unwrap();
    flip(&path, 1 << 20);
    let why = open.weight(&layer).unwrap_err();
    assert!(why.to_string().contains("changed while the run was under way") && !why.is_bad_input(), "{why}");
}

// --- values

/// Replaces the middle element of an fp32 tensor by `value`.
fn put(path: &Path, name: &str, value: f32) {
    let mut bytes = std::fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let view = parsed.tensor(name).unwrap();
    assert_eq!(view.dtype(), safetensors::Dtype::F32);
    let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize + view.data().len() / 8 * 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn values_that_are_no_numbers_are_named_when_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("x.png");
    for (i, (file, tensor)) in [
        ("unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1.bias"),
        ("text_encoder/model.safetensors", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
    ]
    .into_iter()
    .enumerate()
    {
        let model = folder.path().join(format!("model-{i}"));
        synth_in_fp32(&model);
        put(&model.join(file), tensor, [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i]);
        let said = generate(&model, &picture).ends_with(2).text();
        assert!(said.contains(&format!("`{tensor}` has NaN or infinite values (first at index ")), "{said}");
        assert!(!picture.exists());
    }
}

#[test]
fn what_a_container_cannot_hold_is_said_before_anything_is_computed() {
    let run = Run::new();
    std::fs::remove_dir_all(run.path("model")).unwrap();
    synth_in_fp32(&run.path("model"));
    let tensor = "mid_block.attentions.0.proj_in.weight";
    for (value, words) in [(-1e6, "has values of up to 1e6, but fp16 ends at 65504"), (f32::NAN, "has NaN or infinite values")] {
        put(&run.unet(), tensor, value);
        let said = run.ends(2, &[]);
        assert!(said.contains(&format!("`{tensor}` {words}")), "{said}");
        assert!(!run.work().exists());
        let package = run.path("x.mlpackage");
        let said = Squeeze::new("export").arg(run.path("model")).with("--to", "coreml").out(&package).ends_with(2).text();
        assert!(said.contains(&format!("`{tensor}` {words}")) && !package.exists(), "{said}");
    }
    // In fp32 the large value is used; in fp16 the error names its tensor.
    put(&run.unet(), tensor, 1e6);
    let (model, picture) = (run.path("model"), run.path("x.png"));
    generate(&model, &picture).with("--dtype", "f32").succeeds();
    let said = generate(&model, &picture).with("--dtype", "f16").ends_with(2).text();
    assert!(said.contains(&format!("`{tensor}` has values of up to 1e6")) && said.contains("--dtype f32 or bf16"), "{said}");
}

// --- files as people have them

#[test]
fn attention_of_the_vae_may_be_stored_as_convolutions() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    let path = model.join("vae/diffusion_pytorch_model.safetensors");
    let drawn = |name: &str| {
        let picture = folder.path().join(name);
        generate(&model, &picture).succeeds();
        std::fs::read(&picture).unwrap()
    };
    let before = drawn("before.png");
    let whole = std::fs::read(&path).unwrap();
    for old_names in [false, true] {
        let parsed = SafeTensors::deserialize(&whole).unwrap();
        let mut changed = 0;
        let tensors: Vec<_> = parsed
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let mut shape = view.shape().to_vec();
                if name.contains(".attentions.") && shape.len() == 2 {
                    shape.extend([1, 1]);
                    changed += 1;
                }
                let mut name = name;
                if old_names && name.contains(".attentions.") {
                    for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
                        name = name.replace(&format!(".{new}."), &format!(".{old}."));
                    }
                }
                (name, safetensors::tensor::TensorView::new(view.dtype(), shape, view.data()).unwrap())
            })
            .collect();
        assert!(changed >= 4);
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        assert!(drawn("after.png") == before);
        Squeeze::new("inspect").arg(&model).arg("--summary").succeeds();
    }
}

#[test]
fn a_file_for_a_model_is_read_as_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sdxl.safetensors");
    std::fs::write(&file, b"x").unwrap();
    let (config, judge, out) =
        (repo("configs/tutorial-s50-4bit-gs16.yaml"), repo("calibration/emoji.txt"), folder.path().join("out"));
    for run in [
        generate(&file, &out),
        Squeeze::new("compress").config_file(&config).model(&file).out(&out),
        Squeeze::new("plan").arg(&config).model(&file),
        Squeeze::new("compare").arg(&config).model(&file).with("--judge", &judge).out(&out),
    ] {
        run.ends_with(2).says(&["sdxl.safetensors: not a whole safetensors file: it is too short for a header (1 bytes)"]);
    }
}

#[test]
fn the_build_is_shown() {
    let said = Squeeze::new("--version").succeeds().text();
    assert!(said.contains(&format!("(build {})", sdxl_squeeze::compress::BUILD)), "{said}");
    assert_eq!(sdxl_squeeze::compress::BUILD.len(), 16);
}
