//! Solutions of the joint problem, which compete for the stored weight.

use half::f16;
use squeeze_base::error::Result;
use squeeze_codebook::{Codebook, Effort, PaletteOptions};
use tch::{Kind, Tensor};

use super::super::options::JointOptions;
use super::super::problem::Loss;
use super::super::solution::LEAST_CHANGE;
use super::blocks::Blocks;
use super::polish::polish;
use super::problem::Problem;
use super::sweep::sweep;
use super::{bools, on_host};
use crate::matrix::to_vec;
use crate::palette::{Palettized, palettize, palettize_on_device, palettize_weighted};

/// A candidate for the stored weight, columns in the order of the problem.
#[derive(Debug)]
pub(super) struct Solution {
    /// [o, d], fp16.
    pub weight: Tensor,
    /// The palettes without their indices, and the indices [o, d], u8.
    pub palettized: Option<(Palettized, Tensor)>,
    pub loss: Loss,
}

impl Solution {
    /// The weights rounded to fp16, or each at the nearest entry of the best palettes for the
    /// weights without their Hessian.
    pub(super) fn plain(name: &str, problem: &Problem<'_>, weight: &Tensor, options: &JointOptions) -> Result<Self> {
        let half = weight.f_to_kind(Kind::Half)?;
        match &options.palettize {
            None => Ok(Solution { loss: problem.loss(&half)?, weight: half, palettized: None }),
            Some(options) => {
                let (palettized, indices) = palettes(name, problem, &half, None, options)?;
                let blocks = Blocks::new(&palettized.codebook, half.device())?;
                Self::of(problem, &blocks, palettized, indices)
            }
        }
    }

    /// Palettes and indices solved together, starting from these weights.
    pub(super) fn joint(
        name: &str,
        problem: &Problem<'_>,
        weight: &Tensor,
        (palette, effort): (&PaletteOptions, &Effort),
    ) -> Result<Self> {
        let half = weight.f_to_kind(Kind::Half)?;
        let importance = importance(problem)?;
        let (mut first, indices) = palettes(name, problem, &half, Some(&importance), palette)?;
        drop((importance, half));
        let blocks = Blocks::new(&first.codebook, weight.device())?;
        if effort.sweep {
            sweep(problem, weight, &blocks, &indices)?;
        }
        for turn in 1..=effort.turns {
            let changed = if effort.polish { polish(problem, &blocks, &indices)? } else { 0 };
            if turn == effort.turns || (changed as f64) < LEAST_CHANGE * weight.numel() as f64 {
                break;
            }
        }
        first.codebook = Codebook { palettes: blocks.palettes(), ..first.codebook };
        Self::of(problem, &blocks, first, indices)
    }

    fn of(problem: &Problem<'_>, blocks: &Blocks, palettized: Palettized, indices: Tensor) -> Result<Self> {
        let weight = blocks.decode(&indices, problem.keep.as_ref())?;
        let loss = problem.loss(&weight)?;
        Ok(Solution { weight: weight.f_to_kind(Kind::Half)?, palettized: Some((palettized, indices)), loss })
    }
}

/// Palettes for fp16 weights [o, d], and their indices on the weights' device. `importance` has a
/// number for each column.
fn palettes(
    name: &str,
    problem: &Problem<'_>,
    half: &Tensor,
    importance: Option<&[f64]>,
    options: &PaletteOptions,
) -> Result<(Palettized, Tensor)> {
    let _span = tracing::debug_span!("palettes").entered();
    if let Some(made) = palettize_on_device(name, half, problem.keep.as_ref(), importance, options)? {
        return Ok(made);
    }
    let (rows, columns) = problem.size()?;
    let shape = [rows as usize, columns as usize];
    let values: Vec<f16> = Vec::try_from(&on_host(half)?)?;
    let keep = problem.keep.as_ref().map(bools).transpose()?;
    let mut palettized = match importance {
        None => palettize(name, &values, &shape, keep.as_deref(), options)?,
        Some(columns) => palettize_weighted(name, &values, &shape, keep.as_deref(), &columns.repeat(rows as usize), options)?,
    };
    let indices = Tensor::f_from_slice(&std::mem::take(&mut palettized.indices))?.f_reshape([rows, columns])?;
    Ok((palettized, indices.f_to_device(half.device())?))
}

/// R_jj^2 = 1 / U_jj^2 of each column: the cost of an error in a weight when the columns after it
/// compensate. 0 in dead columns.
fn importance(problem: &Problem<'_>) -> Result<Vec<f64>> {
    let factor = &problem.factors.factors[0];
    let diagonal = to_vec(&Tensor::f_cat(&factor.triangle.diagonals()?, 0)?)?;
    let dead = &problem.part.dead;
    Ok(diagonal.iter().zip(dead).map(|(r, dead)| if *dead { 0.0 } else { f64::from(*r).powi(2) }).collect())
}
