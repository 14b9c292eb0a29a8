//! Results on a GPU, compared with results on the CPU. Without a GPU these tests skip themselves
//! and say so.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use sdxl_squeeze::codebook::{BitWidth, Effort, Grouping, NmRatio, PaletteOptions, PruneMethod, PruneOptions, Sparsity};
use sdxl_squeeze::compress::{Evidence, compress_layer};
use sdxl_squeeze::device::{Placement, cuda_devices};
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder, sample};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::{Generator, noise};
use sdxl_squeeze::recipe::LayerRecipe;
use sdxl_squeeze::solver::{
    Factor, Hessian, InputGeometry, Joint, JointFactors, JointOptions, LayerEvidence, OutputResidual, Pruned, Windows, joint,
    prune_many,
};
use tch::{Device, Kind, Tensor};

use crate::memory::waiting_changes_no_byte;
use crate::overflow::scaled;
use crate::squeeze::Squeeze;
use crate::support::{emoji, relative_error, report, tensors};

/// Returns whether there is a GPU. If there is none, the function says so on standard error, where
/// it is visible even if the output of passing tests is captured.
pub(crate) fn has_gpu(test: &str) -> bool {
    match cuda_devices() {
        Ok(_) => true,
        Err(why) => {
            writeln!(std::io::stderr(), "{test}: skipped, {why}").expect("standard error is open");
            false
        }
    }
}

fn final_latents(device: Device) -> Tensor {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let placement = Placement { device, kind: Kind::Float };
    let encoder = PromptEncoder::load(&folder, placement).unwrap();
    let guidance = Guidance::encode(&encoder, &folder, "a picture of a cat face!", None, 4.0, (64, 64)).unwrap();
    let weights = folder.unet_weights().unwrap();
    let unet = Unet::resident(folder.unet.clone(), weights.source(placement), &Silent).unwrap();
    let noise = noise(&[1, 4, 16, 16], 231, Kind::Float).unwrap().to_device(device);
    let mut scheduler = folder.scheduler.scheduler(30).unwrap();
    sample(&unet, scheduler.as_mut(), &guidance, &noise, &mut Generator::new(231), &mut |_, _| Ok(()), &Silent)
        .unwrap()
        .to_device(Device::Cpu)
}

#[test]
fn a_gpu_draws_what_the_cpu_draws() {
    if !has_gpu("a_gpu_draws_what_the_cpu_draws") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let latents = folder.path().join("cat.safetensors");
    // The program runs in its own process, in which TF32 is off from the start.
    Squeeze::new("generate")
        .model(emoji())
        .args(["--prompt", "a picture of a cat face!", "--seed", "231", "--guidance", "4", "--device", "cuda"])
        .arg("--latents-out")
        .arg(&latents)
        .arg("-o")
        .arg(folder.path().join("cat.png"))
        .succeeds();
    let error = relative_error(&tensors(&latents)["latents"], &final_latents(Device::Cpu));
    assert!(error < 1e-3, "{error}");
}

#[test]
fn a_gpu_encodes_many_prompts_as_the_cpu_encodes_each() {
    if !has_gpu("a_gpu_encodes_many_prompts_as_the_cpu_encodes_each") {
        return;
    }
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let encoder = |device| PromptEncoder::load(&folder, Placement { device, kind: Kind::Float }).unwrap();
    let (gpu, cpu) = (encoder(Device::Cuda(0)), encoder(Device::Cpu));
    let prompts: Vec<String> = (0..130).map(|number| format!("a picture of {number} owls")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let all = Guidance::encode_all(&gpu, &folder, &prompts, None, 4.0, (64, 64)).unwrap();
    for (ours, prompt) in all.iter().zip(prompts) {
        let single = Guidance::encode(&cpu, &folder, prompt, None, 4.0, (64, 64)).unwrap();
        let (ours, theirs) = (&ours.conditioning, &single.conditioning);
        let here = |tensor: &Tensor| tensor.to_device(Device::Cpu);
        assert!(relative_error(&here(&ours.encoder_hidden_states), &theirs.encoder_hidden_states) < 1e-4, "{prompt}");
        assert!(relative_error(&here(&ours.text_embeds), &theirs.text_embeds) < 1e-4, "{prompt}");
    }
}

#[test]
fn a_gpu_computes_in_bf16_what_is_beyond_fp16() {
    if !has_gpu("a_gpu_computes_in_bf16_what_is_beyond_fp16") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = scaled(folder.path(), 1e5);
    let run = |name: &str, dtype: &str| {
        let out = folder.path().join(name);
        let run = Squeeze::new("compress").config("squeeze-s40-4bit-gs16").model(&model).out(&out).samples(32, 4);
        run.args(["--device", "cuda", "--dtype", dtype]).succeeds();
        out
    };
    let (first, second, wide) = (run("first", "f16"), run("second", "f16"), run("wide", "f32"));
    assert!(container(&first) == container(&second), "another run, other bytes");
    let notes = report(&first)["notes"].to_string();
    assert!(notes.contains("the activations of `down_blocks.1.resnets.0") && notes.contains("computes in bf16"), "{notes}");
    assert!(!report(&wide)["notes"].to_string().contains("beyond fp16"));
    let mean = |out: &Path| {
        let report = report(out);
        let errors = report["layers"].as_array().unwrap().iter().filter_map(|layer| layer["errors"]["output"].as_f64());
        let errors: Vec<f64> = errors.collect();
        errors.iter().sum::<f64>() / errors.len() as f64
    };
    let ratio = mean(&first) / mean(&wide);
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
}

#[test]
fn a_gpu_draws_the_same_twice() {
    if !has_gpu("a_gpu_draws_the_same_twice") {
        return;
    }
    assert_eq!(final_latents(Device::Cuda(0)), final_latents(Device::Cuda(0)));
}

#[test]
fn a_gpu_prunes_layers_in_a_batch_as_the_cpu_does_one_by_one() {
    if !has_gpu("a_gpu_prunes_layers_in_a_batch_as_the_cpu_does_one_by_one") {
        return;
    }
    let random = |size: [i64; 2], seed| noise(&size, seed, Kind::Double).unwrap();
    let prune_on = |device: Device, options: &PruneOptions| -> Vec<Pruned> {
        let to = |tensor: Tensor| tensor.to_kind(Kind::Float).to_device(device);
        let hessians = (0..4).map(|at| {
            let mut hessian = Hessian::new(640, device).unwrap();
            hessian.add(&to(random([2000, 640], at).matmul(&random([640, 640], at + 10)))).unwrap();
            hessian
        });
        let hessians: Vec<Hessian> = hessians.collect();
        let factors: Vec<Factor> = hessians.iter().map(|hessian| Factor::new(hessian, 0, 0.01).unwrap()).collect();
        let weights: Vec<Tensor> = (0..4).map(|at| to(random([320, 640], at + 20))).collect();
        let layers: Vec<_> = (0..4).map(|at| (&weights[at], &hessians[at], &factors[at])).collect();
        prune_many(&layers, options).unwrap()
    };
    for sparsity in [Sparsity::Unstructured(0.4), Sparsity::NOfM(NmRatio { n: 2, m: 4 })] {
        let options = PruneOptions { sparsity, ..PruneOptions::default() };
        for (gpu, cpu) in prune_on(Device::Cuda(0), &options).iter().zip(prune_on(Device::Cpu, &options)) {
            let other = gpu.mask.to_device(Device::Cpu).not_equal_tensor(&cpu.mask).to_kind(Kind::Double);
            let (other, loss) = (other.mean(Kind::Double).double_value(&[]), gpu.loss / cpu.loss);
            assert!(other < 1e-3, "{sparsity:?}: {other:.1e} of the mask differ");
            assert!((loss - 1.0).abs() < 1e-3, "{sparsity:?}: the loss is {loss:.6} times the CPU's");
        }
    }
}

/// A layer [320, 700] solved jointly, with a dense target and held-out vectors.
fn solve_on(device: Device, options: &JointOptions) -> Joint {
    let random = |size: [i64; 2], seed| noise(&size, seed, Kind::Double).unwrap();
    let to = |tensor: Tensor| tensor.to_kind(Kind::Float).to_device(device);
    let directions = random([200, 700], 1);
    let inputs = |n: i64, seed| random([n, 200], seed).matmul(&directions) + 0.3 * random([n, 700], seed + 1);
    let (vectors, held_out) = (to(inputs(2100, 2)), to(inputs(100, 4)));
    let mut hessian = Hessian::new(700, device).unwrap();
    hessian.add(&vectors).unwrap();
    let mut residual = OutputResidual::for_weight(InputGeometry::Linear, &[320, 700], device).unwrap();
    residual.add(&vectors, &to(0.05 * random([2100, 320], 6))).unwrap();
    let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
    let evidence = LayerEvidence { residual: Some(&residual), held_out: Some(&held_out), metric: None };
    joint("layer", &to(random([320, 700], 7)), &hessian, &factors, &evidence, options).unwrap()
}

#[test]
fn a_gpu_solves_jointly_as_the_cpu_does() {
    if !has_gpu("a_gpu_solves_jointly_as_the_cpu_does") {
        return;
    }
    let prune = |sparsity| Some(PruneOptions { sparsity, ..PruneOptions::default() });
    let palettes = |bits, group_size| {
        Some(PaletteOptions { bits, grouping: Grouping::PerGroupedChannel { group_size }, ..PaletteOptions::default() })
    };
    let settings = [
        (prune(Sparsity::Unstructured(0.4)), palettes(BitWidth::Four, 16)),
        (prune(Sparsity::NOfM(NmRatio { n: 2, m: 4 })), palettes(BitWidth::Three, 8)),
        (prune(Sparsity::Unstructured(0.5)), None),
        (None, palettes(BitWidth::Four, 16)),
        (None, palettes(BitWidth::Eight, 320)),
    ];
    for (prune, palettize) in settings {
        let options = JointOptions::new(prune, palettize);
        let (gpu, cpu) = (solve_on(Device::Cuda(0), &options), solve_on(Device::Cpu, &options));
        for (gpu, cpu) in [(gpu.loss, cpu.loss), (gpu.sequential_loss, cpu.sequential_loss)] {
            assert!((gpu / cpu - 1.0).abs() < 0.01, "{options:?}: the loss is {gpu}, on the CPU {cpu}");
        }
        let kept = |joint: &Joint| joint.mask.as_ref().map(|mask| mask.iter().filter(|kept| **kept).count());
        assert_eq!(kept(&gpu), kept(&cpu));
        if let Some(palettized) = &gpu.palettized {
            assert_eq!(palettized.decode(gpu.mask.as_deref()).unwrap(), gpu.weight, "{options:?}");
        }
        let again = solve_on(Device::Cuda(0), &options);
        assert!(again.weight == gpu.weight && again.mask == gpu.mask, "{options:?}: another result the second time");
    }
}

/// A layer and its Hessian on `device`: a Linear [320, 640] or a convolution [64, 32, 3, 3].
fn layer_on(device: Device, is_conv: bool) -> (Tensor, Hessian) {
    let random = |size: &[i64], seed| noise(size, seed, Kind::Double).unwrap();
    let to = |tensor: Tensor| tensor.to_kind(Kind::Float).to_device(device);
    let (geometry, size, inputs) = if is_conv {
        let windows = Windows { stride: [1; 2], padding: [1; 2], dilation: [1; 2], groups: 1 };
        let mixed = random(&[12, 32, 256], 1).transpose(1, 2).matmul(&random(&[32, 32], 2)).transpose(1, 2);
        (InputGeometry::Windows(windows), vec![64, 32, 3, 3], mixed.reshape([12, 32, 16, 16]))
    } else {
        (InputGeometry::Linear, vec![320, 640], random(&[2000, 640], 1).matmul(&random(&[640, 640], 2)))
    };
    let mut hessian = Hessian::for_weight(geometry, &size, device).unwrap();
    hessian.add(&to(inputs)).unwrap();
    (to(0.05 * random(&size, 3)), hessian)
}

#[test]
fn a_gpu_compresses_layers_as_the_cpu_does() {
    if !has_gpu("a_gpu_compresses_layers_as_the_cpu_does") {
        return;
    }
    let prune = |sparsity| Some(PruneOptions { sparsity, ..PruneOptions::default() });
    let palettes = |bits, grouping| Some(PaletteOptions { bits, grouping, ..PaletteOptions::default() });
    let sixteen = Grouping::PerGroupedChannel { group_size: 16 };
    let recipe = |prune, palettize, joint| LayerRecipe { prune, method: PruneMethod::SparseGpt, palettize, joint };
    let recipes = [
        recipe(None, palettes(BitWidth::Four, sixteen), None),
        recipe(None, palettes(BitWidth::Eight, Grouping::PerTensor), None),
        recipe(None, palettes(BitWidth::One, Grouping::PerGroupedChannel { group_size: 4 }), None),
        recipe(prune(Sparsity::Unstructured(0.4)), palettes(BitWidth::Four, sixteen), None),
        recipe(prune(Sparsity::NOfM(NmRatio { n: 2, m: 4 })), palettes(BitWidth::Six, sixteen), None),
        recipe(prune(Sparsity::Unstructured(0.5)), None, None),
        recipe(prune(Sparsity::Unstructured(0.4)), palettes(BitWidth::Four, sixteen), Some(Effort::default())),
        recipe(None, palettes(BitWidth::Three, sixteen), Some(Effort::default())),
    ];
    for is_conv in [false, true] {
        for recipe in &recipes {
            let compress_on = |device| {
                let (weight, hessian) = layer_on(device, is_conv);
                compress_layer("layer", &weight, recipe, Some(Evidence::of(&hessian))).unwrap()
            };
            let (gpu, cpu) = (compress_on(Device::Cuda(0)), compress_on(Device::Cpu));
            let what = format!("conv {is_conv}, {recipe:?}");
            let bound = if recipe.joint.is_some() { 0.02 } else { 2e-3 };
            let near = |gpu: f64, cpu: f64| assert!((gpu / cpu - 1.0).abs() < bound, "{what}: {gpu}, on the CPU {cpu}");
            near(gpu.errors.output.unwrap(), cpu.errors.output.unwrap());
            near(gpu.errors.weight, cpu.errors.weight);
            assert_eq!(gpu.errors.pruned_output.is_some(), cpu.errors.pruned_output.is_some(), "{what}");
            let (stored, expected) = (gpu.stored.unwrap(), cpu.stored.unwrap());
            // Of equal scores the host prunes the first, the GPU all.
            assert!(stored.stored_bytes().abs_diff(expected.stored_bytes()) < 8, "{what}: {} bytes", stored.stored_bytes());
            // What is stored has the error that is reported.
            let (weight, _) = layer_on(Device::Cpu, is_conv);
            let decoded = Tensor::from_slice(&stored.decode().unwrap()).to_kind(Kind::Float).view(weight.size().as_slice());
            let distance = relative_error(&decoded, &weight).powi(2);
            assert!((distance / gpu.errors.weight - 1.0).abs() < 1e-3, "{what}: {distance}, reported {}", gpu.errors.weight);
            assert!(compress_on(Device::Cuda(0)).stored.unwrap() == stored, "{what}: another result the second time");
        }
    }
}

/// A run of the bundled model on a GPU with a few samples.
fn run_on_gpu(config: &str, out: &Path) -> Squeeze {
    Squeeze::new("compress").model(emoji()).config(config).samples(16, 4).out(out).args(["--device", "cuda"])
}

fn container(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("unet.squeezed.safetensors")).unwrap()
}

#[test]
fn a_run_on_a_gpu_gives_the_same_bytes_again_and_after_a_kill() {
    if !has_gpu("a_run_on_a_gpu_gives_the_same_bytes_again_and_after_a_kill") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for config in ["emoji/squeeze-s40-4bit-gs16", "tutorial-2of4-4bit-gs16"] {
        let out = |name: &str| folder.path().join(format!("{}-{name}", config.replace('/', "-")));
        let first = out("first");
        let begin = Instant::now();
        run_on_gpu(config, &first).succeeds();
        let whole = begin.elapsed();
        let killed = out("killed");
        for share in [0.5, 0.8] {
            let mut run = run_on_gpu(config, &killed).arg("--resume").starts();
            std::thread::sleep(whole.mul_f64(share));
            run.kill().unwrap();
            run.wait().unwrap();
        }
        run_on_gpu(config, &killed).arg("--resume").succeeds();
        assert!(container(&killed) == container(&first), "{config}: other bytes after a kill");
    }
}

#[test]
fn what_waits_on_the_host_comes_back_to_a_gpu_as_it_was() {
    if has_gpu("what_waits_on_the_host_comes_back_to_a_gpu_as_it_was") {
        for kind in [Kind::Float, Kind::Half] {
            waiting_changes_no_byte(Placement { device: Device::Cuda(0), kind });
        }
    }
}

#[test]
fn a_run_that_a_gpu_has_no_memory_for_goes_on_when_it_has() {
    if !has_gpu("a_run_that_a_gpu_has_no_memory_for_goes_on_when_it_has") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (whole, ended) = (folder.path().join("whole"), folder.path().join("ended"));
    run_on_gpu("tutorial-s40-4bit-gs16", &whole).succeeds();
    // Some MiB for all tensors.
    let settings = "per_process_memory_fraction:0.0005";
    let run = run_on_gpu("tutorial-s40-4bit-gs16", &ended).env("PYTORCH_CUDA_ALLOC_CONF", settings).ends_with(1);
    run.says(&["the device's memory is too small for ", "CUDA out of memory", "--memory-budget", "--resume"]);
    run_on_gpu("tutorial-s40-4bit-gs16", &ended).arg("--resume").succeeds();
    assert!(container(&whole) == container(&ended), "other bytes after a run without memory");
}

#[test]
fn a_small_memory_budget_and_a_byte_budget_work_on_a_gpu() {
    if !has_gpu("a_small_memory_budget_and_a_byte_budget_work_on_a_gpu") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (much, little) = (folder.path().join("much"), folder.path().join("little"));
    run_on_gpu("tutorial-s40-4bit-gs16", &much).succeeds();
    // CUDA's context and libtorch's work spaces take a GiB of it.
    run_on_gpu("tutorial-s40-4bit-gs16", &little).args(["--memory-budget", "1200MiB"]).succeeds();
    assert!(container(&much) == container(&little), "other bytes with less memory");
    let budget = folder.path().join("budget");
    run_on_gpu("emoji/squeeze-as-s50", &budget).succeeds();
    assert!(budget.join("unet.squeezed.safetensors").exists());
}
