//! Seeded weights whose statistics are like a trained model's.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use safetensors::Dtype;

/// Draws the values of any tensor from a seed and its name: equal on every machine and any number
/// of threads.
///
/// - Weights: standard deviation gain / sqrt(fan-in). Input channels differ log-normally (sigma
///   0.3), and about one in 200 is an outlier, four times as large. Layers that write to a residual
///   stream have a gain of 0.3, others of 1, so that 70 transformer blocks in a row stay within
///   fp16.
/// - Norm weights: 1, with a deviation of 0.1. Biases: a deviation of 0.02. Embeddings: of 0.02.
#[derive(Debug, Clone, Copy)]
pub(super) struct Statistics {
    pub seed: u64,
}

/// The number of values from one generator; fixed, so that the number of threads has no effect.
const CHUNK: usize = 1 << 16;

impl Statistics {
    /// The bytes of tensor `name`, row by row.
    pub(super) fn bytes(self, name: &str, shape: &[usize], dtype: Dtype) -> Vec<u8> {
        let numel: usize = shape.iter().product();
        let width = size_of_dtype(dtype);
        let law = Law::of(name, shape);
        let columns = law.column_scales(self.generator(name, u64::MAX));
        let mut bytes = vec![0; numel * width];
        bytes.par_chunks_mut(CHUNK * width).enumerate().for_each(|(chunk, bytes)| {
            let mut random = self.generator(name, chunk as u64);
            for (i, value) in bytes.chunks_exact_mut(width).enumerate() {
                let normal: f32 = StandardNormal.sample(&mut random);
                let scale = if columns.is_empty() { 1.0 } else { columns[(chunk * CHUNK + i) % law.fan_in / law.taps] };
                encode(law.mean + law.deviation * scale * normal, dtype, value);
            }
        });
        bytes
    }

    fn generator(self, name: &str, stream: u64) -> ChaCha8Rng {
        // FNV-1a: any hash that never changes will do.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed ^ hash);
        generator.set_stream(stream);
        generator
    }
}

/// The distribution of a tensor's values.
struct Law {
    mean: f32,
    deviation: f32,
    /// Inputs of one output, and kernel taps among them; 0 where there are no inputs.
    fan_in: usize,
    taps: usize,
}

impl Law {
    fn of(name: &str, shape: &[usize]) -> Law {
        let is_norm = name.contains("norm") && name.ends_with(".weight") && shape.len() == 1;
        let flat = |mean, deviation| Law { mean, deviation, fan_in: 0, taps: 1 };
        if is_norm {
            return flat(1.0, 0.1);
        }
        if shape.len() < 2 || name.contains("token_embedding") || name.contains("position_embedding") {
            return flat(0.0, 0.02);
        }
        let writes_residual =
            ["to_out.0.weight", "net.2.weight", "proj_out.weight", "conv2.weight", "out_proj.weight", "fc2.weight"];
        let gain = if writes_residual.iter().any(|end| name.ends_with(end)) { 0.3 } else { 1.0 };
        let fan_in: usize = shape[1..].iter().product();
        Law { mean: 0.0, deviation: gain / (fan_in as f32).sqrt(), fan_in, taps: shape[2..].iter().product() }
    }

    fn column_scales(&self, mut random: ChaCha8Rng) -> Vec<f32> {
        let channels = self.fan_in / self.taps;
        (0..channels)
            .map(|_| {
                let normal: f32 = StandardNormal.sample(&mut random);
                let outlier = random.random::<f32>() < 0.005;
                // Divided by the root mean square of exp(0.3 x), so that the deviation stays
                // `deviation`.
                (0.3 * normal).exp() / (2.0f32 * 0.3 * 0.3).exp().sqrt() * if outlier { 4.0 } else { 1.0 }
            })
            .collect()
    }
}

pub(super) fn size_of_dtype(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

fn encode(value: f32, dtype: Dtype, bytes: &mut [u8]) {
    match dtype {
        Dtype::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        Dtype::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        other => unreachable!("weights of {other:?} are refused before any is made"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
        let bytes = Statistics { seed }.bytes(name, shape, Dtype::F32);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn weights_are_fan_in_scaled_with_outlier_channels() {
        let (rows, columns) = (512, 1024);
        let weight = values("down_blocks.1.attentions.0.proj_in.weight", &[rows, columns], 7);
        let norm = |column: usize| (0..rows).map(|row| weight[row * columns + column].powi(2)).sum::<f32>().sqrt();
        let mut norms: Vec<f32> = (0..columns).map(norm).collect();
        norms.sort_by(f32::total_cmp);
        let median = norms[columns / 2];
        // A column's norm is about sqrt(rows) x 1 / sqrt(fan-in) x exp(-0.09).
        assert!((0.55..0.75).contains(&median), "{median}");
        let outliers = norms.iter().filter(|norm| **norm > 2.5 * median).count();
        assert!((1..=30).contains(&outliers), "{outliers}");
    }

    #[test]
    fn same_on_any_number_of_threads_and_another_for_another_seed_or_name() {
        let shape = [300, 700];
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| values("a.weight", &shape, 1));
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(|| values("a.weight", &shape, 1));
        assert_eq!(one, three);
        assert_ne!(one, values("a.weight", &shape, 2));
        assert_ne!(one, values("b.weight", &shape, 1));
    }
}
