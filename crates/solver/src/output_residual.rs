//! The residual of a layer's outputs, correlated with its inputs: D = 2/n sum (y* - y) x^T.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::product::add_product;
use tch::{Device, Kind, Tensor};

use super::Hessian;
use super::geometry::{InputGeometry, Inputs, Windows};
use super::hessian::for_sum;
use super::matrix::panels;

/// The largest part of a convolution's unfolded input in memory at once, in elements (64 MiB in
/// fp32).
const UNFOLDED: i64 = 1 << 24;

/// The correlation of a layer's inputs x with the residual of its outputs y = W x + b against
/// target outputs y*: D [o, d] in fp32, d flattened and n counted as in [`Hessian`].
///
/// Where a network is compressed layer by layer, y* are the outputs of the dense network. Then W +
/// D H^-1 is the weight that compensates best for the errors of the layers before. (This is the
/// asymmetric calibration of GPTAQ, arXiv:2504.02692, in another form.)
#[derive(Debug)]
pub struct OutputResidual {
    /// The sum of (y* - y) x^T: [o, d].
    sum: Tensor,
    inputs: Inputs,
    samples: u64,
}

impl OutputResidual {
    /// Zeros for a layer with a weight of this shape: [o, d] or [o, c / groups, kh, kw].
    ///
    /// # Errors
    /// [`Error::Argument`] if the shape does not belong to the geometry; [`Error::Torch`] if the
    /// memory is not there.
    pub fn for_weight(geometry: InputGeometry, shape: &[i64], device: Device) -> Result<Self> {
        let inputs = geometry.inputs(shape)?;
        let sum = Tensor::f_zeros([inputs.outputs(), inputs.dimension()], (Kind::Float, device))?;
        Ok(OutputResidual { sum, inputs, samples: 0 })
    }

    /// Adds the residual y* - y of the outputs to `input`: [.., d] and [.., o] for a Linear, [b, c,
    /// h, w] and [b, o, h', w'] for a convolution.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shapes are not the layer's; [`Error::NotFinite`] if there is NaN or
    /// infinity in `residual`. On a GPU, which nothing waits for here, the joint solver finds them.
    pub fn add(&mut self, input: &Tensor, residual: &Tensor) -> Result<()> {
        let place = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_detach()?.f_to_device(self.sum.device())?) };
        let (input, residual) = (place(input)?, place(residual)?);
        let (input, residual) = match input.f_kind()? == residual.f_kind()? {
            true => (for_sum(&input)?, for_sum(&residual)?),
            false => (input.f_to_kind(Kind::Float)?, residual.f_to_kind(Kind::Float)?),
        };
        if residual.device() == Device::Cpu && !is_finite(&residual)? {
            return Err(Error::NotFinite("the residual of the layer's outputs has NaN or infinite values in it".into()));
        }
        let (o, d) = self.sum.size2()?;
        match self.inputs {
            Inputs::Vectors { .. } => {
                let (input, residual) = (input.f_reshape([-1, d])?, residual.f_reshape([-1, o])?);
                add_product(&self.sum, &residual.f_transpose(0, 1)?, &input)?;
            }
            Inputs::Windows { kernel, windows, .. } => self.add_windows(&input, &residual, kernel, windows)?,
        }
        self.samples += match input.size()[..] {
            [] | [_] | [_, _] => 1,
            [batch, ..] => batch.unsigned_abs(),
        };
        Ok(())
    }

    fn add_windows(&mut self, input: &Tensor, residual: &Tensor, kernel: [i64; 2], windows: Windows) -> Result<()> {
        let Windows { stride, padding, dilation, groups } = windows;
        let (o, d) = self.sum.size2()?;
        let batch = input.size4()?.0;
        let residual = residual.f_flatten(2, -1)?;
        let item = d * groups * residual.size3()?.2;
        for items in panels(batch, UNFOLDED / item.max(1)) {
            let some = |tensor: &Tensor| tensor.f_narrow(0, items.start, items.end - items.start);
            let unfolded = some(input)?.f_im2col(kernel, dilation, padding, stride)?;
            for group in 0..groups {
                let windows = unfolded.f_narrow(1, group * d, d)?.f_permute([0, 2, 1])?.f_reshape([-1, d])?;
                let rows = some(&residual)?.f_narrow(1, group * (o / groups), o / groups)?;
                let rows = rows.f_permute([1, 0, 2])?.f_reshape([o / groups, -1])?;
                add_product(&self.sum.f_narrow(0, group * (o / groups), o / groups)?, &rows, &windows)?;
            }
        }
        Ok(())
    }

    /// Adds the sum of another part of the samples of this layer.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shapes differ.
    pub fn merge(&mut self, other: OutputResidual) -> Result<()> {
        let _ = self.sum.f_add_(&other.sum.f_to_device(self.sum.device())?)?;
        self.samples += other.samples;
        Ok(())
    }

    /// The residual on `device`, with the same memory where it is there already.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        Ok(OutputResidual { sum: self.sum.f_to_device(device)?, ..*self })
    }

    /// D [o, d], fp32; zeros if nothing was added.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn matrix(&self) -> Result<Tensor> {
        Ok(self.sum.f_mul_scalar(2.0 / self.samples.max(1) as f64)?)
    }

    /// Bytes that the sum takes for a weight of this shape.
    #[must_use]
    pub fn bytes(shape: &[i64]) -> u64 {
        4 * shape.iter().product::<i64>().unsigned_abs()
    }

    /// Whether the residual and the Hessian have equal numbers of samples.
    #[must_use]
    pub fn fits(&self, hessian: &Hessian) -> bool {
        self.samples == hessian.samples()
    }
}
