//! The best weights on a mask.

use rayon::prelude::*;

use super::factors::Part;
use super::problem::dots;
use crate::error::Result;

/// Rows of a weight on their way to the least tr((W - W0) H (W - W0)^T), with its slope: all [o, d].
#[derive(Debug, Clone)]
pub(super) struct Fit<'a> {
    part: &'a Part,
    original: &'a [f32],
    /// W.
    pub weight: Vec<f32>,
    /// G = (W - W0) H, in all columns: brought up to date with W, so that it costs no product of its own.
    pub gradient: Vec<f32>,
    /// Which weights may be other than zero; `None`: all.
    pub keep: Option<Vec<bool>>,
}

impl<'a> Fit<'a> {
    /// Starts at `weight`, which is zero where it is not kept. One product with H.
    pub fn new(part: &'a Part, original: &'a [f32], weight: &[f32], keep: Option<&[bool]>) -> Result<Self> {
        let change: Vec<f32> = weight.par_iter().zip(original).map(|(new, old)| new - old).collect();
        let gradient = part.times(&change)?;
        Ok(Fit { part, original, weight: weight.to_vec(), gradient, keep: keep.map(<[bool]>::to_vec) })
    }

    /// The Hessian that is theirs.
    pub fn part(&self) -> &'a Part {
        self.part
    }

    /// The objective of each row.
    pub fn losses(&self) -> Vec<f64> {
        let change: Vec<f32> = self.weight.par_iter().zip(self.original).map(|(new, old)| new - old).collect();
        dots(&change, &self.gradient, self.part.diagonal.len())
    }

    /// Adds `change` to the weights. One product with H.
    pub fn add(&mut self, change: &[f32]) -> Result<()> {
        let product = self.part.times(change)?;
        self.weight.par_iter_mut().zip(change).for_each(|(weight, change)| *weight += change);
        self.gradient.par_iter_mut().zip(product).for_each(|(gradient, product)| *gradient += product);
        Ok(())
    }

    /// Takes rows over from another fit of the same.
    pub fn take_row(&mut self, row: usize, other: &Fit<'_>) {
        let d = self.part.diagonal.len();
        let span = row * d..(row + 1) * d;
        self.weight[span.clone()].copy_from_slice(&other.weight[span.clone()]);
        self.gradient[span.clone()].copy_from_slice(&other.gradient[span.clone()]);
        if let (Some(keep), Some(other)) = (&mut self.keep, &other.keep) {
            keep[span.clone()].copy_from_slice(&other[span]);
        }
    }

    /// Lowers the objective over the kept weights: conjugate gradients for all rows at once, each row with its own step, preconditioned by
    /// the diagonal of H. One product with H a step.
    ///
    /// No step raises a row's objective.
    pub fn descend(&mut self, steps: usize) -> Result<()> {
        let d = self.part.diagonal.len();
        let mut conditioned = self.conditioned();
        let mut direction = conditioned.clone();
        let mut before = self.against(&conditioned);
        for step in 1..=steps {
            let product = self.part.times(&direction)?;
            let curvature = dots(&direction, &product, d);
            let length: Vec<f32> = before.iter().zip(&curvature).map(|(now, curve)| share(*now, *curve)).collect();
            add_rows(&mut self.weight, &direction, &length, d);
            add_rows(&mut self.gradient, &product, &length, d);
            if step == steps {
                break;
            }
            conditioned = self.conditioned();
            let after = self.against(&conditioned);
            let keep_on: Vec<f32> = after.iter().zip(&before).map(|(after, before)| share(*after, *before)).collect();
            direction.par_chunks_mut(d).zip(conditioned.par_chunks(d)).zip(&keep_on).for_each(|((direction, new), keep_on)| {
                direction.iter_mut().zip(new).for_each(|(direction, new)| *direction = new + keep_on * *direction);
            });
            before = after;
        }
        Ok(())
    }

    /// -G of the kept weights over the diagonal of H.
    fn conditioned(&self) -> Vec<f32> {
        let (diagonal, gradient, keep) = (self.part.diagonal.as_slice(), self.gradient.as_slice(), self.keep.as_deref());
        let element = |at: usize| {
            let (kept, h) = (keep.is_none_or(|keep| keep[at]), diagonal[at % diagonal.len()]);
            if kept && h > 0.0 { -gradient[at] / h } else { 0.0 }
        };
        (0..gradient.len()).into_par_iter().map(element).collect()
    }

    /// -G . x of each row, x being zero where weights are not kept.
    fn against(&self, x: &[f32]) -> Vec<f64> {
        dots(&self.gradient, x, self.part.diagonal.len()).into_iter().map(|dot| -dot).collect()
    }
}

/// A quotient, 0 where there is none: a row that is solved.
fn share(a: f64, b: f64) -> f32 {
    let share = (a / b) as f32;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}

/// Adds to each row a multiple of another's.
fn add_rows(to: &mut [f32], from: &[f32], factors: &[f32], columns: usize) {
    to.par_chunks_mut(columns).zip(from.par_chunks(columns)).zip(factors).for_each(|((to, from), factor)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
    });
}
