//! Elementwise functions whose results do not depend on the number of threads.
//!
//! On the CPU, libtorch gives each thread a stretch of a tensor of equal length. In a stretch it
//! computes whole SIMD vectors with one implementation of exp and the remaining elements with
//! another one, whose rounding differs. The results of SiLU and the sigmoid at the ends of
//! stretches therefore depend on the number of threads. (exp, sin, cos, GELU and square roots do
//! not.) The functions of this module make every stretch a whole number of vectors, so that only
//! the last elements of the tensor are computed the other way, whatever the number of threads.

use squeeze_base::error::Result;
use tch::{Device, Tensor};

/// The largest number of elements that libtorch processes on one thread
/// (`at::internal::GRAIN_SIZE`).
const GRAIN: usize = 32_768;

/// The number of elements of which every stretch is a multiple. It is the largest step of
/// libtorch's vector loops: two vectors of 512 bits of fp16.
const VECTORS: usize = 64;

/// x / (1 + exp(-x)), in new memory.
pub fn silu(tensor: &Tensor) -> Result<Tensor> {
    // Adding zero would change negative zeros; multiplying by one changes nothing and keeps
    // gradients.
    silu_in_place(tensor.f_mul_scalar(1.0)?)
}

/// SiLU in the memory of `tensor`, which must not be in use elsewhere.
pub fn silu_in_place(tensor: Tensor) -> Result<Tensor> {
    in_place(tensor, &|part| part.f_silu_())
}

/// 1 / (1 + exp(-x)) in the memory of `tensor`, which must not be in use elsewhere.
pub fn sigmoid_in_place(tensor: Tensor) -> Result<Tensor> {
    in_place(tensor, &|part| part.f_sigmoid_())
}

type Function<'a> = &'a dyn Fn(&mut Tensor) -> Result<Tensor, tch::TchError>;

fn in_place(mut tensor: Tensor, function: Function) -> Result<Tensor> {
    if tensor.device() != Device::Cpu || tensor.requires_grad() {
        return Ok(function(&mut tensor)?);
    }
    let mut tensor = if tensor.is_contiguous() { tensor } else { tensor.f_contiguous()? };
    let count = tensor.numel();
    if count <= GRAIN {
        return Ok(function(&mut tensor)?);
    }
    let flat = tensor.f_view([-1])?;
    let threads = usize::try_from(tch::get_num_threads()).expect("libtorch has at least one thread");
    let mut start = 0;
    while start < count {
        let length = stretches(count - start, threads);
        let _ = function(&mut flat.f_narrow(0, start as i64, length as i64)?)?;
        start += length;
    }
    Ok(tensor)
}

/// The number of elements, of `count`, to pass to libtorch at once so that each of its threads gets
/// a multiple of [`VECTORS`].
fn stretches(count: usize, threads: usize) -> usize {
    // libtorch uses ceil(count / GRAIN) threads, if it has as many, and gives each the same number,
    // rounded up.
    if count >= threads * GRAIN {
        count / (threads * VECTORS) * (threads * VECTORS)
    } else if count >= GRAIN {
        count / GRAIN * GRAIN
    } else {
        count
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn every_thread_has_whole_vectors_and_nothing_is_left_out() {
        for threads in 1..=9 {
            for count in (1..300_000).step_by(997).chain([GRAIN, 2 * GRAIN, 7 * GRAIN + 1]) {
                let mut left = count;
                while left > 0 {
                    let length = stretches(left, threads);
                    assert!(length > 0 && length <= left);
                    let used = length.div_ceil(GRAIN).min(threads);
                    let each = length.div_ceil(used);
                    assert!(length == left || each.is_multiple_of(VECTORS), "{count} on {threads}: {length}");
                    // The last thread of several ends where a vector ends, unless the tensor does.
                    assert!(used == 1 || length.is_multiple_of(VECTORS), "{count} on {threads}: {length}");
                    left -= length;
                }
            }
        }
    }

    #[test]
    fn the_same_numbers_as_libtorchs_and_on_any_number_of_threads() {
        let threads = tch::get_num_threads();
        for size in [&[5_i64][..], &[160_000], &[3, 33_333], &[2, 320, 65, 63], &[100_003]] {
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                let tensor = crate::random::noise(size, 1, Kind::Float).unwrap().to_kind(kind) * 3.0;
                let exact = tensor.to_kind(Kind::Double);
                // Half a step of the dtype at the largest numbers.
                let bound =
                    [(Kind::Float, 2e-6), (Kind::Half, 1e-2), (Kind::BFloat16, 7e-2)].into_iter().find(|(of, _)| *of == kind);
                let bound = bound.unwrap().1;
                let run =
                    || (silu(&tensor).unwrap(), sigmoid_in_place(tensor.copy()).unwrap(), silu_in_place(tensor.copy()).unwrap());
                tch::set_num_threads(1);
                let first = run();
                for (ours, exact) in [(&first.0, exact.silu()), (&first.1, exact.sigmoid()), (&first.2, exact.silu())] {
                    assert!((ours.to_kind(Kind::Double) - exact).abs().max().double_value(&[]) < bound, "{size:?} {kind:?}");
                }
                for count in [2, 3, 7] {
                    tch::set_num_threads(count);
                    assert!(run() == first, "{size:?} {kind:?} on {count} threads");
                }
                tch::set_num_threads(threads);
            }
        }
    }

    #[test]
    fn views_and_gradients() {
        let tensor = crate::random::noise(&[300, 200], 2, Kind::Float).unwrap();
        let turned = tensor.tr();
        assert_eq!(silu(&turned).unwrap().contiguous(), silu(&turned.contiguous()).unwrap());
        let learns = tensor.copy().set_requires_grad(true);
        let along = silu(&learns).unwrap().sum(Kind::Float);
        let gradient = &Tensor::run_backward(&[along], std::slice::from_ref(&learns), false, false)[0];
        let expected = tensor.sigmoid() * (1.0 + &tensor * (1.0 - tensor.sigmoid()));
        let difference: Tensor = gradient - expected;
        assert!(difference.abs().max().double_value(&[]) < 1e-5);
    }
}
