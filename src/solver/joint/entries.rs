//! Better palettes for given entries of the weights.

use half::f16;
use rayon::prelude::*;

use super::levels::Levels;
use super::problem::Problem;
use crate::error::Result;

/// Lowers the objective over the palettes, indices fixed: the least squares problem (sum_r S_r H S_r^T) t = sum_r S_r H w_r of each group,
/// S_r [2^n, d] being row r's indices as ones. By conjugate gradients on t for all groups at once: S_r H S_r^T t is a product with H and sums
/// over the weights of each entry. One product a step and two more.
///
/// Palettes are rounded to fp16, and a group whose new one is no better keeps its old one. Gives whether any is new.
pub(super) fn refit_palettes(problem: &Problem<'_>, levels: &mut Levels, steps: usize) -> Result<bool> {
    let data = &problem.data;
    let d = data.columns;
    let entries = levels.entries;
    // Half of the objective's slope in each entry.
    let slope = sums(problem, levels, |at| levels.value(at, d) - data.original[at], true)?;
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
    let (slopes, curves) = (dots(&step, &slope, entries), dots(&step, &product, entries));
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
    let data = &problem.data;
    let d = data.columns;
    let entry = |at: usize| t[at / d / levels.group_rows * levels.entries + usize::from(levels.indices[at])] as f32;
    sums(problem, levels, entry, false)
}

/// X H summed over the weights of each entry: [groups, entries], for X [o, d] by element. Where pruned, X is 0, or W0 less if `change` says
/// that X is W - W0.
fn sums(problem: &Problem<'_>, levels: &Levels, x: impl Fn(usize) -> f32 + Sync, change: bool) -> Result<Vec<f64>> {
    let data = &problem.data;
    let d = data.columns;
    let mut sums = vec![0.0; levels.groups() * levels.entries];
    for (part, rows) in problem.chunks() {
        let span = data.span(&rows);
        let element = |at: usize| match (data.kept(at), change) {
            (true, _) => x(at),
            (false, true) => -data.original[at],
            (false, false) => 0.0,
        };
        let x: Vec<f32> = span.clone().into_par_iter().map(element).collect();
        let product = problem.part(part).times(&x)?;
        let of_rows = product.par_chunks(d).enumerate().map(|(at, product)| {
            let mut sums = vec![0.0; levels.entries];
            let start = span.start + at * d;
            for (at, product) in product.iter().enumerate() {
                if data.kept(start + at) {
                    sums[usize::from(levels.indices[start + at])] += f64::from(*product);
                }
            }
            sums
        });
        add(&mut sums, of_rows.collect(), rows.start, levels);
    }
    Ok(sums)
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
