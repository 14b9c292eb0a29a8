//! Least-squares weights on a fixed mask.

use squeeze_base::error::Result;
use squeeze_numerics::sum::sum_kind;
use tch::{Kind, Tensor};

use super::problem::{Problem, row_dots};
use crate::kernels::{Descent, Kernels};
use crate::matrix::copy;

/// The state of the masked least-squares solve: weights, gradient and mask, [o, d] each. The
/// objective is tr((W - W0) H (W - W0)^T).
#[derive(Debug)]
pub(super) struct MaskedLeastSquares<'a> {
    pub problem: &'a Problem<'a>,
    /// W.
    pub weight: Tensor,
    /// G = (W - W0) H in all columns. It is updated together with W.
    pub gradient: Tensor,
    /// 1 where a weight is kept, else 0, fp32.
    pub mask: Tensor,
}

impl<'a> MaskedLeastSquares<'a> {
    /// The state at `weight`, which must be zero where `keep` is false. It takes one product with
    /// H.
    pub(super) fn new(problem: &'a Problem<'a>, weight: &Tensor, keep: &Tensor) -> Result<Self> {
        let weight = copy(weight)?;
        let gradient = problem.part.product(&weight.f_sub(&problem.original)?)?;
        Ok(MaskedLeastSquares { problem, weight, gradient, mask: keep.f_to_kind(Kind::Float)?.f_contiguous()? })
    }

    /// A copy in new memory.
    pub(super) fn copy(&self) -> Result<Self> {
        let MaskedLeastSquares { problem, weight, gradient, mask } = self;
        Ok(MaskedLeastSquares { problem, weight: copy(weight)?, gradient: copy(gradient)?, mask: copy(mask)? })
    }

    /// W - W0.
    pub(super) fn change(&self) -> Result<Tensor> {
        Ok(self.weight.f_sub(&self.problem.original)?)
    }

    /// The objective of each row, `[o]` in fp64.
    pub(super) fn losses(&self) -> Result<Tensor> {
        row_dots(&self.change()?, &self.gradient)
    }

    /// Adds `change` to the weights. It takes one product with H.
    pub(super) fn add(&mut self, change: &Tensor) -> Result<()> {
        let _ = self.weight.f_add_(change)?;
        let _ = self.gradient.f_add_(&self.problem.part.product(change)?)?;
        Ok(())
    }

    /// Lowers the objective over the kept weights by preconditioned conjugate gradients, as the
    /// solver for CPUs does, but for all rows together: the descent ends after `steps` steps, or
    /// after a step that lowers the sum of all rows by less than the share `least_gain`.
    pub(super) fn descend(&mut self, steps: usize, least_gain: f64) -> Result<()> {
        let _span = tracing::debug_span!("conjugate gradients").entered();
        let (mut direction, mut before) = self.downhill()?;
        let _ = direction.f_neg_()?;
        let kernels = Kernels::of(direction.device());
        let mut left = self.losses()?.f_sum(sum_kind(self.weight.device()))?.f_double_value(&[])?;
        for step in 1..=steps {
            let product = self.problem.part.product(&direction)?;
            let lower = match &kernels {
                Some(kernels) => self.step_by_kernel(kernels, &direction, &product, &before)?,
                None => self.step(&mut direction, &product, &mut before)?,
            };
            drop(product);
            if step == steps {
                break;
            }
            let lower = lower.f_sum(sum_kind(before.device()))?.f_double_value(&[])?;
            left -= lower;
            if lower < left * least_gain {
                break;
            }
        }
        Ok(())
    }

    /// A step along `direction`, whose product with H is `product`. `before` is the dot product of
    /// the gradient with the conditioned gradient for each row; both are those of the next step
    /// afterwards. Returns by how much the step has lowered the objective of each row.
    fn step(&mut self, direction: &mut Tensor, product: &Tensor, before: &mut Tensor) -> Result<Tensor> {
        let length = share(before, &row_dots(direction, product)?)?;
        let of_rows = length.f_to_kind(Kind::Float)?.f_unsqueeze(1)?;
        let _ = self.weight.f_addcmul_(&of_rows, direction)?;
        let _ = self.gradient.f_addcmul_(&of_rows, product)?;
        let lower = length.f_mul(before)?;
        let (next, now) = self.downhill()?;
        let keep_on = share(&now, before)?.f_to_kind(Kind::Float)?.f_unsqueeze(1)?;
        *direction = direction.f_mul_(&keep_on)?.f_sub_(&next)?;
        *before = now;
        Ok(lower)
    }

    /// [`step`](Self::step) by a kernel.
    fn step_by_kernel(&self, kernels: &Kernels, direction: &Tensor, product: &Tensor, before: &Tensor) -> Result<Tensor> {
        let lower = before.f_empty_like()?;
        let state = Descent { weight: &self.weight, gradient: &self.gradient, direction, before, lower: &lower };
        kernels.descend(&state, product, &self.mask, &self.problem.conditioner)?;
        Ok(lower)
    }

    /// The gradient of the kept weights divided by the diagonal of H, and its dot product with the
    /// gradient for each row.
    fn downhill(&self) -> Result<(Tensor, Tensor)> {
        let conditioned = self.gradient.f_mul(&self.mask)?.f_mul_(&self.problem.conditioner)?;
        let dots = row_dots(&self.gradient, &conditioned)?;
        Ok((conditioned, dots))
    }
}

/// A quotient in fp64; 0 where it is not finite or the divisor is not positive, which happens when
/// a row is already solved.
fn share(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let share = a.f_div(b)?;
    let is_good = b.f_gt(0.0)?.f_logical_and(&share.f_isfinite()?)?;
    Ok(share.f_where_scalarother(&is_good, 0.0)?)
}
