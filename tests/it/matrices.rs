//! Weights, inputs and Hessians for the tests of the solvers.

use sdxl_squeeze::solver::Hessian;
use tch::{Device, Tensor};

/// Random numbers with a bell-shaped distribution: each is the sum of four uniform numbers.
pub(crate) fn numbers(shape: &[i64], seed: u64) -> Tensor {
    use rand::{RngExt, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| (0..4).map(|_| random.random_range(-1f32..1.0)).sum()).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Inputs [n, d] that a few directions dominate. The directions depend only on `family`.
pub(crate) fn correlated(n: i64, d: i64, family: u64, seed: u64) -> Tensor {
    let few = numbers(&[n, d / 4 + 1], seed).matmul(&numbers(&[d / 4 + 1, d], family));
    few / (d as f64).sqrt() + 0.2 * numbers(&[n, d], seed + 1000)
}

/// The Hessian of inputs [n, d].
pub(crate) fn hessian(inputs: &Tensor) -> Hessian {
    let mut hessian = Hessian::new(*inputs.size().last().unwrap(), Device::Cpu).unwrap();
    hessian.add(inputs).unwrap();
    hessian
}
