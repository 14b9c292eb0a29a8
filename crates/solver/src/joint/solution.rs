//! Solutions of the joint problem, which compete for the stored weight.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_codebook::{Codebook, Effort};

use super::entries::{palette_gradient, refit_palettes};
use super::natural::Natural;
use super::options::{JointOptions, along_outputs};
use super::output_polish::{self, polish_outputs};
use super::polish::polish;
use super::problem::{Loss, Problem};
use super::sorted_codebook::SortedCodebook;
use super::sweep::sweep;
use crate::OutputMetric;
use crate::palette::{Palettized, STARTS, palettize, palettize_from};

/// Rounds of palette refit and polish go on while at least this share of the weights gets other
/// entries.
pub(super) const LEAST_CHANGE: f64 = 0.003;

/// A candidate for the stored weight, columns in the order of the problem.
#[derive(Debug)]
pub(super) struct Solution {
    pub weight: Vec<f16>,
    pub palettized: Option<Palettized>,
    pub loss: Loss,
}

impl Solution {
    /// The weights rounded to fp16, or each at the nearest entry of the best palettes for the
    /// weights without their Hessian.
    pub(super) fn plain(name: &str, problem: &Problem<'_>, weight: &[f32], options: &JointOptions) -> Result<Self> {
        let mut half = halves(weight);
        let keep = problem.data.keep.as_deref();
        let Some(palette) = &options.palettize else { return Self::of(problem, half, None) };
        if along_outputs(palette) {
            let palettized = palettize(name, &half, &[problem.data.rows, problem.data.columns], keep, palette)?;
            return Self::of(problem, palettized.decode(keep)?, Some(palettized));
        }
        // Groups of input channels are neighbours in the weight's own shape and order alone.
        let natural = Natural::new(problem.factors, problem.data.rows, problem.data.columns);
        natural.restore(&mut half);
        let keep = keep.map(|keep| {
            let mut keep = keep.to_vec();
            natural.restore(&mut keep);
            keep
        });
        let mut palettized = palettize(name, &half, &problem.data.shape, keep.as_deref(), palette)?;
        let mut weight = palettized.decode(keep.as_deref())?;
        natural.sort(&mut weight);
        natural.sort(&mut palettized.indices);
        Self::of(problem, weight, Some(palettized))
    }

    /// Palettes and indices solved together, starting from these weights; at last by the metric of
    /// the outputs, if there is one.
    pub(super) fn joint(
        name: &str,
        problem: &Problem<'_>,
        weight: &[f32],
        metric: Option<&OutputMetric>,
        options: &JointOptions,
    ) -> Result<Self> {
        let Some(palette) = &options.palettize else { return Self::plain(name, problem, weight, options) };
        let half = halves(weight);
        let shape = [problem.data.rows, problem.data.columns];
        let importance = importance(problem)?;
        let starts = if options.trial { 1 } else { STARTS };
        let mut first = palettize_from(name, &half, &shape, problem.data.keep.as_deref(), &importance, palette, starts)?;
        drop((importance, half));
        let mut sorted = SortedCodebook::new(&first.codebook, std::mem::take(&mut first.indices));
        if options.effort.sweep {
            sweep(problem, weight, &mut sorted)?;
        }
        let Effort { palette_steps, turns, .. } = options.effort;
        for turn in 1..=turns {
            if palette_steps > 0 {
                let gradient = palette_gradient(problem, &sorted)?;
                refit_palettes(problem, &mut sorted, &gradient, palette_steps)?;
            }
            let changed = if options.effort.polish { polish(problem, &mut sorted)? } else { 0 };
            if turn == turns || (changed as f64) < LEAST_CHANGE * weight.len() as f64 {
                break;
            }
        }
        if let Some(metric) = metric {
            for _ in 0..output_polish::TURNS {
                let changed = polish_outputs(problem, &mut sorted, metric)?;
                if (changed as f64) < LEAST_CHANGE * weight.len() as f64 {
                    break;
                }
            }
        }
        first.codebook = Codebook { palettes: sorted.palettes(), ..first.codebook };
        first.indices = sorted.indices;
        let weight = first.decode(problem.data.keep.as_deref())?;
        Self::of(problem, weight, Some(first))
    }

    /// What the solution is judged by: its loss by the metric of the outputs, or by H alone if
    /// there is none.
    pub(super) fn cost(&self, problem: &Problem<'_>, metric: Option<&OutputMetric>) -> Result<f64> {
        metric.map_or(Ok(self.loss.bare), |metric| output_polish::loss(problem, metric, |at| self.weight[at].to_f32()))
    }

    fn of(problem: &Problem<'_>, weight: Vec<f16>, palettized: Option<Palettized>) -> Result<Self> {
        let loss = problem.loss(|at| weight[at].to_f32())?;
        Ok(Solution { weight, palettized, loss })
    }
}

/// R_jj^2 = 1 / U_jj^2 of each weight: the cost of an error in it when the columns after it
/// compensate. 0 in dead columns.
fn importance(problem: &Problem<'_>) -> Result<Vec<f64>> {
    let mut importance = vec![0.0; problem.data.rows * problem.data.columns];
    for (part, rows) in problem.chunks() {
        let diagonal = problem.factors.factors[part].diagonal()?;
        let dead = &problem.part(part).dead;
        let costs = diagonal.iter().zip(dead).map(|(r, dead)| if *dead { 0.0 } else { f64::from(*r).powi(2) });
        let costs: Vec<f64> = costs.collect();
        importance[problem.data.span(&rows)].par_chunks_mut(problem.data.columns).for_each(|row| row.copy_from_slice(&costs));
    }
    Ok(importance)
}

fn halves(weight: &[f32]) -> Vec<f16> {
    let mut half = vec![f16::ZERO; weight.len()];
    half.par_chunks_mut(1 << 16).zip(weight.par_chunks(1 << 16)).for_each(|(half, weight)| half.convert_from_f32_slice(weight));
    half
}
