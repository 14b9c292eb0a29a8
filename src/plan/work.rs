//! The work of a run.

use std::ops::AddAssign;
use std::time::Instant;

use serde::Serialize;
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// Multiply-adds of a run's parts, by the formulas of the algorithms, and elements that are
/// palettized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Work {
    /// Forwards of the samples: for Hessians, and past each part.
    pub forward: f64,
    /// Sums of x x^T.
    pub hessians: f64,
    /// Cholesky factors: d^3 / 6 each, and for the joint solver as much for the inverse's diagonal.
    pub factors: f64,
    /// SparseGPT's trailing updates and the output errors: 3/2 o d^2 a layer.
    pub sweeps: f64,
    /// Elements that are palettized.
    pub palettized: f64,
    /// Layers that forwards run, counted once for every batch of samples.
    pub layer_forwards: f64,
    /// Layers that the joint solver solves.
    pub joint_layers: f64,
    /// Layers that are pruned or palettized in another way.
    pub other_layers: f64,
    /// Bytes of weights that are loaded on the device.
    pub loaded_bytes: f64,
    /// Bytes of carries that are copied to a GPU and away from it.
    pub carried_bytes: f64,
}

impl Work {
    /// All multiply-adds.
    #[must_use]
    pub fn multiply_adds(&self) -> f64 {
        self.forward + self.hessians + self.factors + self.sweeps
    }

    /// Seconds on a device that makes `rate` multiply-adds per second in large matrix products.
    /// Each kind of work reaches a share of it. A palettized element takes 0.07 µs besides, or
    /// 0.016 µs in a run without products. All were measured on two CPU cores.
    #[must_use]
    pub fn seconds(&self, rate: f64) -> f64 {
        let products = self.forward / 0.85 + self.hessians / 0.8 + self.factors / 0.75 + self.sweeps / 0.7;
        let of_element = if products > 0.0 { 0.07e-6 } else { 0.016e-6 };
        products / rate + of_element * self.palettized
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.forward += other.forward;
        self.hessians += other.hessians;
        self.factors += other.factors;
        self.sweeps += other.sweeps;
        self.palettized += other.palettized;
        self.layer_forwards += other.layer_forwards;
        self.joint_layers += other.joint_layers;
        self.other_layers += other.other_layers;
        self.loaded_bytes += other.loaded_bytes;
        self.carried_bytes += other.carried_bytes;
    }
}

/// Multiply-adds per second of a large fp32 matrix product of libtorch on `device`, measured for
/// about a tenth of a second. Where the products of faer are faster, a run takes less time than
/// this predicts, although its convolutions and attention do not gain by them.
///
/// # Errors
/// If libtorch refuses.
pub fn measured_rate(device: Device) -> Result<f64> {
    rate_of_products(device, Kind::Float)
}

/// [`measured_rate`] for products of this dtype.
pub(super) fn rate_of_products(device: Device, kind: Kind) -> Result<f64> {
    // A GPU is waited for after several products only. Small budgets have to have room for them.
    let (size, several) = if device == Device::Cpu { (1024, 1) } else { (4096, 16) };
    let matrix = Tensor::f_ones([size, size], (kind, device))?;
    let products = || -> Result<f64> {
        let mut product = matrix.f_mm(&matrix)?;
        for _ in 1..several {
            product = matrix.f_mm(&matrix)?;
        }
        Ok(product.f_double_value(&[0, 0])?)
    };
    products()?;
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < 0.1 || count < 3 {
        products()?;
        count += several;
    }
    Ok(f64::from(count) * (size as f64).powi(3) / start.elapsed().as_secs_f64())
}
