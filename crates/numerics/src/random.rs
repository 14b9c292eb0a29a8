//! Random tensors that depend on a seed alone.

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// The noise that `torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=kind)`
/// gives on a CPU.
///
/// # Errors
/// If libtorch refuses the shape.
pub fn noise(shape: &[i64], seed: u64, kind: Kind) -> Result<Tensor> {
    // tch offers only libtorch's default generator, so no other draw may come between seeding and
    // drawing.
    static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // torch takes negative seeds as their two's complement.
    tch::manual_seed(seed as i64);
    Ok(Tensor::f_randn(shape, (kind, Device::Cpu))?)
}
