//! Tensors that wait in the host's memory until their device needs them again.

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// A copy of a tensor in the host's memory, which goes back to the tensor's device.
///
/// The copy of a tensor on a GPU is pinned, and nothing waits for it: all copies and operations of
/// a device run in the order in which they are started, so the copy back finds what the copy to the
/// host has left. On the CPU it is a plain copy.
///
/// libtorch rounds blocks of pinned memory up to a power of two and keeps freed ones for blocks of
/// the same size. Tensors are therefore cut into pieces of one size: little is lost to rounding,
/// and tensors of another shape take the blocks of those before.
#[derive(Debug)]
pub struct WaitingTensor {
    /// Parts of the tensor's elements in row-major order, one-dimensional.
    pieces: Vec<Tensor>,
    size: Vec<i64>,
    kind: Kind,
    device: Device,
}

/// Bytes of a piece: at 20 GB/s it takes 0.2 ms, many times the start of a copy.
const PIECE: u64 = 4 << 20;

impl WaitingTensor {
    /// A copy of `tensor`. The tensor's own memory is free once it is dropped.
    ///
    /// # Errors
    /// [`Error::Torch`](squeeze_base::Error::Torch) if the host's memory is too small.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let (kind, device, numel) = (tensor.f_kind()?, tensor.device(), tensor.numel() as i64);
        let flat = tensor.f_contiguous()?.f_view([numel])?;
        let most = (PIECE as usize / kind.elt_size_in_bytes()) as i64;
        let piece = |index: i64| -> Result<Tensor> {
            let start = index * most;
            let part = flat.f_narrow(0, start, most.min(numel - start))?;
            Ok(part.f_to_device_(Device::Cpu, kind, is_asynchronous(device), true)?)
        };
        let pieces = (0..numel.unsigned_abs().div_ceil(most.unsigned_abs()) as i64).map(piece).collect::<Result<_>>()?;
        Ok(WaitingTensor { pieces, size: tensor.size(), kind, device })
    }

    /// The tensor on its device, in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](squeeze_base::Error::OutOfMemory) if the device's memory is too
    /// small.
    pub fn back(&self) -> Result<Tensor> {
        let piece = |piece: &Tensor| piece.f_to_device_(self.device, self.kind, is_asynchronous(self.device), true);
        let whole = match self.pieces.as_slice() {
            [] => Tensor::f_empty([0], (self.kind, self.device))?,
            [only] => piece(only)?,
            pieces => Tensor::f_cat(&pieces.iter().map(piece).collect::<Result<Vec<_>, _>>()?, 0)?,
        };
        Ok(whole.f_view(self.size.as_slice())?)
    }

    /// Bytes that a tensor of `bytes` bytes takes in the host's memory.
    #[must_use]
    pub fn bytes(bytes: u64) -> u64 {
        let rest = bytes % PIECE;
        bytes - rest + if rest > 0 { rest.next_power_of_two() } else { 0 }
    }
}

/// Whether copies between this device and pinned memory need not be waited for: only CUDA promises
/// the order.
fn is_asynchronous(device: Device) -> bool {
    device.is_cuda()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_as_they_were_in_memory_of_their_own() {
        let long = Tensor::arange(3 << 20, (Kind::Int64, Device::Cpu)).to_kind(Kind::Half).view([3, 1 << 10, 1 << 10]);
        let transposed = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]).transpose(0, 1);
        let empty = Tensor::zeros([0, 5], (Kind::BFloat16, Device::Cpu));
        for (tensor, pieces) in [(&long, 2), (&transposed, 1), (&empty, 0)] {
            let waiting = WaitingTensor::of(tensor).unwrap();
            assert_eq!(waiting.pieces.len(), pieces);
            let bytes = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
            let taken: u64 = waiting.pieces.iter().map(|piece| (piece.numel() * piece.kind().elt_size_in_bytes()) as u64).sum();
            assert_eq!(taken, bytes);
            assert!(WaitingTensor::bytes(bytes) >= bytes && WaitingTensor::bytes(bytes) < bytes + PIECE);
            let mut back = waiting.back().unwrap();
            assert_eq!((back.size(), back.kind()), (tensor.size(), tensor.kind()));
            assert!(back.equal(tensor));
            // A change of one is no change of the other.
            let _ = back.fill_(7.0);
            assert!(waiting.back().unwrap().equal(tensor));
        }
        assert_eq!([0, 1, 3, PIECE, PIECE + 5].map(WaitingTensor::bytes), [0, 1, 4, PIECE, PIECE + 8]);
    }
}
