//! How much a changed weight changes the layer's output.

use tch::Tensor;

use super::Hessian;
use super::matrix::flat_for;
use crate::error::Result;
use crate::product::product;
use crate::sum::dot;

/// The relative squared error of the layer's output on the inputs that the Hessian has seen:
/// tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T) for `original` W0 and `new` W, each [o, ...].
///
/// Without dampening. Products in fp32, their sum in fp64. Zero if W = W0; infinite if only W0 gives an output of zero.
///
/// # Errors
/// [`crate::Error::Argument`] if a shape does not fit, [`crate::Error::NotFinite`] for NaN in a weight.
pub fn output_error(original: &Tensor, new: &Tensor, hessian: &Hessian) -> Result<f64> {
    let error = output_energy(&flat_for(new, hessian)?.f_sub(&flat_for(original, hessian)?)?, hessian)?;
    if error == 0.0 {
        return Ok(0.0);
    }
    Ok(error / output_energy(original, hessian)?)
}

/// tr(W H W^T) for a weight [o, ...]: twice the mean over the samples of the squared norm of W x, summed over each sample's vectors.
///
/// Only the upper triangle is read, in half the work of W H. Products in fp32, their sum in fp64.
///
/// # Errors
/// As [`output_error`].
pub fn output_energy(weight: &Tensor, hessian: &Hessian) -> Result<f64> {
    let weight = flat_for(weight, hessian)?;
    let rows = weight.size2()?.0 / hessian.groups();
    let mut energy = 0.0;
    for group in 0..hessian.groups() {
        let weight = weight.f_narrow(0, group * rows, rows)?;
        energy += hessian.with_triangle(group, |triangle, scale| {
            let mut energy = 0.0;
            for index in 0..triangle.count() {
                let columns = triangle.rows(index);
                let own = weight.f_narrow(1, columns.start, columns.end - columns.start)?;
                let after = weight.f_narrow(1, columns.end, triangle.dimension() - columns.end)?;
                energy += dot(&product(&own, &triangle.corner(index)?)?, &own)?;
                energy += 2.0 * dot(&product(&own, &triangle.part(index, columns.end..triangle.dimension())?)?, &after)?;
            }
            Ok(energy * scale)
        })?;
    }
    Ok(energy.max(0.0))
}
