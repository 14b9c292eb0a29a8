//! The machine that a run computes on: devices, dtype, memory.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::{Placement, free_memory, parse_devices, parse_dtype};
use tch::{Device, Kind};

use crate::config::RunConfig;

/// Where and how a run computes.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Samples and their Hessians are spread over all devices. Their number changes no byte of the
    /// result.
    pub devices: Devices,
    /// The dtype of activations.
    pub kind: Kind,
    /// Limit on the memory of the first device in bytes; `None` is 90 % of what is free.
    pub budget: Option<u64>,
    /// Whether an interrupted run is continued.
    pub resume: bool,
}

impl RunOptions {
    /// The devices and the dtype that `config` names, without a budget, for a run from the start.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that is not there.
    pub fn of(config: &RunConfig) -> Result<Self> {
        let devices = Devices::new(parse_devices(&config.model.device)?)?;
        Ok(RunOptions { devices, kind: parse_dtype(&config.model.dtype)?, budget: None, resume: false })
    }

    /// A run on one device, without a budget, from the start.
    #[must_use]
    pub fn on(placement: Placement) -> Self {
        RunOptions { devices: placement.device.into(), kind: placement.kind, budget: None, resume: false }
    }

    /// The first device, with the dtype of activations.
    #[must_use]
    pub fn placement(&self) -> Placement {
        Placement { device: self.devices.first(), kind: self.kind }
    }

    /// Bytes that the run may use on the first device.
    ///
    /// # Errors
    /// [`Error::Argument`] if no budget is given and the free memory of the device is unknown.
    pub fn memory_budget(&self) -> Result<u64> {
        let free = || free_memory(self.placement().device).map(|free| free - free / 10);
        self.budget
            .or_else(free)
            .ok_or_else(|| Error::Argument("how much memory is free cannot be told; give --memory-budget".into()))
    }
}

/// One or more devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

impl Devices {
    /// `devices`, in the order in which batches of samples go round them.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are none.
    pub fn new(devices: Vec<Device>) -> Result<Self> {
        if devices.is_empty() {
            return Err(Error::Argument("a run needs at least one device".into()));
        }
        Ok(Devices(devices))
    }

    /// The first device.
    #[must_use]
    pub fn first(&self) -> Device {
        self.0[0]
    }

    /// The number of devices, at least one.
    #[expect(clippy::len_without_is_empty, reason = "there is always a device")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// All devices, in order.
    #[must_use]
    pub fn as_slice(&self) -> &[Device] {
        &self.0
    }
}

impl From<Device> for Devices {
    fn from(device: Device) -> Self {
        Devices(vec![device])
    }
}
