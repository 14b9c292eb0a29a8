//! How much a changed weight changes the layer's output.

use tch::{Kind, Tensor};

use super::Hessian;
use super::matrix::{block, flat_for, panels};
use crate::error::Result;

/// Columns of H that one matrix product takes.
const PANEL: i64 = 256;

/// The relative squared error of the layer's output on the inputs that the Hessian has seen:
/// tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T) for `original` W0 and `new` W, each [o, ...].
///
/// Without dampening. Products in fp32, their sum in fp64. Zero if W = W0; infinite if only W0 gives an output of zero.
///
/// # Errors
/// [`crate::Error::Argument`] if a shape does not fit, [`crate::Error::NotFinite`] for NaN in a weight.
pub fn output_error(original: &Tensor, new: &Tensor, hessian: &Hessian) -> Result<f64> {
    let original = flat_for(original, hessian)?;
    let new = flat_for(new, hessian)?;
    of_flat(&original, &new, hessian)
}

/// [`output_error`] of fp32 weights [o, d] on the Hessian's device.
pub(super) fn of_flat(original: &Tensor, new: &Tensor, hessian: &Hessian) -> Result<f64> {
    let error = energy(&new.f_sub(original)?, hessian)?;
    if error == 0.0 {
        return Ok(0.0);
    }
    Ok(error / energy(original, hessian)?)
}

/// tr(W X X^T W^T): the sum of the squared outputs. Only the upper triangle is read, in half the work of W H.
fn energy(weight: &Tensor, hessian: &Hessian) -> Result<f64> {
    let rows = weight.size2()?.0 / hessian.groups();
    let mut energy = 0.0;
    for group in 0..hessian.groups() {
        let weight = weight.f_narrow(0, group * rows, rows)?;
        let sum = hessian.upper_sum(group)?;
        for panel in panels(hessian.dimension(), PANEL) {
            let own = weight.f_narrow(1, panel.start, panel.end - panel.start)?;
            // A panel's corner is whole, above and below the diagonal.
            energy += dot(&own.f_mm(&block(&sum, panel.clone(), panel.clone())?)?, &own)?;
            if panel.start > 0 {
                let before = weight.f_narrow(1, 0, panel.start)?;
                energy += 2.0 * dot(&before.f_mm(&block(&sum, 0..panel.start, panel)?)?, &own)?;
            }
        }
    }
    Ok(energy.max(0.0))
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok(a.f_mul(b)?.f_sum(Kind::Double)?.f_double_value(&[])?)
}
