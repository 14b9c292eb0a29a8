//! By how much a layer's outputs are off, as its inputs see it: D = 2/n sum (y* - y) x^T.

use tch::{Device, Kind, Tensor};

use super::Hessian;
use super::matrix::panels;
use crate::error::{Error, Result};
use crate::finite::is_finite;
use crate::model::{ConvGeometry, Layer, Operation};
use crate::product::add_product;

/// Numbers that a convolution's unfolded input may take at once (64 MiB in fp32).
const UNFOLDED: i64 = 1 << 24;

/// The correlation of a layer's inputs x with what its outputs y = W x + b lack of those that they should be, y*: D [o, d] in fp32, d
/// flattened and n counted as in [`Hessian`].
///
/// Where a network is compressed layer by layer, y* are the outputs of the dense network: then W + D H^-1 makes up for the errors of the
/// layers before as well as a linear map of x can (the asymmetric calibration of GPTAQ, arXiv:2504.02692, there in another form).
#[derive(Debug)]
pub struct Correction {
    /// [o, d]
    sum: Tensor,
    kind: Operation,
    kernel: [i64; 2],
    samples: u64,
}

impl Correction {
    /// Zeros for `layer`.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn for_layer(layer: &Layer, device: Device) -> Result<Self> {
        Self::for_weight(layer.operation(), &layer.weight().size(), device)
    }

    /// Zeros for a layer of this kind with a weight of this shape: [o, d] or [o, c / groups, kh, kw].
    ///
    /// # Errors
    /// [`Error::Argument`] if the shape is not the kind's; [`Error::Torch`] if the memory is not there.
    pub fn for_weight(kind: Operation, shape: &[i64], device: Device) -> Result<Self> {
        let (o, d, kernel) = match (kind, shape) {
            (Operation::Linear, [o, d]) => (*o, *d, [1; 2]),
            (Operation::Conv2d(_), [o, c, kh, kw]) => (*o, c * kh * kw, [*kh, *kw]),
            _ => return Err(Error::Argument(format!("a weight {shape:?} is none of a {kind:?}"))),
        };
        Ok(Correction { sum: Tensor::f_zeros([o, d], (Kind::Float, device))?, kind, kernel, samples: 0 })
    }

    /// Adds what the outputs to `input` lack: [.., d] and [.., o] for a Linear, [b, c, h, w] and [b, o, h', w'] for a convolution.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shapes are not the layer's; [`Error::NotFinite`] if there is NaN or infinity in `lack`.
    pub fn add(&mut self, input: &Tensor, lack: &Tensor) -> Result<()> {
        let place = |tensor: &Tensor| tensor.f_detach()?.f_to_device(self.sum.device())?.f_to_kind(Kind::Float);
        let (input, lack) = (place(input)?, place(lack)?);
        if !is_finite(&lack)? {
            return Err(Error::NotFinite("what the layer's output lacks has NaN or infinite values in it".into()));
        }
        let (o, d) = self.sum.size2()?;
        match self.kind {
            Operation::Linear => {
                let (input, lack) = (input.f_reshape([-1, d])?, lack.f_reshape([-1, o])?);
                add_product(&self.sum, &lack.f_transpose(0, 1)?, &input)?;
            }
            Operation::Conv2d(geometry) => self.add_windows(&input, &lack, geometry)?,
        }
        self.samples += match input.size()[..] {
            [] | [_] | [_, _] => 1,
            [batch, ..] => batch.unsigned_abs(),
        };
        Ok(())
    }

    fn add_windows(&mut self, input: &Tensor, lack: &Tensor, geometry: ConvGeometry) -> Result<()> {
        let ConvGeometry { stride, padding, dilation, groups } = geometry;
        let (o, d) = self.sum.size2()?;
        let batch = input.size4()?.0;
        let lack = lack.f_flatten(2, -1)?;
        let item = d * groups * lack.size3()?.2;
        for items in panels(batch, UNFOLDED / item.max(1)) {
            let some = |tensor: &Tensor| tensor.f_narrow(0, items.start, items.end - items.start);
            let unfolded = some(input)?.f_im2col(self.kernel, dilation, padding, stride)?;
            for group in 0..groups {
                let windows = unfolded.f_narrow(1, group * d, d)?.f_permute([0, 2, 1])?.f_reshape([-1, d])?;
                let rows = some(&lack)?.f_narrow(1, group * (o / groups), o / groups)?;
                let rows = rows.f_permute([1, 0, 2])?.f_reshape([o / groups, -1])?;
                add_product(&self.sum.f_narrow(0, group * (o / groups), o / groups)?, &rows, &windows)?;
            }
        }
        Ok(())
    }

    /// Adds what another of the same layer has seen.
    ///
    /// # Errors
    /// [`Error::Torch`] if the other's shape is another.
    pub fn merge(&mut self, other: Correction) -> Result<()> {
        let _ = self.sum.f_add_(&other.sum.f_to_device(self.sum.device())?)?;
        self.samples += other.samples;
        Ok(())
    }

    /// D [o, d], fp32; zeros if nothing was added.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn matrix(&self) -> Result<Tensor> {
        Ok(self.sum.f_mul_scalar(2.0 / self.samples.max(1) as f64)?)
    }

    /// Bytes of one for a weight of this shape.
    pub fn bytes(shape: &[i64]) -> u64 {
        4 * shape.iter().product::<i64>().unsigned_abs()
    }

    /// Whether this and the Hessian have seen the same samples.
    pub fn fits(&self, hessian: &Hessian) -> bool {
        self.samples == hessian.samples()
    }
}
