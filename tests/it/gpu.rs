//! Results on a GPU, compared with results on the CPU. Without a GPU these tests skip themselves
//! and say so.

use std::io::Write;

use sdxl_squeeze::codebook::{NmRatio, PruneOptions, Sparsity};
use sdxl_squeeze::device::{Placement, cuda_devices};
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder, sample};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::{Generator, noise};
use sdxl_squeeze::solver::{Factor, Hessian, Pruned, prune_many};
use tch::{Device, Kind, Tensor};

use crate::squeeze::Squeeze;
use crate::support::{emoji, relative_error, tensors};

/// Returns whether there is a GPU. If there is none, the function says so on standard error, where
/// it is visible even if the output of passing tests is captured.
fn has_gpu(test: &str) -> bool {
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
