//! What a run may take, and what its parts do take.

use tch::{Device, Kind};

use crate::solver::{Hessian, InputGeometry};

/// What a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes at most.
    pub budget: u64,
    /// Bytes of one number of an activation.
    pub element_bytes: u64,
    /// Bytes of the Hessians that stay for the whole run.
    pub shared: u64,
    /// Bytes for layers of one shape to be pruned in one batch; 0 where they go one by one.
    pub batch: u64,
}

/// Bytes of the program and libtorch with its kernels and buffers, measured on Linux.
const PROGRAM: u64 = 320 << 20;

/// Finished layers that wait to be written.
pub const WAITING: u64 = 64 << 20;

impl Memory {
    /// For activations of this dtype on `device`.
    pub fn new(budget: u64, kind: Kind, device: Device) -> Self {
        /// More brings nothing: a batch has enough to do.
        const BATCH: u64 = 2 << 30;
        let batch = if device == Device::Cpu { 0 } else { BATCH.min(budget / 8) };
        Memory { budget, element_bytes: kind.elt_size_in_bytes() as u64, shared: 0, batch }
    }

    /// What may be planned with: less than the budget, for what libtorch takes for itself now and then.
    pub(super) fn usable(&self) -> u64 {
        self.budget - self.budget / 32
    }

    /// What is there whatever is done.
    pub(super) fn fixed(&self) -> u64 {
        PROGRAM + WAITING + self.shared + self.batch
    }
}

/// Bytes that treating a weight takes besides its Hessian and factor: it in fp32, what it becomes, the mask, indices and decoded copies;
/// for the joint solver also the weights to start from and the importance of each.
pub(super) fn working_set(shape: &[i64], joint: bool) -> u64 {
    let bytes = if joint { 40 } else { 16 };
    bytes * shape.iter().product::<i64>().unsigned_abs()
}

/// Bytes that each layer of a batch takes: its factor, and its weight before, after, in a block and as a mask.
pub(crate) fn batched_layer_bytes(geometry: InputGeometry, shape: &[i64]) -> u64 {
    Hessian::factor_bytes(geometry, shape) + 16 * shape.iter().product::<i64>().unsigned_abs()
}
