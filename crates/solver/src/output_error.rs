//! The error of a layer's output that a changed weight causes.

use squeeze_base::error::Result;
use squeeze_numerics::product::product;
use squeeze_numerics::sum::dot;
use tch::Tensor;

use super::Hessian;
use super::matrix::panels;
use super::triangle::Triangle;
use super::weight::flat_for;

/// The relative squared error of the layer's output on the inputs of the Hessian:
/// tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T) for `original` W0 and `new` W, each [o, ...].
///
/// Without dampening. Products in fp32, their sum in fp64. Zero if W = W0; infinite if only W0
/// gives an output of zero.
///
/// # Errors
/// [`squeeze_base::Error::Argument`] if a shape does not fit, [`squeeze_base::Error::NotFinite`]
/// for NaN in a weight.
pub fn output_error(original: &Tensor, new: &Tensor, hessian: &Hessian) -> Result<f64> {
    let change = flat_for(new, hessian)?.f_sub(&flat_for(original, hessian)?)?;
    let [energy, error] = output_energies([original, &change], hessian)?;
    Ok(if error == 0.0 { 0.0 } else { error / energy })
}

/// tr(W H W^T) for a weight [o, ...]: twice the mean over the samples of the squared norm of W x,
/// summed over each sample's vectors.
///
/// Only the upper triangle is read, in half the work of W H. Products in fp32, their sum in fp64.
///
/// # Errors
/// As [`output_error`].
pub fn output_energy(weight: &Tensor, hessian: &Hessian) -> Result<f64> {
    let [energy] = output_energies([weight], hessian)?;
    Ok(energy)
}

/// [`output_energy`] of several weights of one layer.
///
/// # Errors
/// As [`output_error`].
pub fn output_energies<const N: usize>(weights: [&Tensor; N], hessian: &Hessian) -> Result<[f64; N]> {
    let mut flat = Vec::with_capacity(N);
    for weight in weights {
        flat.push(flat_for(weight, hessian)?);
    }
    let mut energies = [0.0; N];
    for group in 0..hessian.groups() {
        hessian.with_triangle(group, |triangle, scale| {
            for (energy, weight) in energies.iter_mut().zip(&flat) {
                let rows = weight.size2()?.0 / hessian.groups();
                for part in panels(rows, ROWS) {
                    let part = weight.f_narrow(0, group * rows + part.start, part.end - part.start)?;
                    *energy += scale * energy_of(&part, triangle)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(energies.map(|energy| energy.max(0.0)))
}

/// The number of rows processed at once. It bounds the memory of the products.
const ROWS: i64 = 1024;

/// tr(W H W^T) for rows [o, d].
fn energy_of(weight: &Tensor, triangle: &Triangle) -> Result<f64> {
    let mut energy = 0.0;
    for index in 0..triangle.count() {
        let columns = triangle.rows(index);
        let block = weight.f_narrow(1, columns.start, columns.end - columns.start)?;
        energy += dot(&product(&block, &triangle.corner(index)?)?, &block)?;
        if columns.end < triangle.dimension() {
            let after = columns.end..triangle.dimension();
            let others = weight.f_narrow(1, after.start, after.end - after.start)?;
            energy += 2.0 * dot(&product(&block, &triangle.part(index, after)?)?, &others)?;
        }
    }
    Ok(energy)
}
