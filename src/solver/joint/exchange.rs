//! A better mask of the same size.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::fit::Fit;
use crate::error::Result;

/// How many exchanges a row begins with, as a share of its columns.
const FIRST: usize = 24;

/// What is exchanged, and how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    /// Turns at most.
    pub turns: usize,
    /// Steps of [`Fit::descend`] after each.
    pub steps: usize,
    /// What such a step is to be worth.
    pub worth: f64,
    /// m of n:m, within whose groups weights change places.
    pub group: Option<usize>,
}

/// Lets pruned weights that would lower a row's objective change places with kept ones that hardly do, lets the row settle, and takes it
/// back where that was no gain: no row gets worse, and each keeps its number of weights. One product with H a turn, and one a step.
///
/// With v_j = 1 / [H^-1]_jj, what a weight is worth when all others make up for it: a pruned weight k would gain about G_k^2 / v_k, a kept
/// weight j cost about w_j^2 v_j. One that comes begins where it would go alone, at -G_k / H_kk: begun where it is to end, at -G_k / v_k, before
/// the others have made up for it, all of them together raise the objective manyfold where inputs are alike.
pub(super) fn exchange(fit: &mut Fit<'_>, how: Exchange) -> Result<()> {
    let d = fit.part().diagonal.len();
    let mut losses = fit.losses();
    let mut limits = vec![(d / FIRST).max(1); losses.len()];
    for _ in 0..how.turns {
        let mut tried = fit.clone();
        let mut change = vec![0.0; fit.weight.len()];
        let rows = change.par_chunks_mut(d).zip(tried.mask.par_chunks_mut(d)).zip(&limits).enumerate();
        let (weight, gradient) = (fit.weight.as_slice(), fit.gradient.as_slice());
        let (scale, conditioner) = (fit.part().scale.as_slice(), fit.part().conditioner.as_slice());
        let counts = rows.map(|(row, ((change, mask), limit))| {
            let span = row * d..(row + 1) * d;
            let row = Row { change, mask, weight: &weight[span.clone()], gradient: &gradient[span], scale, conditioner };
            if *limit == 0 { 0 } else { row.exchange(*limit, how.group) }
        });
        let counts: Vec<usize> = counts.collect();
        if counts.iter().all(|count| *count == 0) {
            break;
        }
        tried.add(&change)?;
        // A kept weight that goes is gone, whatever rounding left of it.
        let gone = tried.weight.par_iter_mut().zip(&tried.mask);
        gone.filter(|(_, mask)| **mask == 0.0).for_each(|(weight, _)| *weight = 0.0);
        tried.descend(how.steps, how.worth)?;
        let new = tried.losses();
        for (row, count) in counts.iter().enumerate() {
            if *count > 0 && new[row] < losses[row] {
                fit.take_row(row, &tried);
                losses[row] = new[row];
            } else {
                // Too many at once, or none that is worth it.
                limits[row] = *count / 4;
            }
        }
    }
    Ok(())
}

/// One row and the scale v of its columns.
struct Row<'a> {
    change: &'a mut [f32],
    mask: &'a mut [f32],
    weight: &'a [f32],
    gradient: &'a [f32],
    scale: &'a [f32],
    conditioner: &'a [f32],
}

impl Row<'_> {
    /// Exchanges up to `limit` pairs, those first that gain most; says how many.
    fn exchange(self, limit: usize, group: Option<usize>) -> usize {
        let d = self.weight.len();
        let mut pairs: Vec<(f32, usize, usize)> = match group {
            None => {
                let (gains, costs) = self.ranked(0..d, limit);
                gains.iter().zip(&costs).map(|(gain, cost)| (gain.0 - cost.0, gain.1, cost.1)).collect()
            }
            Some(m) => {
                let best = (0..d / m).filter_map(|at| {
                    let (gains, costs) = self.ranked(at * m..(at + 1) * m, 1);
                    let (gain, cost) = (gains.first()?, costs.first()?);
                    Some((gain.0 - cost.0, gain.1, cost.1))
                });
                best.collect()
            }
        };
        pairs.retain(|(worth, ..)| *worth > 0.0);
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        pairs.truncate(limit);
        for (_, comes, goes) in &pairs {
            self.mask[*comes] = 1.0;
            self.change[*comes] = -self.gradient[*comes] * self.conditioner[*comes];
            self.mask[*goes] = 0.0;
            self.change[*goes] = -self.weight[*goes];
        }
        pairs.len()
    }

    /// What pruned columns would gain, the most first, and what kept ones would cost, the least first; of equals the first. `count` of each
    /// at most.
    #[expect(clippy::type_complexity, reason = "two lists of the same kind")]
    fn ranked(&self, columns: std::ops::Range<usize>, count: usize) -> (Vec<(f32, usize)>, Vec<(f32, usize)>) {
        let (kept, pruned): (Vec<usize>, Vec<usize>) =
            columns.filter(|at| self.scale[*at] > 0.0).partition(|at| self.mask[*at] > 0.0);
        let mut gains: Vec<_> = pruned.into_iter().map(|at| (self.gradient[at].powi(2) / self.scale[at], at)).collect();
        let mut costs: Vec<_> = kept.into_iter().map(|at| (self.weight[at].powi(2) * self.scale[at], at)).collect();
        first(&mut gains, count, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        first(&mut costs, count, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        (gains, costs)
    }
}

/// Leaves the first `count` of a list in order, and drops the others.
fn first<T>(list: &mut Vec<T>, count: usize, order: impl Fn(&T, &T) -> Ordering) {
    if count < list.len() {
        let _ = list.select_nth_unstable_by(count, &order);
        list.truncate(count);
    }
    list.sort_unstable_by(order);
}
