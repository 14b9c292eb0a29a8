//! Least-squares palettes for fixed indices.

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::Result;

use super::problem::Problem;
use super::sorted_codebook::SortedCodebook;

/// Half of the objective's gradient with respect to each value of the palettes, [groups, 2^n, V].
/// It takes one product with H.
pub(super) fn palette_gradient(problem: &Problem<'_>, sorted: &SortedCodebook) -> Result<Vec<f64>> {
    let (d, data) = (problem.data.columns, &problem.data);
    let mut sums = vec![0.0; sorted.groups() * sorted.palette_length()];
    for (part, rows) in problem.chunks() {
        let change = data.change(&rows, |at| if data.kept(at) { sorted.value(at, d) } else { 0.0 });
        let product = problem.part(part).times(&change)?;
        add_products(&mut sums, &product, rows.start, problem, sorted);
    }
    Ok(sums)
}

/// Lowers the objective over the palettes, indices fixed: the least squares problem (sum_r S_r H
/// S_r^T) t = sum_r S_r H w_r of each group, S_r [2^n, d] being row r's indices as ones. Conjugate
/// gradients on t run for all groups at once: S_r H S_r^T t is a product with H and sums over the
/// weights of each entry. There is one product per step, and one more at the end. `gradient` is the
/// result of [`palette_gradient`].
///
/// With vectors, S_r selects the entries' values for the row's place in its vector.
///
/// Palettes are rounded to fp16, and a group whose new palette does not lower the objective keeps
/// its old one. Returns whether any palette changed.
pub(super) fn refit_palettes(problem: &Problem<'_>, sorted: &mut SortedCodebook, gradient: &[f64], steps: usize) -> Result<bool> {
    let d = problem.data.columns;
    let entries = sorted.palette_length();
    let diagonal = diagonal(problem, sorted);
    let condition = |residual: &[f64]| -> Vec<f64> {
        residual.iter().zip(&diagonal).map(|(value, h)| if *h > 0.0 { value / h } else { 0.0 }).collect()
    };
    let mut step = vec![0.0; gradient.len()];
    let mut residual: Vec<f64> = gradient.iter().map(|gradient| -gradient).collect();
    let mut direction = condition(&residual);
    let mut before = dots(&residual, &direction, entries);
    for _ in 0..steps {
        let product = palette_hessian_product(problem, sorted, &direction)?;
        let curvature = dots(&direction, &product, entries);
        let length: Vec<f64> = before.iter().zip(&curvature).map(|(now, curve)| share(*now, *curve)).collect();
        for (at, step) in step.iter_mut().enumerate() {
            *step += length[at / entries] * direction[at];
            residual[at] -= length[at / entries] * product[at];
        }
        let conditioned = condition(&residual);
        let after = dots(&residual, &conditioned, entries);
        for (at, direction) in direction.iter_mut().enumerate() {
            *direction = conditioned[at] + share(after[at / entries], before[at / entries]) * *direction;
        }
        before = after;
    }

    let old = sorted.values();
    let rounded: Vec<f32> = old.iter().zip(&step).map(|(old, step)| in_half(f64::from(*old) + step)).collect();
    let step: Vec<f64> = rounded.iter().zip(old).map(|(new, old)| f64::from(*new) - f64::from(*old)).collect();
    let product = palette_hessian_product(problem, sorted, &step)?;
    let (slopes, curves) = (dots(&step, gradient, entries), dots(&step, &product, entries));
    let better: Vec<bool> = slopes.iter().zip(&curves).map(|(slope, curve)| 2.0 * slope + curve < 0.0).collect();
    let chosen = rounded.iter().zip(old).enumerate().map(|(at, (new, old))| if better[at / entries] { *new } else { *old });
    let chosen: Vec<f32> = chosen.collect();
    let any = better.contains(&true);
    if any {
        sorted.replace(chosen, d);
    }
    Ok(any)
}

/// The finite fp16 number nearest to `value`; a zero has no sign.
fn in_half(value: f64) -> f32 {
    f16::from_f64(value.clamp(f16::MIN.to_f64(), f16::MAX.to_f64())).to_f32() + 0.0
}

/// A quotient; 0 where it is not finite or the divisor is not positive.
fn share(a: f64, b: f64) -> f64 {
    let share = a / b;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}

/// The dot product of each group's entries.
fn dots(a: &[f64], b: &[f64], entries: usize) -> Vec<f64> {
    let dot = |(a, b): (&[f64], &[f64])| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    a.chunks(entries).zip(b.chunks(entries)).map(dot).collect()
}

/// The product of the palettes' Hessian with t: sum_r S_r H S_r^T t.
fn palette_hessian_product(problem: &Problem<'_>, sorted: &SortedCodebook, t: &[f64]) -> Result<Vec<f64>> {
    let (d, data) = (problem.data.columns, &problem.data);
    let entry = |at: usize| t[at / d / sorted.group_rows * sorted.palette_length() + sorted.place(at, d)] as f32;
    let mut sums = vec![0.0; sorted.groups() * sorted.palette_length()];
    for (part, rows) in problem.chunks() {
        let span = data.span(&rows).into_par_iter();
        let moves: Vec<f32> = span.map(|at| if data.kept(at) { entry(at) } else { 0.0 }).collect();
        add_products(&mut sums, &problem.part(part).times(&moves)?, rows.start, problem, sorted);
    }
    Ok(sums)
}

/// Sums a product with H, of rows from `start` on, over the weights of each palette entry, and adds
/// the results to the sums of the rows' groups.
fn add_products(sums: &mut [f64], product: &[f32], start: usize, problem: &Problem<'_>, sorted: &SortedCodebook) {
    let (d, data) = (problem.data.columns, &problem.data);
    let of_rows = product.par_chunks(d).enumerate().map(|(row, product)| {
        let mut sums = vec![0.0; sorted.palette_length()];
        let first = (start + row) * d;
        for (at, product) in (first..).zip(product) {
            if data.kept(at) {
                sums[sorted.place(at, d)] += f64::from(*product);
            }
        }
        sums
    });
    add(sums, of_rows.collect(), start, sorted);
}

/// The diagonal of the palettes' Hessian: the sum of H_jj over the weights of each entry.
fn diagonal(problem: &Problem<'_>, sorted: &SortedCodebook) -> Vec<f64> {
    let data = &problem.data;
    let d = data.columns;
    let mut sums = vec![0.0; sorted.groups() * sorted.palette_length()];
    for (part, rows) in problem.chunks() {
        let diagonal = &problem.part(part).diagonal;
        let start = rows.start;
        let of_rows = rows.into_par_iter().map(|row| {
            let mut sums = vec![0.0; sorted.palette_length()];
            for (column, h) in diagonal.iter().enumerate() {
                if data.kept(row * d + column) {
                    sums[sorted.place(row * d + column, d)] += f64::from(*h);
                }
            }
            sums
        });
        add(&mut sums, of_rows.collect(), start, sorted);
    }
    sums
}

/// Adds the sums `of_rows`, of rows from `start` on, to the sums of their groups, row by row.
fn add(sums: &mut [f64], of_rows: Vec<Vec<f64>>, start: usize, sorted: &SortedCodebook) {
    for (row, of_row) in (start..).zip(of_rows) {
        let group = row / sorted.group_rows * sorted.palette_length();
        sums[group..group + sorted.palette_length()].iter_mut().zip(of_row).for_each(|(sum, of_row)| *sum += of_row);
    }
}
