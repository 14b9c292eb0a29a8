//! The least-squares problem and its loss.

use std::ops::Range;

use rayon::prelude::*;
use squeeze_base::error::Result;

use super::factors::{JointFactors, Part};
use super::row::dot;

/// The number of rows that are multiplied with H at once.
pub(super) const ROWS: usize = 512;

/// The problem: find W [o, d] on the mask such that tr((W - W0) H (W - W0)^T) is small, H being the
/// damped Hessian. All matrices are row-major, and columns are in the order of the factors.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub factors: &'a JointFactors,
    pub data: Data,
}

/// The part of a [`Problem`] that threads can share, since it holds no tensors.
#[derive(Debug)]
pub(super) struct Data {
    /// W0.
    pub original: Vec<f32>,
    /// The kept weights; `None` if all are kept.
    pub keep: Option<Vec<bool>>,
    /// d.
    pub columns: usize,
    /// o.
    pub rows: usize,
    /// The weight's own shape, [o, i, ...].
    pub shape: Vec<usize>,
}

impl Data {
    /// The elements of some rows.
    pub(super) fn span(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start * self.columns..rows.end * self.columns
    }

    /// Whether an element is kept.
    pub(super) fn kept(&self, at: usize) -> bool {
        self.keep.as_ref().is_none_or(|keep| keep[at])
    }

    /// W - W0 of some rows, for W given as a function of the element.
    pub(super) fn change(&self, rows: &Range<usize>, weight: impl Fn(usize) -> f32 + Sync) -> Vec<f32> {
        let span = self.span(rows);
        let start = span.start;
        let original = self.original[span].par_iter().enumerate();
        original.map(|(at, original)| weight(start + at) - original).collect()
    }
}

impl Problem<'_> {
    /// The ranges of rows that are processed at once, each with the index of its Hessian. They do
    /// not depend on the number of threads.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (rows, parts) = (self.data.rows, self.factors.parts.len());
        let of_part = rows / parts;
        (0..parts).flat_map(move |part| {
            let end = (part + 1) * of_part;
            (part * of_part..end).step_by(ROWS).map(move |start| (part, start..end.min(start + ROWS)))
        })
    }

    /// The Hessian of a chunk.
    pub(super) fn part(&self, part: usize) -> &Part {
        &self.factors.parts[part]
    }

    /// tr((W - W0) H (W - W0)^T), by the damped Hessian and by the bare one.
    pub(super) fn loss(&self, weight: impl Fn(usize) -> f32 + Sync) -> Result<Loss> {
        let mut loss = Loss::default();
        for (part, rows) in self.chunks() {
            let part = self.part(part);
            let change = self.data.change(&rows, &weight);
            let product = part.times(&change)?;
            loss.add(part, &change, &product);
        }
        Ok(loss)
    }
}

/// The loss of a weight.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Loss {
    /// By the damped Hessian, which the solver minimises.
    pub damped: f64,
    /// By the undamped Hessian: the error on the calibration inputs.
    pub bare: f64,
}

impl Loss {
    /// Adds the loss of some rows of a change D, given D and D H.
    pub(super) fn add(&mut self, part: &Part, change: &[f32], product: &[f32]) {
        let columns = part.diagonal.len();
        let damped: f64 = dots(change, product, columns).iter().sum();
        let square: f64 = dots(change, change, columns).iter().sum();
        self.damped += damped;
        self.bare += (damped - part.added * square).max(0.0);
    }
}

/// The dot product of each row of `a` with that of `b`, in fp64.
pub(super) fn dots(a: &[f32], b: &[f32], columns: usize) -> Vec<f64> {
    a.par_chunks(columns).zip(b.par_chunks(columns)).map(|(a, b)| dot(a, b)).collect()
}
