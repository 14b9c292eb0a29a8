//! Prunes half of one weight matrix, by SparseGPT and by magnitude, and compares the errors of the
//! layer's output.
//!
//! The solver needs no model: a weight [o, d] and the layer's inputs [n, d] are enough.
//!
//! ```sh
//! cargo run --release --example prune_one_layer
//! ```
#![allow(clippy::print_stdout)]

use sdxl_squeeze::Result;
use sdxl_squeeze::codebook::{PruneOptions, Sparsity};
use sdxl_squeeze::solver::{Hessian, magnitude_prune, output_error, prune};
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    sdxl_squeeze::init();
    tch::manual_seed(0);
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let weight = random([128, 256]);
    // 64 directions explain most of the inputs. SparseGPT makes use of such correlations.
    let inputs = random([2048, 64]).matmul(&random([64, 256])) + random([2048, 256]);

    let mut hessian = Hessian::new(256, Device::Cpu)?;
    hessian.add(&inputs)?;

    let sparsity = Sparsity::Unstructured(0.5);
    let by_sparsegpt = prune(&weight, &hessian, &PruneOptions { sparsity, ..PruneOptions::default() })?;
    let by_magnitude = magnitude_prune(&weight, sparsity, 1)?;
    for (method, pruned) in [("SparseGPT", &by_sparsegpt.weight), ("magnitude", &by_magnitude.weight)] {
        println!("{method}: {:.4} of the output's energy is lost", output_error(&weight, pruned, &hessian)?);
    }
    Ok(())
}
