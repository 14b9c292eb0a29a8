//! The parts of a compression job: the dense model, its recipe, its plan, its calibration data.

use sdxl_model::checkpoint::TensorSource;
use sdxl_model::unet::UnetChain;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

use crate::calibration::{Calls, Samples};
use crate::plan::Plan;
use crate::recipe::{Devices, LayerRecipes};

/// A dense UNet.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The parts that it consists of.
    pub chain: &'a UnetChain,
    /// Its weights, on the first device.
    pub source: &'a (dyn TensorSource + Sync),
}

/// The data that Hessians are made of.
#[derive(Debug, Clone, Copy)]
pub struct Calibration<'a> {
    /// Calls of the UNet.
    pub samples: &'a Samples,
    /// The weight of each sample; empty if all weigh the same.
    pub weights: &'a [f64],
    /// The training timesteps; layers that depend on the timestep alone are calibrated on each of
    /// them.
    pub timesteps: &'a [f64],
}

/// Where samples run.
#[derive(Debug, Clone, Copy)]
pub struct Machine<'a> {
    /// Batches of samples go round the devices, and each Hessian is on one of them.
    pub devices: &'a Devices,
    /// The dtype of activations.
    pub kind: Kind,
}

/// A UNet to compress.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The dense UNet.
    pub model: Model<'a>,
    /// How each layer is compressed.
    pub layers: &'a LayerRecipes,
    /// The schedule, and where carries wait.
    pub plan: &'a Plan,
    /// The samples.
    pub calibration: Calibration<'a>,
    /// The devices.
    pub machine: Machine<'a>,
}

impl Calibration<'_> {
    /// Checks that there are samples, and a weight for each if there are weights.
    pub(super) fn check(&self) -> Result<()> {
        let (samples, weights) = (self.samples.calls.len(), self.weights.len());
        if samples == 0 {
            return Err(Error::Argument("calibration needs samples, and there are none".into()));
        }
        if weights > 0 && weights != samples {
            return Err(Error::Argument(format!("there are {weights} weights for {samples} calibration samples")));
        }
        Ok(())
    }

    /// The weight of the sample `index`.
    pub(super) fn weight(&self, index: usize) -> f64 {
        if self.weights.is_empty() { 1.0 } else { self.weights[index] }
    }

    /// The number of samples in one batch, where devices are like `device`. Samples of different
    /// weights stay apart. How many devices there are does not matter: equal batches on any number
    /// of them give equal results.
    pub(super) fn joined(&self, chain: &UnetChain, device: Device) -> usize {
        if self.weights.is_empty() { self.joined_on(chain, device).min(self.samples.calls.len()) } else { 1 }
    }

    /// The number of samples in one batch on a CPU.
    pub(super) fn joined_on_cpu(&self, chain: &UnetChain) -> usize {
        self.joined_on(chain, Device::Cpu)
    }

    fn joined_on(&self, chain: &UnetChain, device: Device) -> usize {
        let numel = |calls: Calls| calls.joined(chain.first_carry(calls.height, calls.width).numel(), device);
        self.samples.shape().map_or(1, numel)
    }
}

impl Machine<'_> {
    /// Samples on one of the devices.
    pub(super) fn placement(&self, device: Device) -> Placement {
        Placement { device, kind: self.kind }
    }
}
