//! The least-squares problem as tensors.

use squeeze_base::error::Result;
use squeeze_numerics::sum::{numbers, sum_kind};
use tch::{Kind, Tensor};

use super::super::factors::{JointFactors, Part};
use super::super::problem::Loss;

/// The problem: find W [o, d] on the mask such that tr((W - W0) H (W - W0)^T) is small. Columns are
/// in the order of the factors.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub factors: &'a JointFactors,
    pub part: &'a Part,
    /// W0 [o, d], fp32.
    pub original: Tensor,
    /// The kept weights [o, d], bool; `None` if all are kept.
    pub keep: Option<Tensor>,
    /// The reciprocals of the diagonal of the damped H, `[d]`; 0 where it is 0.
    pub conditioner: Tensor,
    /// 1 / [H^-1]_jj, `[d]`.
    pub scale: Tensor,
    /// The natural place of each column and the reverse; `None` for the natural order.
    order: Option<(Tensor, Tensor)>,
}

impl<'a> Problem<'a> {
    /// The problem of a weight [o, d] in natural order, with the single Hessian of the factors.
    pub(super) fn new(factors: &'a JointFactors, flat: &Tensor) -> Result<Self> {
        let part = &factors.parts[0];
        let device = flat.device();
        let upload = |numbers: &[f32]| -> Result<Tensor> { Ok(Tensor::f_from_slice(numbers)?.f_to_device(device)?) };
        let order = match &part.order {
            None => None,
            Some(order) => {
                let order: Vec<i64> = order.iter().map(|column| *column as i64).collect();
                let order = Tensor::f_from_slice(&order)?;
                let reverse = order.f_argsort(0, false)?;
                Some((order.f_to_device(device)?, reverse.f_to_device(device)?))
            }
        };
        let mut problem = Problem {
            factors,
            part,
            original: Tensor::new(),
            keep: None,
            conditioner: upload(&part.conditioner)?,
            scale: upload(&part.scale)?,
            order,
        };
        problem.set(flat)?;
        Ok(problem)
    }

    /// Sets W0, given in natural order.
    pub(super) fn set(&mut self, flat: &Tensor) -> Result<()> {
        self.original = self.sorted(flat)?.f_contiguous()?;
        Ok(())
    }

    /// The number of rows and of columns.
    pub(super) fn size(&self) -> Result<(i64, i64)> {
        Ok(self.original.size2()?)
    }

    /// Columns in the order of the factors.
    pub(super) fn sorted(&self, natural: &Tensor) -> Result<Tensor> {
        Ok(match &self.order {
            None => natural.shallow_clone(),
            Some((order, _)) => natural.f_index_select(1, order)?,
        })
    }

    /// Columns in natural order.
    pub(super) fn natural(&self, sorted: &Tensor) -> Result<Tensor> {
        Ok(match &self.order {
            None => sorted.shallow_clone(),
            Some((_, reverse)) => sorted.f_index_select(1, reverse)?,
        })
    }

    /// The loss of a weight [o, d].
    pub(super) fn loss(&self, weight: &Tensor) -> Result<Loss> {
        let _span = tracing::debug_span!("loss").entered();
        let change = weight.f_to_kind(Kind::Float)?.f_sub(&self.original)?;
        self.loss_of(&change, &self.part.product(&change)?)
    }

    /// The loss of a change D, given D and D H.
    pub(super) fn loss_of(&self, change: &Tensor, product: &Tensor) -> Result<Loss> {
        let damped = row_dots(change, product)?.f_sum(sum_kind(change.device()))?;
        let square = row_dots(change, change)?.f_sum(sum_kind(change.device()))?;
        let numbers = numbers(&Tensor::f_stack(&[damped, square], 0)?)?;
        Ok(Loss { damped: numbers[0], bare: (numbers[0] - self.part.added * numbers[1]).max(0.0) })
    }
}

/// The dot product of each row of `a` with that of `b`, summed in fp64 where the device has it:
/// `[o]`.
pub(super) fn row_dots(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_mul(b)?.f_sum_dim_intlist([1_i64].as_slice(), false, sum_kind(a.device()))?)
}
