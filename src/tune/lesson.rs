//! What is learned: calls of the dense UNet, its predictions, and how much each error counts.

use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use crate::calibration::Sample;
use crate::plan::{HELD_OUT, MOST_HELD_OUT as MOST};

/// A call of the dense UNet, with its prediction.
#[derive(Debug)]
pub struct Lesson {
    /// The call.
    pub call: Sample,
    /// The dense prediction: [rows, c, h, w].
    pub target: Tensor,
    /// How much the squared error of the prediction counts.
    pub weight: f64,
    /// The squared error to expect at the start, by which the call is drawn more or less often.
    pub expected: f64,
}

/// Prompts that are learned from, and prompts that are held out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Those that are learned from.
    pub learned: Vec<String>,
    /// Those that are held out, each with its place among all.
    pub held_out: Vec<(usize, String)>,
}

/// Holds out every tenth prompt. Of those of many prompts, 20 are kept.
///
/// # Errors
/// [`Error::Argument`] if there are too few prompts to hold one out.
pub fn split(prompts: &[String]) -> Result<Split> {
    if prompts.len() < HELD_OUT {
        return Err(Error::Argument(format!(
            "`tune` has {} prompts; it needs at least {HELD_OUT}, of which it holds one out, and some hundreds are better",
            prompts.len()
        )));
    }
    let all = prompts.iter().cloned().enumerate();
    let (held_out, learned): (Vec<_>, Vec<_>) = all.partition(|(place, _)| place % HELD_OUT == HELD_OUT - 1);
    // Spread over all of them.
    let (count, most) = (held_out.len(), held_out.len().min(MOST));
    let chosen: Vec<_> = (0..most).map(|index| held_out[(2 * index + 1) * count / (2 * most)].clone()).collect();
    Ok(Split { learned: learned.into_iter().map(|(_, prompt)| prompt).collect(), held_out: chosen })
}

/// The prediction that moves the latents, of each call: [calls, c, h, w] of [calls x rows, c, h,
/// w], in fp32. With guidance and two rows it is u + g (c - u); all rows side by side otherwise.
pub(super) fn effective(prediction: &Tensor, rows: i64, guidance: f64) -> Result<Tensor> {
    let prediction = prediction.f_to_kind(Kind::Float)?.f_flatten(1, -1)?;
    let calls = prediction.size2()?.0 / rows;
    let each = prediction.f_view([calls, rows, -1])?;
    if rows != 2 {
        return Ok(each.f_flatten(1, -1)?);
    }
    let (negative, positive) = (each.f_select(1, 0)?, each.f_select(1, 1)?);
    Ok(positive.f_mul_scalar(guidance)?.f_add(&negative.f_mul_scalar(1.0 - guidance)?)?)
}

/// The squared error of each call, fp32 `[calls]`.
pub(super) fn squared_errors(prediction: &Tensor, target: &Tensor, rows: i64, guidance: f64) -> Result<Tensor> {
    let error = effective(prediction, rows, guidance)?.f_sub(&effective(target, rows, guidance)?)?;
    Ok(error.f_mul(&error)?.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)?)
}
