//! The best weights on a mask.

use rayon::prelude::*;

use super::factors::Part;
use super::problem::{dot, dots};
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
        let mut direction = vec![0.0; self.weight.len()];
        let mut before = vec![0.0; self.weight.len() / d];
        self.rows().zip(direction.par_chunks_mut(d)).zip(&mut before).for_each(|((row, direction), before)| {
            *before = row.turn(direction, 0.0);
        });
        for _ in 0..steps {
            let product = self.part.times(&direction)?;
            let rows = self.rows().zip(direction.par_chunks_mut(d)).zip(product.par_chunks(d)).zip(&mut before);
            rows.for_each(|(((mut row, direction), product), before)| {
                row.step(direction, product, share(*before, dot(direction, product)));
                *before = row.turn(direction, *before);
            });
        }
        Ok(())
    }

    /// Row by row.
    fn rows(&mut self) -> impl IndexedParallelIterator<Item = Row<'_>> {
        let diagonal = self.part.diagonal.as_slice();
        let d = diagonal.len();
        let keep = self.keep.as_deref();
        let rows = self.weight.par_chunks_mut(d).zip(self.gradient.par_chunks_mut(d)).enumerate();
        rows.map(move |(at, (weight, gradient))| Row {
            weight,
            gradient,
            keep: keep.map(|keep| &keep[at * d..(at + 1) * d]),
            diagonal,
        })
    }
}

/// One row of a fit.
struct Row<'a> {
    weight: &'a mut [f32],
    gradient: &'a mut [f32],
    keep: Option<&'a [bool]>,
    diagonal: &'a [f32],
}

impl Row<'_> {
    /// Goes `length` along `direction`, of which `product` is the product with H.
    fn step(&mut self, direction: &[f32], product: &[f32], length: f32) {
        self.weight.iter_mut().zip(direction).for_each(|(weight, along)| *weight += length * along);
        self.gradient.iter_mut().zip(product).for_each(|(gradient, along)| *gradient += length * along);
    }

    /// Makes the next direction of the last: z + (r . z / `before`) direction, r being -G and z r over the diagonal of H, both of the kept
    /// weights alone. Gives back r . z.
    fn turn(&self, direction: &mut [f32], before: f64) -> f64 {
        let conditioned = |at: usize| {
            let (kept, h) = (self.keep.is_none_or(|keep| keep[at]), self.diagonal[at]);
            if kept && h > 0.0 { -self.gradient[at] / h } else { 0.0 }
        };
        let z: Vec<f32> = (0..direction.len()).map(conditioned).collect();
        let now = -dot(self.gradient, &z);
        let keep_on = share(now, before);
        direction.iter_mut().zip(z).for_each(|(direction, z)| *direction = z + keep_on * *direction);
        now
    }
}

/// A quotient, 0 where there is none: a row that is solved.
fn share(a: f64, b: f64) -> f32 {
    let share = (a / b) as f32;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}
