//! Sums whose results do not depend on the number of threads.

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// The number of elements that are summed by one thread. libtorch splits a sum over a whole tensor
/// among its threads, but it splits neither a tensor of this size nor a row of a sum by rows.
const PIECE: i64 = 8192;

/// The dtype in which a device adds up many numbers: fp64, or fp32 where it has no fp64, as Metal.
#[must_use]
pub fn sum_kind(device: Device) -> Kind {
    match device {
        Device::Cpu | Device::Cuda(_) => Kind::Double,
        Device::Mps | Device::Vulkan => Kind::Float,
    }
}

/// The sum of all elements, in fp64; in fp32 on a device without it.
pub fn sum(tensor: &Tensor) -> Result<f64> {
    if tensor.device() != Device::Cpu {
        return Ok(tensor.f_sum(sum_kind(tensor.device()))?.f_double_value(&[])?);
    }
    let flat = tensor.f_reshape([-1])?;
    let count = flat.size1()?;
    let whole = count / PIECE * PIECE;
    let mut sum = flat.f_narrow(0, whole, count - whole)?.f_sum(Kind::Double)?.f_double_value(&[])?;
    if whole > 0 {
        let pieces = flat.f_narrow(0, 0, whole)?.f_view([-1, PIECE])?;
        let pieces = pieces.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?;
        sum += Vec::<f64>::try_from(&pieces.f_to_device(Device::Cpu)?)?.into_iter().sum::<f64>();
    }
    Ok(sum)
}

/// The numbers of a tensor on any device, row by row, in fp64.
pub fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let here = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok(Vec::try_from(&here.f_reshape([-1])?)?)
}

/// The sum of the elements' products, each product in the tensors' own dtype.
pub fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    sum(&a.f_mul(b)?)
}

/// The sum of the squares, each square in the tensor's own dtype.
pub fn squares(tensor: &Tensor) -> Result<f64> {
    dot(tensor, tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metal_is_asked_for_nothing_in_fp64() {
        let kinds = [Device::Cpu, Device::Cuda(1), Device::Mps, Device::Vulkan].map(sum_kind);
        assert_eq!(kinds, [Kind::Double, Kind::Double, Kind::Float, Kind::Float]);
        assert_eq!(numbers(&Tensor::from_slice(&[1.5f32, -2.0]).view([2, 1])).unwrap(), [1.5, -2.0]);
    }

    #[test]
    fn sums_are_right_and_the_same_on_any_number_of_threads() {
        let threads = tch::get_num_threads();
        for size in [[0, 3], [1, 1], [1, 8191], [2, 8192], [3, 100_003], [70_000, 9]] {
            let tensor = crate::random::noise(&size, 3, Kind::Float).unwrap() + 0.1;
            let exact = tensor.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
            let sums: Vec<f64> = [1, 2, 5]
                .map(|count| {
                    tch::set_num_threads(count);
                    sum(&tensor).unwrap()
                })
                .to_vec();
            assert!((sums[0] - exact).abs() <= 1e-9 * exact.abs(), "{size:?}: {} {exact}", sums[0]);
            assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()), "{size:?}: {sums:?}");
            assert_eq!(sum(&tensor.transpose(0, 1)).unwrap() as f32, exact as f32, "{size:?}");
        }
        tch::set_num_threads(threads);
    }
}
