//! A better mask of the same size.

use rayon::prelude::*;

use super::factors::Part;
use super::problem::{Problem, dots};
use super::refit::refit_rows;
use crate::error::Result;

/// How many exchanges a row begins with, as a share of its columns.
const FIRST: usize = 24;

/// What is exchanged, and how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    /// Turns at most.
    pub turns: usize,
    /// Steps of refit after each.
    pub refit_steps: usize,
    /// m of n:m, within whose groups weights change places.
    pub group: Option<usize>,
}

/// Lets pruned weights that would lower a row's objective change places with kept ones that hardly do, refits the row, and takes it back
/// where that was no gain: no row gets worse, and each keeps its number of weights.
///
/// With G = (W - W0) H and v_j = 1 / [H^-1]_jj, what a weight is worth when all others make up for it: a pruned weight k would gain about
/// G_k^2 / v_k, a kept weight j cost about w_j^2 v_j.
pub(super) fn exchange(problem: &mut Problem<'_>, weight: &mut [f32], how: Exchange) -> Result<()> {
    let Some(mut keep) = problem.data.keep.take() else { return Ok(()) };
    let d = problem.data.columns;
    for (part, rows) in problem.chunks() {
        let span = problem.data.span(&rows);
        let part = problem.part(part);
        let original = &problem.data.original[span.clone()];
        let (weight, keep) = (&mut weight[span.clone()], &mut keep[span]);
        let mut limits = vec![(d / FIRST).max(1); rows.len()];
        let mut state = State::of(part, original, weight)?;
        for _ in 0..how.turns {
            let scale = part.scale.as_slice();
            let mut new_weight = weight.to_vec();
            let mut new_keep = keep.to_vec();
            let tried =
                new_weight.par_chunks_mut(d).zip(new_keep.par_chunks_mut(d)).zip(state.gradient.par_chunks(d)).zip(&limits);
            let tried = tried.map(|(((weight, keep), gradient), limit)| {
                let row = Row { weight, keep, gradient, scale };
                if *limit == 0 { 0 } else { row.exchange(*limit, how.group) }
            });
            let tried: Vec<usize> = tried.collect();
            if tried.iter().all(|count| *count == 0) {
                break;
            }
            refit_rows(part, original, &mut new_weight, Some(&new_keep), how.refit_steps)?;
            let new = State::of(part, original, &new_weight)?;
            for (row, count) in tried.iter().enumerate() {
                let span = row * d..(row + 1) * d;
                if *count > 0 && new.loss[row] < state.loss[row] {
                    weight[span.clone()].copy_from_slice(&new_weight[span.clone()]);
                    keep[span.clone()].copy_from_slice(&new_keep[span.clone()]);
                    state.gradient[span.clone()].copy_from_slice(&new.gradient[span]);
                    state.loss[row] = new.loss[row];
                } else {
                    // Too many at once, or none that is worth it.
                    limits[row] = *count / 4;
                }
            }
        }
    }
    problem.data.keep = Some(keep);
    Ok(())
}

/// Where rows stand.
struct State {
    /// (W - W0) H.
    gradient: Vec<f32>,
    /// The objective of each row.
    loss: Vec<f64>,
}

impl State {
    fn of(part: &Part, original: &[f32], weight: &[f32]) -> Result<Self> {
        let change: Vec<f32> = weight.par_iter().zip(original).map(|(new, old)| new - old).collect();
        let gradient = part.times(&change)?;
        let loss = dots(&change, &gradient, part.diagonal.len());
        Ok(State { gradient, loss })
    }
}

/// One row and the scale v of its columns.
struct Row<'a> {
    weight: &'a mut [f32],
    keep: &'a mut [bool],
    gradient: &'a [f32],
    scale: &'a [f32],
}

impl Row<'_> {
    /// Exchanges up to `limit` pairs, those first that gain most; says how many.
    fn exchange(self, limit: usize, group: Option<usize>) -> usize {
        let d = self.weight.len();
        let mut pairs: Vec<(f32, usize, usize)> = match group {
            None => {
                let (mut gains, mut costs) = self.ranked(0..d);
                gains.truncate(limit);
                costs.truncate(limit);
                gains.iter().zip(&costs).map(|(gain, cost)| (gain.0 - cost.0, gain.1, cost.1)).collect()
            }
            Some(m) => {
                let best = (0..d / m).filter_map(|at| {
                    let (gains, costs) = self.ranked(at * m..(at + 1) * m);
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
            self.keep[*comes] = true;
            self.weight[*comes] = -self.gradient[*comes] / self.scale[*comes];
            self.keep[*goes] = false;
            self.weight[*goes] = 0.0;
        }
        pairs.len()
    }

    /// What pruned columns would gain, the most first, and what kept ones would cost, the least first; of equals the first.
    #[expect(clippy::type_complexity, reason = "two lists of the same kind")]
    fn ranked(&self, columns: std::ops::Range<usize>) -> (Vec<(f32, usize)>, Vec<(f32, usize)>) {
        let (kept, pruned): (Vec<usize>, Vec<usize>) = columns.filter(|at| self.scale[*at] > 0.0).partition(|at| self.keep[*at]);
        let mut gains: Vec<_> = pruned.into_iter().map(|at| (self.gradient[at].powi(2) / self.scale[at], at)).collect();
        let mut costs: Vec<_> = kept.into_iter().map(|at| (self.weight[at].powi(2) * self.scale[at], at)).collect();
        gains.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        costs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        (gains, costs)
    }
}
