//! The memory of a run: its limit, and the needs of its pieces.

use squeeze_numerics::device::free_memory;
use squeeze_solver::{Hessian, InputGeometry, has_whole};
use tch::{Device, Kind};

use crate::recipe::LayerRecipe;

/// The memory that a run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The limit in bytes.
    pub budget: u64,
    /// Bytes of one element of an activation.
    pub element_bytes: u64,
    /// Bytes of the Hessians that stay for the whole run.
    pub shared: u64,
    /// Bytes for layers that a GPU solves at once, besides the largest; 0 solves one by one.
    pub batch: u64,
    /// The device that solves.
    pub device: Device,
    /// Bytes of the host's memory in which carries and Hessians of a GPU may wait; 0 on other
    /// devices, whose memory is the host's.
    pub host: u64,
    /// Whether the Hessians of a pass wait in the host's memory until they are solved with.
    pub hessians_wait: bool,
    /// Whether carries are away from the device between two passes.
    pub carries_away: bool,
    /// Bytes of the text encoders, which are on the device before the UNet is.
    pub encoders: u64,
}

/// Bytes of the program and libtorch with its kernels and buffers, measured on Linux.
const PROGRAM: u64 = 320 << 20;

/// Bytes that CUDA takes on a GPU beside libtorch's allocator, for the context and loaded kernels:
/// 0.5 to 0.6 GiB on an H100.
pub const CUDA_CONTEXT: u64 = 640 << 20;

/// Bytes of the work spaces of cuBLAS (32 MiB on Hopper) and cuDNN, and of blocks in libtorch's
/// allocator that are too small for what is asked for.
const CUDA_WORKSPACES: u64 = 384 << 20;

/// Finished layers that wait to be written.
pub const WAITING: u64 = 64 << 20;

impl Memory {
    /// For activations of this dtype on `device`.
    #[must_use]
    pub fn new(budget: u64, kind: Kind, device: Device) -> Self {
        /// Larger batches are no faster.
        const BATCH: u64 = 2 << 30;
        let batch = if device == Device::Cpu { 0 } else { BATCH.min(budget / 8) };
        let host = if device.is_cuda() { waiting_room() } else { 0 };
        let element_bytes = kind.elt_size_in_bytes() as u64;
        Memory { budget, element_bytes, shared: 0, batch, device, host, hessians_wait: false, carries_away: false, encoders: 0 }
    }

    /// The same memory for a run that encodes texts, with encoders of so many bytes.
    #[must_use]
    pub fn with_encoders(self, encoders: u64) -> Self {
        Memory { encoders, ..self }
    }

    /// Bytes in which a GPU encodes texts; 0 on other devices.
    pub(crate) fn encoding_bytes(&self) -> u64 {
        if self.device.is_cuda() { self.program() + self.encoders } else { 0 }
    }

    /// Bytes of the program on the device.
    pub(crate) fn program(&self) -> u64 {
        if self.device.is_cuda() { CUDA_CONTEXT + CUDA_WORKSPACES } else { PROGRAM + WAITING }
    }

    /// Bytes to plan with: the budget less a reserve for libtorch's temporary allocations.
    pub(super) fn usable(&self) -> u64 {
        self.budget - self.budget / 32
    }

    /// Bytes resident regardless of the stage.
    pub(super) fn fixed(&self) -> u64 {
        self.program() + self.shared + self.batch
    }
}

/// Bytes of the host's memory that tensors of a GPU may wait in: nine tenths of what is free, less
/// the program with CUDA's libraries, finished layers and samples.
fn waiting_room() -> u64 {
    const PROGRAM_WITH_CUDA: u64 = 3 << 30;
    let free = free_memory(Device::Cpu).unwrap_or(0);
    (free - free / 10).saturating_sub(PROGRAM_WITH_CUDA)
}

/// Bytes for compressing a weight, besides its Hessian and factor: the weight in fp32, its new
/// values, the mask, indices and decoded copies; for the joint solver also the initial weights and
/// the importance of each. On a GPU the joint solver has all rows in work at once, and sorts them.
pub(super) fn working_set(shape: &[i64], joint: bool, device: Device) -> u64 {
    let bytes = match (joint, device) {
        (false, _) => 16,
        (true, Device::Cpu) => 40,
        (true, _) => 96,
    };
    bytes * shape.iter().product::<i64>().unsigned_abs()
}

/// Bytes that solving a layer with a weight of this shape takes besides its Hessian, by estimate.
pub(crate) fn solving_bytes(geometry: InputGeometry, shape: &[i64], recipe: &LayerRecipe, device: Device) -> u64 {
    let factors = if recipe.needs_hessian() {
        let dimension = shape.iter().skip(1).product();
        triangles(recipe, device, dimension) * Hessian::factor_bytes(geometry, shape)
    } else {
        0
    };
    working_set(shape, recipe.joint.is_some(), device) + factors
}

/// Triangles of the size of the Hessian, of a layer with this number of inputs, that solving the
/// layer takes besides it: the factor; for the joint solver the damped Hessian too, the whole of it
/// on a GPU, and while its columns are reordered a whole matrix.
pub(super) fn triangles(recipe: &LayerRecipe, device: Device, dimension: i64) -> u64 {
    let whole = if has_whole(device, dimension) { 2 } else { 0 };
    match (recipe.joint.is_some(), &recipe.prune) {
        (false, _) => 1,
        (true, Some(_)) => 2 + whole,
        (true, None) => 4 + whole,
    }
}

/// Bytes for each layer of a batch: its factor, and its weight before and after, in a block and as
/// a mask.
pub(crate) fn batched_layer_bytes(geometry: InputGeometry, shape: &[i64]) -> u64 {
    Hessian::factor_bytes(geometry, shape) + 16 * shape.iter().product::<i64>().unsigned_abs()
}
