//! How much errors in a layer's output channels matter to the network's output, together.

use std::ops::Range;
use std::sync::Arc;

use squeeze_base::error::{Error, Result};
use squeeze_numerics::product::{add_product, product};
use tch::{Device, Kind, Tensor};

use super::matrix::to_vec;

/// Neighbouring output channels whose errors are weighed against each other. A layer with o
/// channels takes o rows of so many numbers in place of o².
const BLOCK: usize = 128;

/// The share of the mean diagonal in the metric's diagonal: few gradients are noisy, and an error
/// that has no effect by them may have one elsewhere.
const SHRINKAGE: f32 = 0.1;

/// The sum of g g^T over gradients g of the network's output by a layer's outputs, in blocks of
/// neighbouring channels.
///
/// It is the second factor of the Kronecker-factored Hessian of Martens and Grosse (K-FAC,
/// arXiv:1503.05671), whose first factor is the [`Hessian`](crate::Hessian) of the inputs. Tseng,
/// Sun and De Sa (arXiv:2505.22988) round weights by both.
#[derive(Debug)]
pub struct OutputGradients {
    blocks: Vec<Tensor>,
    outputs: i64,
}

impl OutputGradients {
    /// Zeros for a layer with so many output channels.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn new(outputs: i64, device: Device) -> Result<Self> {
        let sizes = (0..outputs).step_by(BLOCK).map(|start| (outputs - start).min(BLOCK as i64));
        let blocks = sizes.map(|size| Ok(Tensor::f_zeros([size, size], (Kind::Float, device))?)).collect::<Result<_>>()?;
        Ok(OutputGradients { blocks, outputs })
    }

    /// Bytes of a layer with so many output channels.
    #[must_use]
    pub fn bytes(outputs: i64) -> u64 {
        let sizes = (0..outputs).step_by(BLOCK).map(|start| (outputs - start).min(BLOCK as i64));
        sizes.map(|size| 4 * size.unsigned_abs().pow(2)).sum()
    }

    /// Adds the gradients of an output: [.., o] of a Linear, [b, o, h, w] of a convolution.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shape is not that of the layer's output.
    pub fn add(&mut self, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.f_detach()?.f_to_kind(Kind::Float)?;
        let rows = match gradient.size()[..] {
            [_, outputs, _, _] => gradient.f_permute([1, 0, 2, 3])?.f_reshape([outputs, -1])?,
            _ => gradient.f_reshape([-1, self.outputs])?.f_transpose(0, 1)?,
        };
        let rows = rows.f_contiguous()?;
        let mut start = 0;
        for block in &self.blocks {
            let size = block.size()[0];
            let some = rows.f_narrow(0, start, size)?;
            add_product(block, &some, &some.f_transpose(0, 1)?)?;
            start += size;
        }
        Ok(())
    }

    /// The metric of these gradients; `None` if all are zero.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a gradient was NaN or infinite.
    pub fn metric(&self) -> Result<Option<OutputMetric>> {
        let mut values = Vec::new();
        for block in &self.blocks {
            values.extend(to_vec(block)?);
        }
        let outputs = self.outputs.unsigned_abs() as usize;
        let mut metric = OutputMetric { values: values.into(), outputs };
        let diagonal = |metric: &OutputMetric| -> f64 {
            (0..metric.blocks())
                .map(|block| {
                    let size = metric.rows(block).len();
                    metric.block(block).iter().step_by(size + 1).map(|value| f64::from(*value)).sum::<f64>()
                })
                .sum()
        };
        let mean = diagonal(&metric) / outputs as f64;
        if !mean.is_finite() {
            return Err(Error::NotFinite("gradients of the network's output are NaN or infinite".into()));
        }
        if mean <= 0.0 {
            return Ok(None);
        }
        let mut values = Vec::with_capacity(metric.values.len());
        for block in 0..metric.blocks() {
            let size = metric.rows(block).len();
            values.extend(metric.block(block).iter().enumerate().map(|(at, value)| {
                let scaled = (f64::from(*value) / mean) as f32 * (1.0 - SHRINKAGE);
                if at % (size + 1) == 0 { scaled + SHRINKAGE } else { scaled }
            }));
        }
        metric.values = values.into();
        Ok(Some(metric))
    }
}

/// The block-diagonal, positive definite matrix M [o, o] by which an error e in a layer's outputs
/// costs e^T M e. Its mean diagonal is 1. Clones share their memory.
#[derive(Debug, Clone)]
pub struct OutputMetric {
    /// The blocks, one after the other, row-major.
    values: Arc<[f32]>,
    outputs: usize,
}

impl OutputMetric {
    /// o.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The number of blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// The channels of a block.
    pub(crate) fn rows(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.outputs.min((block + 1) * BLOCK)
    }

    /// The channels of a block that is not the last.
    pub(crate) const BLOCK: usize = BLOCK;

    /// A block, row-major.
    pub(crate) fn block(&self, block: usize) -> &[f32] {
        let size = self.rows(block).len();
        let start = block * BLOCK * BLOCK;
        &self.values[start..start + size * size]
    }

    /// M X for some rows X [r, n] that begin and end where blocks do.
    pub(crate) fn times(&self, rows: &Range<usize>, x: &Tensor) -> Result<Tensor> {
        let blocks = rows.start / BLOCK..rows.end.div_ceil(BLOCK);
        let products = blocks.map(|block| {
            let (of_block, size) = (self.rows(block), self.rows(block).len() as i64);
            let metric = Tensor::f_from_slice(self.block(block))?.f_reshape([size, size])?.f_to_device(x.device())?;
            product(&metric, &x.f_narrow(0, (of_block.start - rows.start) as i64, size)?)
        });
        Ok(Tensor::f_cat(&products.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metric_is_the_shrunk_second_moment_of_the_gradients() -> Result<()> {
        // 134 channels: a block of 128 and one of 6.
        let gradients = Tensor::f_from_slice(&(0..5 * 134).map(|n| ((n * 37 % 23) as f32 - 11.0) / 7.0).collect::<Vec<_>>())?;
        let gradients = gradients.f_reshape([1, 5, 134])?;
        let mut sums = OutputGradients::new(134, Device::Cpu)?;
        sums.add(&gradients)?;
        // A convolution's output, channels second.
        sums.add(&gradients.f_reshape([5, 134, 1, 1])?)?;
        let metric = sums.metric()?.expect("gradients that are not zero");
        let flat = gradients.f_reshape([5, 134])?.f_to_kind(Kind::Double)?;
        let whole = flat.f_transpose(0, 1)?.f_mm(&flat)?;
        let whole = whole.f_div_scalar(f64::try_from(&whole.f_diag(0)?.f_mean(Kind::Double)?)?)?;
        assert_eq!((metric.outputs(), metric.blocks(), metric.rows(1)), (134, 2, 128..134));
        for block in 0..2 {
            let rows = metric.rows(block);
            for (at, value) in metric.block(block).iter().enumerate() {
                let (r, c) = (at / rows.len(), at % rows.len());
                let expected = 0.9 * whole.f_double_value(&[(rows.start + r) as i64, (rows.start + c) as i64])?
                    + if r == c { 0.1 } else { 0.0 };
                assert!((f64::from(*value) - expected).abs() < 1e-5, "{value} {expected}");
            }
        }
        // Products are those of the whole block-diagonal matrix.
        let x = Tensor::f_eye(134, (Kind::Float, Device::Cpu))?;
        let product = metric.times(&(0..134), &x)?;
        assert!((product.f_double_value(&[3, 5])? - f64::from(metric.block(0)[3 * 128 + 5])).abs() < 1e-6);
        assert_eq!(product.f_double_value(&[3, 130])?, 0.0);
        Ok(())
    }

    #[test]
    fn without_gradients_there_is_no_metric() -> Result<()> {
        let mut sums = OutputGradients::new(3, Device::Cpu)?;
        assert!(sums.metric()?.is_none());
        sums.add(&Tensor::f_from_slice(&[f32::NAN, 0.0, 1.0])?)?;
        assert!(matches!(sums.metric(), Err(Error::NotFinite(_))));
        Ok(())
    }
}
