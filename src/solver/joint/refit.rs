//! The best weights on a mask.

use rayon::prelude::*;

use super::factors::Part;
use super::problem::{Problem, dots};
use crate::error::Result;

/// Lowers tr((W - W0) H (W - W0)^T) over the kept weights, the others being zero: conjugate gradients for all rows at once, each row with
/// its own step, preconditioned by the diagonal of H. One product with H a step, and one before.
///
/// No step raises a row's objective.
pub(super) fn refit(problem: &Problem<'_>, weight: &mut [f32], steps: usize) -> Result<()> {
    for (part, rows) in problem.chunks() {
        let span = problem.data.span(&rows);
        let keep = problem.data.keep.as_ref().map(|keep| &keep[span.clone()]);
        refit_rows(problem.part(part), &problem.data.original[span.clone()], &mut weight[span], keep, steps)?;
    }
    Ok(())
}

/// [`refit`] for rows that are multiplied with H at once.
pub(super) fn refit_rows(part: &Part, original: &[f32], weight: &mut [f32], keep: Option<&[bool]>, steps: usize) -> Result<()> {
    if steps == 0 {
        return Ok(());
    }
    let d = part.diagonal.len();
    let change: Vec<f32> = original.par_iter().zip(&*weight).map(|(old, new)| old - new).collect();
    let mut residual = part.times(&change)?;
    mask(&mut residual, keep);
    let mut conditioned = precondition(&residual, &part.diagonal);
    let mut direction = conditioned.clone();
    let mut before = dots(&residual, &conditioned, d);
    for _ in 0..steps {
        let mut product = part.times(&direction)?;
        mask(&mut product, keep);
        let curvature = dots(&direction, &product, d);
        let step: Vec<f32> = before.iter().zip(&curvature).map(|(now, curve)| share(*now, *curve)).collect();
        add_rows(weight, &direction, &step, d);
        let back: Vec<f32> = step.iter().map(|step| -step).collect();
        add_rows(&mut residual, &product, &back, d);
        conditioned = precondition(&residual, &part.diagonal);
        let after = dots(&residual, &conditioned, d);
        let keep_on: Vec<f32> = after.iter().zip(&before).map(|(after, before)| share(*after, *before)).collect();
        direction.par_chunks_mut(d).zip(conditioned.par_chunks(d)).zip(&keep_on).for_each(|((direction, new), keep_on)| {
            direction.iter_mut().zip(new).for_each(|(direction, new)| *direction = new + keep_on * *direction);
        });
        before = after;
    }
    Ok(())
}

/// A quotient, 0 where there is none: a row that is solved.
fn share(a: f64, b: f64) -> f32 {
    let share = (a / b) as f32;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}

fn mask(values: &mut [f32], keep: Option<&[bool]>) {
    if let Some(keep) = keep {
        values.par_iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(value, _)| *value = 0.0);
    }
}

fn precondition(residual: &[f32], diagonal: &[f32]) -> Vec<f32> {
    let mut conditioned = residual.to_vec();
    conditioned.par_chunks_mut(diagonal.len()).for_each(|row| {
        row.iter_mut().zip(diagonal).for_each(|(value, h)| *value = if *h > 0.0 { *value / h } else { 0.0 });
    });
    conditioned
}

/// Adds to each row a multiple of another's.
fn add_rows(to: &mut [f32], from: &[f32], factors: &[f32], columns: usize) {
    to.par_chunks_mut(columns).zip(from.par_chunks(columns)).zip(factors).for_each(|((to, from), factor)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
    });
}
