//! Better palettes for given entries of the weights.

use half::f16;
use rayon::prelude::*;

use super::levels::Levels;
use super::problem::Problem;
use crate::error::Result;

/// Half of the objective's slope in each palette entry, [groups, 2^n]: one product.
pub(super) fn slope(problem: &Problem<'_>, levels: &Levels) -> Result<Vec<f64>> {
    let (d, data) = (problem.data.columns, &problem.data);
    let mut sums = vec![0.0; levels.groups() * levels.entries];
    for (part, rows) in problem.chunks() {
        let change = data.change(&rows, |at| if data.kept(at) { levels.value(at, d) } else { 0.0 });
        let product = problem.part(part).times(&change)?;
        add_products(&mut sums, &product, rows.start, problem, levels);
    }
    Ok(sums)
}

/// Lowers the objective over the palettes, indices fixed: the least squares problem (sum_r S_r H S_r^T) t = sum_r S_r H w_r of each group,
/// S_r [2^n, d] being row r's indices as ones. By conjugate gradients on t for all groups at once: S_r H S_r^T t is a product with H and sums
/// over the weights of each entry. One product a step and one more. `slope` is [`slope`]'s.
///
/// Palettes are rounded to fp16, and a group whose new one is no better keeps its old one. Gives whether any is new.
pub(super) fn refit_palettes(problem: &Problem<'_>, levels: &mut Levels, slope: &[f64], steps: usize) -> Result<bool> {
    let d = problem.data.columns;
    let entries = levels.entries;
    let diagonal = diagonal(problem, levels);
    let condition = |residual: &[f64]| -> Vec<f64> {
        residual.iter().zip(&diagonal).map(|(value, h)| if *h > 0.0 { value / h } else { 0.0 }).collect()
    };
    let mut step = vec![0.0; slope.len()];
    let mut residual: Vec<f64> = slope.iter().map(|slope| -slope).collect();
    let mut direction = condition(&residual);
    let mut before = dots(&residual, &direction, entries);
    for _ in 0..steps {
        let product = moved(problem, levels, &direction)?;
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

    let old = levels.values();
    let rounded: Vec<f32> = old.iter().zip(&step).map(|(old, step)| in_half(f64::from(*old) + step)).collect();
    let step: Vec<f64> = rounded.iter().zip(old).map(|(new, old)| f64::from(*new) - f64::from(*old)).collect();
    let product = moved(problem, levels, &step)?;
    let (slopes, curves) = (dots(&step, slope, entries), dots(&step, &product, entries));
    let better: Vec<bool> = slopes.iter().zip(&curves).map(|(slope, curve)| 2.0 * slope + curve < 0.0).collect();
    let chosen = rounded.iter().zip(old).enumerate().map(|(at, (new, old))| if better[at / entries] { *new } else { *old });
    let chosen: Vec<f32> = chosen.collect();
    let any = better.contains(&true);
    if any {
        levels.replace(chosen, d);
    }
    Ok(any)
}

/// The fp16 number nearest to `value`, finite, without a sign where it is zero.
fn in_half(value: f64) -> f32 {
    f16::from_f64(value.clamp(f16::MIN.to_f64(), f16::MAX.to_f64())).to_f32() + 0.0
}

fn share(a: f64, b: f64) -> f64 {
    let share = a / b;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}

/// Dot products by group.
fn dots(a: &[f64], b: &[f64], entries: usize) -> Vec<f64> {
    let dot = |(a, b): (&[f64], &[f64])| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    a.chunks(entries).zip(b.chunks(entries)).map(dot).collect()
}

/// sum_r S_r H S_r^T t.
fn moved(problem: &Problem<'_>, levels: &Levels, t: &[f64]) -> Result<Vec<f64>> {
    let (d, data) = (problem.data.columns, &problem.data);
    let entry = |at: usize| t[at / d / levels.group_rows * levels.entries + usize::from(levels.indices[at])] as f32;
    let mut sums = vec![0.0; levels.groups() * levels.entries];
    for (part, rows) in problem.chunks() {
        let span = data.span(&rows).into_par_iter();
        let moves: Vec<f32> = span.map(|at| if data.kept(at) { entry(at) } else { 0.0 }).collect();
        add_products(&mut sums, &problem.part(part).times(&moves)?, rows.start, problem, levels);
    }
    Ok(sums)
}

/// Adds a product with H, of rows from `start` on, to the sums of their groups: over the weights of each entry.
fn add_products(sums: &mut [f64], product: &[f32], start: usize, problem: &Problem<'_>, levels: &Levels) {
    let (d, data) = (problem.data.columns, &problem.data);
    let of_rows = product.par_chunks(d).enumerate().map(|(row, product)| {
        let mut sums = vec![0.0; levels.entries];
        let first = (start + row) * d;
        for (at, product) in (first..).zip(product) {
            if data.kept(at) {
                sums[usize::from(levels.indices[at])] += f64::from(*product);
            }
        }
        sums
    });
    add(sums, of_rows.collect(), start, levels);
}

/// H_jj summed over the weights of each entry.
fn diagonal(problem: &Problem<'_>, levels: &Levels) -> Vec<f64> {
    let data = &problem.data;
    let d = data.columns;
    let mut sums = vec![0.0; levels.groups() * levels.entries];
    for (part, rows) in problem.chunks() {
        let diagonal = &problem.part(part).diagonal;
        let start = rows.start;
        let of_rows = rows.into_par_iter().map(|row| {
            let mut sums = vec![0.0; levels.entries];
            for (column, h) in diagonal.iter().enumerate() {
                if data.kept(row * d + column) {
                    sums[usize::from(levels.indices[row * d + column])] += f64::from(*h);
                }
            }
            sums
        });
        add(&mut sums, of_rows.collect(), start, levels);
    }
    sums
}

/// Adds the sums of rows from `start` on to those of their groups, row by row.
fn add(sums: &mut [f64], of_rows: Vec<Vec<f64>>, start: usize, levels: &Levels) {
    for (row, of_row) in (start..).zip(of_rows) {
        let group = row / levels.group_rows * levels.entries;
        sums[group..group + levels.entries].iter_mut().zip(of_row).for_each(|(sum, of_row)| *sum += of_row);
    }
}
