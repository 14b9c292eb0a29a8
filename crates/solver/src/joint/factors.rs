//! The damped Hessian of a layer and its factors, as the joint solver needs them.

use squeeze_base::error::Result;
use squeeze_numerics::product::{add_product, product};
use tch::{Device, Kind, Tensor};

use super::super::matrix::to_vec;
use super::super::triangle::Triangle;
use super::super::{Factor, Hessian, Note};
use super::shrinkage::shrinkage;

/// The order in which the columns are solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The order in which columns are stored. Masks are chosen block by block, and blocks of
    /// neighbouring columns give better masks.
    Natural,
    /// Columns with the largest inputs first ("activation order"), so that the other columns
    /// compensate for their errors. It is used for layers that are not pruned.
    Activation,
}

/// The damped Hessians of a layer's groups and their factors, for all layers that share the input.
#[derive(Debug)]
pub struct JointFactors {
    pub(super) parts: Vec<Part>,
    /// The factor of each part.
    pub(super) factors: Vec<Factor>,
    /// The requested dampening and order of columns.
    asked: (f64, Order),
    notes: Vec<Note>,
}

/// The damped Hessian of one group, with numbers derived from it.
#[derive(Debug)]
pub(super) struct Part {
    /// The damped H.
    pub h: Triangle,
    /// The whole damped H [d, d], on a GPU, where one large product is faster than several.
    whole: Option<Tensor>,
    /// The diagonal of the damped H.
    pub diagonal: Vec<f32>,
    /// The reciprocals of the diagonal; 0 where the diagonal is 0.
    pub conditioner: Vec<f32>,
    /// The dampening that was added to each entry of the diagonal.
    pub added: f64,
    /// 1 / [H^-1]_jj: the cost of a change of a weight if all other weights of its row compensate.
    pub scale: Vec<f32>,
    /// The columns whose inputs were always zero.
    pub dead: Vec<bool>,
    /// The natural index of each column; `None` for the natural order.
    pub order: Option<Vec<usize>>,
}

impl JointFactors {
    /// Factors the Hessian of each group, with at least this dampening (a share of the diagonal's
    /// mean). If there are few vectors for the effective rank of the inputs, the dampening is that
    /// of a better estimate of their covariance (oracle approximating shrinkage).
    ///
    /// For each group this takes the memory of a [d, d] matrix: one triangle for H, one for the
    /// factor.
    ///
    /// # Errors
    /// As [`Factor::new`].
    pub fn new(hessian: &Hessian, dampening: f64, order: Order) -> Result<Self> {
        let _span = tracing::debug_span!("joint factors").entered();
        let mut joint = JointFactors { parts: Vec::new(), factors: Vec::new(), asked: (dampening, order), notes: Vec::new() };
        let (mut shrunk, mut used) = (0.0_f64, 0.0_f64);
        for group in 0..hessian.groups() {
            Factor::check(hessian, dampening)?;
            let mut h = hessian.triangle(group)?;
            let order = match order {
                Order::Natural => None,
                Order::Activation => {
                    let order = by_activation(&h)?;
                    h = reordered(&h, &order)?;
                    Some(order)
                }
            };
            let least = dampening.max(shrinkage(&h, hessian.vectors())?);
            let factor = Factor::of(&|| h.scaled(1.0), least)?;
            (shrunk, used) = (shrunk.max(least), used.max(factor.dampening));
            for diagonal in h.diagonals()? {
                let _ = diagonal.shallow_clone().f_add_scalar_(factor.added)?;
            }
            let diagonal = to_vec(&Tensor::f_cat(&h.diagonals()?, 0)?)?;
            let dead: Vec<bool> = Vec::try_from(&factor.dead.f_to_device(Device::Cpu)?)?;
            let scale = factor.inverse_diagonal()?.into_iter().map(f32::recip).collect();
            let conditioner = diagonal.iter().map(|h| if *h > 0.0 { h.recip() } else { 0.0 }).collect();
            let whole = if has_whole(h.device(), h.dimension()) { Some(h.symmetric()?) } else { None };
            joint.parts.push(Part { h, whole, diagonal, conditioner, added: factor.added, scale, dead, order });
            joint.factors.push(factor);
        }
        let dimension = hessian.dimension().unsigned_abs();
        if shrunk > 2.0 * dampening {
            joint.notes.push(Note::Shrunk { vectors: hessian.vectors(), dimension, asked: dampening, used: shrunk });
        }
        if used > shrunk {
            joint.notes.push(Note::MoreDampening { asked: shrunk, used });
        }
        Ok(joint)
    }

    /// The factors on `device`, with the same memory where they are there already.
    ///
    /// # Errors
    /// [`Error::Torch`](squeeze_base::Error::Torch) if the memory is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        Ok(JointFactors {
            parts: self.parts.iter().map(|part| part.to_device(device)).collect::<Result<_>>()?,
            factors: self.factors.iter().map(|factor| factor.to_device(device)).collect::<Result<_>>()?,
            asked: self.asked,
            notes: self.notes.clone(),
        })
    }

    /// Whether these are the factors for this dampening and order.
    #[must_use]
    pub fn fit(&self, dampening: f64, order: Order) -> bool {
        self.asked == (dampening, order)
    }

    /// Notes for the user about the factors.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// The largest dampening of all groups.
    pub(super) fn dampening(&self) -> f64 {
        self.factors.iter().map(|factor| factor.dampening).fold(0.0, f64::max)
    }
}

/// Whether the whole of a [d, d] matrix is kept beside its triangle.
#[must_use]
pub fn has_whole(device: Device, dimension: i64) -> bool {
    /// Larger products are fast in pieces.
    const LARGEST: i64 = 8192;
    device != Device::Cpu && dimension <= LARGEST
}

impl Part {
    fn to_device(&self, device: Device) -> Result<Self> {
        Ok(Part {
            h: self.h.to_device(device)?,
            whole: self.whole.as_ref().map(|whole| whole.f_to_device(device)).transpose()?,
            diagonal: self.diagonal.clone(),
            conditioner: self.conditioner.clone(),
            added: self.added,
            scale: self.scale.clone(),
            dead: self.dead.clone(),
            order: self.order.clone(),
        })
    }

    /// X H for X [rows, d], row-major.
    pub(super) fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
        to_vec(&self.product(&Tensor::f_from_slice(x)?.f_reshape([-1, self.h.dimension()])?)?)
    }

    /// X H for X [rows, d], on the device of X.
    pub(super) fn product(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(whole) = &self.whole {
            return Ok(product(&x.f_to_device(whole.device())?, whole)?.f_to_device(x.device())?);
        }
        let d = self.h.dimension();
        let (asked, x) = (x.device(), x.f_to_device(self.h.device())?);
        let result = x.f_zeros_like()?;
        for index in 0..self.h.count() {
            let rows = self.h.rows(index);
            let block = x.f_narrow(1, rows.start, rows.end - rows.start)?;
            let right = result.f_narrow(1, rows.start, d - rows.start)?;
            add_product(&right, &block, self.h.panel(index))?;
            if rows.end < d {
                let after = x.f_narrow(1, rows.end, d - rows.end)?;
                let left = result.f_narrow(1, rows.start, rows.end - rows.start)?;
                add_product(&left, &after, &self.h.part(index, rows.end..d)?.f_transpose(0, 1)?)?;
            }
        }
        Ok(result.f_to_device(asked)?)
    }
}

/// The columns in descending order of their inputs' magnitudes; equal ones in their natural order.
fn by_activation(h: &Triangle) -> Result<Vec<usize>> {
    let diagonal = to_vec(&Tensor::f_cat(&h.diagonals()?, 0)?)?;
    let mut order: Vec<usize> = (0..diagonal.len()).collect();
    order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    Ok(order)
}

/// H with its columns and rows in another order.
fn reordered(h: &Triangle, order: &[usize]) -> Result<Triangle> {
    let matrix = h.symmetric()?;
    let order: Vec<i64> = order.iter().map(|column| *column as i64).collect();
    let order = Tensor::f_from_slice(&order)?.f_to_kind(Kind::Int64)?.f_to_device(h.device())?;
    let reordered = Triangle::zeros(h.dimension(), 1, h.device())?;
    for index in 0..reordered.count() {
        let rows = reordered.rows(index);
        let columns = order.f_narrow(0, rows.start, h.dimension() - rows.start)?;
        let some = matrix.f_index_select(0, &order.f_narrow(0, rows.start, rows.end - rows.start)?)?;
        reordered.panel(index).shallow_clone().f_copy_(&some.f_index_select(1, &columns)?)?;
    }
    Ok(reordered)
}
