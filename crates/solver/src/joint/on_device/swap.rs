//! Swaps pruned and kept weights: a better mask of the same size.

use squeeze_base::error::Result;
use tch::{Kind, Tensor};

use super::super::swap::COLUMNS_A_SWAP;
use super::least_squares::MaskedLeastSquares;

/// The settings of [`swap`]: those of the solver for CPUs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Swaps {
    /// The largest number of rounds.
    pub rounds: usize,
    /// The number of steps of the descent after each round.
    pub steps: usize,
    /// The least share by which such a step must lower the objective for another step to follow.
    pub least_gain: f64,
    /// m of n:m, within whose groups weights are swapped.
    pub group: Option<i64>,
}

/// Swaps as the [solver for CPUs](super::super::swap::swap) does, in all rows at once.
pub(super) fn swap(solve: &mut MaskedLeastSquares<'_>, settings: Swaps) -> Result<()> {
    let _span = tracing::debug_span!("swap").entered();
    let (rows, d) = solve.weight.size2()?;
    let most = (d / COLUMNS_A_SWAP as i64).max(1);
    let mut losses = solve.losses()?;
    let mut limits = Tensor::f_full([rows], most, (Kind::Int64, solve.weight.device()))?;
    for _ in 0..settings.rounds {
        let pairs = match settings.group {
            None => pairs(solve, most)?,
            Some(m) => group_pairs(solve, m)?,
        };
        let places = Tensor::f_arange(pairs.profit.size2()?.1, (Kind::Int64, limits.device()))?;
        let is_chosen = pairs.profit.f_gt(0.0)?.f_logical_and(&places.f_lt_tensor(&limits.f_unsqueeze(1)?)?)?;
        let counts = is_chosen.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Int64)?;
        if counts.f_max()?.f_int64_value(&[])? == 0 {
            break;
        }
        let mut tried = solve.copy()?;
        let chosen = is_chosen.f_to_kind(Kind::Float)?;
        // Pairs that are not chosen add zero, so that each place changes at most once.
        let mut revived = solve.gradient.f_mul(&solve.problem.conditioner)?.f_neg_()?.f_gather(1, &pairs.revived, false)?;
        let mut gone = solve.weight.f_gather(1, &pairs.pruned, false)?.f_neg_()?;
        let mut change = solve.weight.f_zeros_like()?;
        let _ = change.f_scatter_add_(1, &pairs.revived, &revived.f_mul_(&chosen)?)?;
        let _ = change.f_scatter_add_(1, &pairs.pruned, &gone.f_mul_(&chosen)?)?;
        let _ = tried.mask.f_scatter_add_(1, &pairs.revived, &chosen)?;
        let _ = tried.mask.f_scatter_add_(1, &pairs.pruned, &chosen.f_neg()?)?;
        tried.add(&change)?;
        drop(change);
        // Sets newly pruned weights to exact zero, because w + (-w) may leave a rounding error.
        let _ = tried.weight.f_masked_fill_(&tried.mask.f_eq(0.0)?, 0.0)?;
        tried.descend(settings.steps, settings.least_gain)?;
        let new = tried.losses()?;
        let is_better = counts.f_gt(0)?.f_logical_and(&new.f_lt_tensor(&losses)?)?;
        let rows = is_better.f_unsqueeze(1)?;
        solve.weight = tried.weight.f_where_self(&rows, &solve.weight)?;
        solve.gradient = tried.gradient.f_where_self(&rows, &solve.gradient)?;
        solve.mask = tried.mask.f_where_self(&rows, &solve.mask)?;
        losses = new.f_where_self(&is_better, &losses)?;
        // A row that did not improve had too many swaps at once, or no profitable one.
        limits = limits.f_where_self(&is_better, &counts.f_div_scalar_mode(4, "floor")?)?;
    }
    Ok(())
}

/// Pairs of a pruned column to be revived and a kept one to be pruned, [o, pairs] each, in
/// descending order of their profit.
struct Pairs {
    profit: Tensor,
    revived: Tensor,
    pruned: Tensor,
}

/// What reviving each pruned column gains, -infinity elsewhere, and what pruning each kept column
/// costs, infinity elsewhere: [o, d].
fn gains_and_costs(solve: &MaskedLeastSquares<'_>) -> Result<(Tensor, Tensor)> {
    let scale = &solve.problem.scale;
    let is_kept = solve.mask.f_gt(0.0)?;
    let is_alive = scale.f_gt(0.0)?;
    let gains = solve.gradient.f_square()?.f_div_(scale)?;
    let costs = solve.weight.f_square()?.f_mul_(scale)?;
    let can_return = is_kept.f_logical_not()?.f_logical_and(&is_alive)?;
    let can_go = is_kept.f_logical_and(&is_alive)?;
    Ok((gains.f_where_scalarother(&can_return, f64::NEG_INFINITY)?, costs.f_where_scalarother(&can_go, f64::INFINITY)?))
}

/// The `count` largest gains of a row with its `count` smallest costs.
fn pairs(solve: &MaskedLeastSquares<'_>, count: i64) -> Result<Pairs> {
    let (gains, costs) = gains_and_costs(solve)?;
    let first = |(values, places): (Tensor, Tensor)| -> Result<(Tensor, Tensor)> {
        Ok((values.f_narrow(1, 0, count)?.f_contiguous()?, places.f_narrow(1, 0, count)?.f_contiguous()?))
    };
    // Stable, so that equal numbers are in the order of their columns.
    let (gains, revived) = first(gains.f_sort_stable(true, 1, true)?)?;
    let (costs, pruned) = first(costs.f_sort_stable(true, 1, false)?)?;
    Ok(Pairs { profit: gains.f_sub(&costs)?, revived, pruned })
}

/// The best pair of each group of m columns.
fn group_pairs(solve: &MaskedLeastSquares<'_>, m: i64) -> Result<Pairs> {
    let (rows, d) = solve.weight.size2()?;
    let groups = d / m;
    let (gains, costs) = gains_and_costs(solve)?;
    let grouped = |values: &Tensor| -> Result<Tensor> { Ok(values.f_narrow(1, 0, groups * m)?.f_reshape([rows, groups, m])?) };
    let first = |values: &Tensor, descending| -> Result<(Tensor, Tensor)> {
        let (values, places) = grouped(values)?.f_sort_stable(true, 2, descending)?;
        Ok((values.f_select(2, 0)?, places.f_select(2, 0)?))
    };
    let starts = Tensor::f_arange(groups, (Kind::Int64, gains.device()))?.f_mul_scalar(m)?;
    let ((gains, revived), (costs, pruned)) = (first(&gains, true)?, first(&costs, false)?);
    let (profit, order) = gains.f_sub(&costs)?.f_sort_stable(true, 1, true)?;
    let columns = |places: &Tensor| -> Result<Tensor> { Ok(places.f_add(&starts)?.f_gather(1, &order, false)?) };
    Ok(Pairs { profit, revived: columns(&revived)?, pruned: columns(&pruned)? })
}
