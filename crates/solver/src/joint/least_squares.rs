//! Least-squares weights on a fixed mask.

use rayon::prelude::*;
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

use super::super::matrix::{numbers, numbers_mut};
use super::factors::Part;
use super::problem::dots;
use super::row::Row;

/// The state of the masked least-squares solve for some rows: weights, gradient and mask, [o, d]
/// each. The objective is tr((W - W0) H (W - W0)^T).
#[derive(Debug, Clone)]
pub(super) struct MaskedLeastSquares<'a> {
    part: &'a Part,
    original: &'a [f32],
    /// W.
    pub weight: Vec<f32>,
    /// G = (W - W0) H in all columns. It is updated together with W, so that it takes no further
    /// product with H.
    pub gradient: Vec<f32>,
    /// 1 where a weight is kept, else 0.
    pub mask: Vec<f32>,
}

impl<'a> MaskedLeastSquares<'a> {
    /// The state at `weight`, which must be zero where `keep` is false. It takes one product with
    /// H.
    pub(super) fn new(part: &'a Part, original: &'a [f32], weight: &[f32], keep: &[bool]) -> Result<Self> {
        let change: Vec<f32> = weight.par_iter().zip(original).map(|(new, old)| new - old).collect();
        let gradient = part.times(&change)?;
        let mask = keep.iter().map(|keep| f32::from(u8::from(*keep))).collect();
        Ok(MaskedLeastSquares { part, original, weight: weight.to_vec(), gradient, mask })
    }

    /// The Hessian of these rows.
    pub(super) fn part(&self) -> &'a Part {
        self.part
    }

    /// W - W0.
    pub(super) fn change(&self) -> Vec<f32> {
        self.weight.par_iter().zip(self.original).map(|(new, old)| new - old).collect()
    }

    /// The objective of each row.
    pub(super) fn losses(&self) -> Vec<f64> {
        dots(&self.change(), &self.gradient, self.part.diagonal.len())
    }

    /// Adds `change` to the weights. It takes one product with H.
    pub(super) fn add(&mut self, change: &[f32]) -> Result<()> {
        let product = self.part.times(change)?;
        self.weight.par_iter_mut().zip(change).for_each(|(weight, change)| *weight += change);
        self.gradient.par_iter_mut().zip(product).for_each(|(gradient, product)| *gradient += product);
        Ok(())
    }

    /// Copies a row from another state of the same rows.
    pub(super) fn take_row(&mut self, row: usize, other: &MaskedLeastSquares<'_>) {
        let d = self.part.diagonal.len();
        let span = row * d..(row + 1) * d;
        self.weight[span.clone()].copy_from_slice(&other.weight[span.clone()]);
        self.gradient[span.clone()].copy_from_slice(&other.gradient[span.clone()]);
        self.mask[span.clone()].copy_from_slice(&other.mask[span]);
    }

    /// Lowers the objective over the kept weights by conjugate gradients, preconditioned by the
    /// diagonal of H, for all rows at once, each row with its own step length. Each step takes
    /// one product with H. The descent ends after `steps` steps, or after a step that lowers the
    /// objective by less than the share `least_gain`.
    ///
    /// No step raises a row's objective.
    pub(super) fn descend(&mut self, steps: usize, least_gain: f64) -> Result<()> {
        let d = self.part.diagonal.len();
        let mut direction = Tensor::f_zeros([(self.weight.len() / d) as i64, d as i64], (Kind::Float, Device::Cpu))?;
        let mut before: Vec<f64> = self.rows(numbers_mut(&mut direction)?).map(Row::begin).collect();
        let mut left: f64 = self.losses().iter().sum();
        for _ in 0..steps {
            let product = self.part.product(&direction)?;
            let rows = self.rows(numbers_mut(&mut direction)?).zip(numbers(&product)?.par_chunks(d)).zip(&before);
            let done: Vec<(f64, f64)> = rows.map(|((row, product), before)| row.step(product, *before)).collect();
            let lower: f64 = done.iter().map(|(_, lower)| lower).sum();
            left -= lower;
            if lower < least_gain * left {
                break;
            }
            before = done.into_iter().map(|(now, _)| now).collect();
        }
        Ok(())
    }

    /// The rows, each with its part of `direction`.
    fn rows<'b>(&'b mut self, direction: &'b mut [f32]) -> impl IndexedParallelIterator<Item = Row<'b>> {
        let conditioner = self.part.conditioner.as_slice();
        let d = conditioner.len();
        let rows = self.weight.par_chunks_mut(d).zip(self.gradient.par_chunks_mut(d));
        let rows = rows.zip(direction.par_chunks_mut(d)).zip(self.mask.par_chunks(d));
        rows.map(move |(((weight, gradient), direction), mask)| Row { weight, gradient, direction, mask, conditioner })
    }
}
