//! Hessians that wait in the host's memory until their layers are solved.

use squeeze_base::error::Result;
use squeeze_numerics::waiting::WaitingTensor;
use tch::{Kind, Tensor};

use super::Hessian;

/// A Hessian whose sums [wait](WaitingTensor) in the host's memory.
#[derive(Debug)]
pub struct WaitingHessian {
    /// The Hessian with empty tensors in the place of its sums.
    empty: Hessian,
    sums: Vec<WaitingTensor>,
}

impl WaitingHessian {
    /// Copies the sums to the host and frees their memory on the device, one after the other.
    ///
    /// # Errors
    /// As [`WaitingTensor::of`].
    pub fn of(mut hessian: Hessian) -> Result<Self> {
        let nothing = Tensor::f_empty([0], (Kind::Float, hessian.device()))?;
        let take = |sum: &mut Tensor| WaitingTensor::of(&std::mem::replace(sum, nothing.shallow_clone()));
        let sums = hessian.sums_mut().into_iter().map(take).collect::<Result<_>>()?;
        Ok(WaitingHessian { empty: hessian, sums })
    }

    /// The Hessian on its device.
    ///
    /// # Errors
    /// As [`WaitingTensor::back`].
    pub fn back(self) -> Result<Hessian> {
        let WaitingHessian { empty: mut hessian, sums } = self;
        for (sum, waiting) in hessian.sums_mut().into_iter().zip(sums) {
            *sum = waiting.back()?;
        }
        Ok(hessian)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{InputGeometry, Windows};

    #[test]
    fn a_hessian_that_has_waited_is_the_one_before() {
        let windows = |groups, stride| Windows { stride: [stride; 2], padding: [1; 2], dilation: [1; 2], groups };
        let cases: [(InputGeometry, &[i64], &[i64]); 4] = [
            (InputGeometry::Linear, &[4, 300], &[2, 9, 300]),
            (InputGeometry::Windows(windows(1, 1)), &[4, 6, 3, 3], &[2, 6, 5, 5]),
            (InputGeometry::Windows(windows(1, 2)), &[4, 6, 3, 3], &[2, 6, 5, 5]),
            (InputGeometry::Windows(windows(2, 1)), &[4, 3, 3, 3], &[2, 6, 5, 5]),
        ];
        for (geometry, shape, input) in cases {
            let mut hessian = Hessian::for_weight(geometry, shape, Device::Cpu).unwrap();
            let inputs: Vec<Tensor> = (0..2).map(|_| Tensor::randn(input, (Kind::Float, Device::Cpu))).collect();
            hessian.add(&inputs[0]).unwrap();
            let before = hessian.matrix().unwrap();
            let counts = (hessian.vectors(), hessian.samples());
            let mut back = WaitingHessian::of(hessian).unwrap().back().unwrap();
            assert!(back.matrix().unwrap().equal(&before), "{shape:?}");
            assert_eq!((back.vectors(), back.samples()), counts);
            // More can be added.
            back.add(&inputs[1]).unwrap();
            let mut both = Hessian::for_weight(geometry, shape, Device::Cpu).unwrap();
            inputs.iter().for_each(|input| both.add(input).unwrap());
            assert!(back.matrix().unwrap().equal(&both.matrix().unwrap()), "{shape:?}");
        }
    }
}
