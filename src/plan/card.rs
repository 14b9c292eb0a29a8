//! The time of a run on a GPU, predicted from a short measurement of the card.

use std::time::Instant;

use squeeze_base::digest;
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

use super::Plan;
use super::work::{measured_rate, rate_of_products};

/// The speed of a GPU and of its host.
#[derive(Debug, Clone, Copy)]
pub struct Card {
    /// Multiply-adds per second of a large product in the dtype of activations.
    pub products: f64,
    /// Multiply-adds per second of a large fp32 product.
    pub fp32_products: f64,
    /// Seconds until the host has started an operation.
    pub start: f64,
    /// Bytes per second of a copy from the host's memory, which is not pinned, to the GPU.
    pub copies: f64,
    /// Bytes per second of SHA-256 on one thread of the host.
    pub hashing: f64,
}

/// The drawing of samples, and the captions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drawing {
    /// Calls of the UNet in all; 0 if samples are not drawn.
    pub calls: u64,
    /// Batches of calls that the UNet runs.
    pub batches: u64,
    /// Captions and prompts that are encoded.
    pub encoded: u64,
}

/// The constants of the prediction, fitted to whole runs on one H100 (libtorch 2.11, 16 processor
/// threads; `benches/RESULTS.md` has the runs and their steps, `benches/gpu.sh` measures them). To
/// refit: run `benches/gpu.sh`, and divide the seconds of each step by what the plan counts for it
/// (`plan --json`) and by the card's measured speed.
mod fitted {
    /// Seconds until CUDA, cuBLAS and cuDNN are loaded and the kernels are compiled: of the bundled
    /// model's 12 s, what its operations do not explain.
    pub(super) const BEGIN: f64 = 5.5;
    /// Bytes per second in which the host reads and converts weights, with the text encoders, which
    /// are not counted: the UNet twice and the encoders in some 5 s of the tutorial's run.
    pub(super) const READING: f64 = 3.0e9;
    /// The share of the products' rate that forwards reach beside the start of their operations:
    /// 4.1e15 multiply-adds in some 27 s of the default config's run.
    pub(super) const FORWARD: f64 = 0.5;
    /// The share of the products' rate that sums of Hessians reach in fp16: 2.2e14 multiply-adds in
    /// 2.1 s of the tutorial's run, 6.5e14 in 5.3 s of the default config's.
    pub(super) const HALF_HESSIANS: f64 = 0.36;
    /// The share of the fp32 products' rate that they reach in fp32, in runs with fp32 sums.
    pub(super) const HESSIANS: f64 = 0.9;
    /// The same for Cholesky factors, several at once: some 3 s of the 10.5 s in which the
    /// tutorial's layers are solved.
    pub(super) const FACTORS: f64 = 0.15;
    /// The same for sweeps, conjugate gradients and errors: 3.5e14 multiply-adds in some 40 of the
    /// 68 s in which the default config's layers are solved.
    pub(super) const SWEEPS: f64 = 0.35;
    /// How many times as fast copies from and to pinned memory are as others. This is the usual
    /// ratio on PCIe, and not measured: runs in which carries wait on the host were not timed.
    pub(super) const PINNED: f64 = 3.0;
    /// Operations that the forward of a layer starts, with those between the layers.
    pub(super) const FORWARD_OPERATIONS: f64 = 10.0;
    /// Operations that the joint solver starts for a layer: 20 ms a layer of the bundled model.
    pub(super) const JOINT_OPERATIONS: f64 = 4000.0;
    /// Operations that the other solvers start for a layer, less those of layers beside it.
    pub(super) const OTHER_OPERATIONS: f64 = 750.0;
    /// Operations that encoding a text starts, in batches, with its time embeddings: 1,000 captions
    /// in 2.6 s.
    pub(super) const TEXT_OPERATIONS: f64 = 500.0;
    /// Seconds for an element to be palettized, packed, compared, and decoded for the samples: some
    /// 4.5 s of the tutorial's run.
    pub(super) const ELEMENT: f64 = 1.7e-9;
    /// How often the bytes of a container are hashed, or what takes as long, while it is written:
    /// 2.9 s for 1.1 GB where SHA-256 runs at 1.2 GB/s.
    pub(super) const CONTAINER: f64 = 2.8;
}

impl Card {
    /// Measures `device` for about a second; `kind` is the dtype of activations.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn measure(device: Device, kind: Kind) -> Result<Self> {
        let card = Card {
            products: rate_of_products(device, kind)?,
            fp32_products: measured_rate(device)?,
            start: seconds_to_start(device)?,
            copies: rate_of_copies(device)?,
            hashing: rate_of_hashing(),
        };
        tracing::info!("measured {card:?}");
        Ok(card)
    }

    /// Seconds of a run by `plan`, with `drawing`, from the start of the program to its end.
    #[must_use]
    pub fn seconds(&self, plan: &Plan, drawing: &Drawing) -> f64 {
        let work = plan.work;
        let loaded = if drawing.calls > 0 { work.loaded_bytes + plan.resident_bytes as f64 } else { work.loaded_bytes };
        let carrying = work.carried_bytes / (fitted::PINNED * self.copies);
        let reading = loaded * (1.0 / fitted::READING + 1.0 / self.copies);
        // The model is hashed while samples are drawn, which takes longer.
        let hashed = if drawing.calls > 0 { 0.0 } else { plan.resident_bytes as f64 };
        let hashing = (hashed + fitted::CONTAINER * plan.payload_bytes as f64) / self.hashing;
        let forward = work.forward + drawing.calls as f64 * plan.call.forward;
        let layer_forwards = work.layer_forwards + drawing.batches as f64 * plan.call.layer_forwards;
        let operations = fitted::FORWARD_OPERATIONS * layer_forwards
            + fitted::JOINT_OPERATIONS * work.joint_layers
            + fitted::OTHER_OPERATIONS * work.other_layers
            + fitted::TEXT_OPERATIONS * drawing.encoded as f64;
        let sums = (fitted::HALF_HESSIANS * self.products).max(fitted::HESSIANS * self.fp32_products);
        let fp32 = work.factors / fitted::FACTORS + work.sweeps / fitted::SWEEPS;
        let products = forward / (fitted::FORWARD * self.products) + work.hessians / sums + fp32 / self.fp32_products;
        fitted::BEGIN + reading + carrying + hashing + products + self.start * operations + fitted::ELEMENT * work.palettized
    }
}

/// Seconds until the host has started a small operation, over many of them.
fn seconds_to_start(device: Device) -> Result<f64> {
    const COUNT: i32 = 5000;
    let mut tensor = Tensor::f_zeros([256], (Kind::Float, device))?;
    let mut some = |count: i32| -> Result<()> {
        for _ in 0..count {
            tensor = tensor.f_add_scalar(1.0)?;
        }
        // Waits for all of them.
        tensor.f_double_value(&[0])?;
        Ok(())
    };
    some(100)?;
    let begin = Instant::now();
    some(COUNT)?;
    Ok(begin.elapsed().as_secs_f64() / f64::from(COUNT))
}

/// Bytes per second of copies of 64 MiB to `device`.
fn rate_of_copies(device: Device) -> Result<f64> {
    const BYTES: i64 = 64 << 20;
    const COUNT: i32 = 8;
    let host = Tensor::f_ones([BYTES], (Kind::Uint8, Device::Cpu))?;
    let copy = || -> Result<i64> { Ok(host.f_to_device_(device, Kind::Uint8, false, true)?.f_int64_value(&[0])?) };
    copy()?;
    let begin = Instant::now();
    for _ in 0..COUNT {
        copy()?;
    }
    Ok(f64::from(COUNT) * BYTES as f64 / begin.elapsed().as_secs_f64())
}

/// Bytes per second of SHA-256, over 64 MiB.
fn rate_of_hashing() -> f64 {
    let bytes = vec![1; 64 << 20];
    let begin = Instant::now();
    // The hash is of no interest; the time to make it is.
    let hash = digest::of_bytes(&bytes);
    tracing::trace!("the hash of 64 MiB of ones is {hash}");
    bytes.len() as f64 / begin.elapsed().as_secs_f64()
}
