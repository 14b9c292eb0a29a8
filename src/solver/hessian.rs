//! What the inputs of a layer looked like: H = 2/n sum x x^T.

use tch::{Device, Kind, Tensor};

use super::matrix::{block, copy, is_finite, panels};
use crate::error::{Error, Result};
use crate::model::{ConvGeometry, Layer, LayerKind};

/// Columns of H that one matrix product fills.
const PANEL: i64 = 256;

/// Numbers that a convolution's unfolded input may take at once (512 MiB in fp32).
const UNFOLDED: i64 = 1 << 27;

/// The Hessian of a layer's squared output error with respect to one row of its weight: H = 2/n sum x x^T in fp32.
///
/// x are the vectors that a row of the flattened weight [o, d] is multiplied with: the last dimension of a Linear's input, the
/// unfolded windows of a convolution's, channel by channel as `torch.nn.Unfold` orders them. A convolution of several groups has
/// one H for each. n counts samples as coremltools does (`OBSCompressionAlgorithm._compute_hessian`): an input [n, ..] of a
/// batch, but an input of two dimensions is one sample. H is built from its upper triangle, so it is exactly symmetric.
///
/// For a given device and libtorch, one and two threads give the same bytes. (libtorch's matrix products of small odd sizes round
/// otherwise on three and more.)
#[derive(Debug)]
pub struct Hessian {
    /// [groups, d, d]: sum x x^T without the factor; what lies below the diagonal has no meaning.
    sum: Tensor,
    windows: Option<Windows>,
    vectors: u64,
    samples: u64,
}

/// How a convolution's input becomes vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Windows {
    channels: i64,
    kernel: [i64; 2],
    geometry: ConvGeometry,
}

impl Hessian {
    /// Zeros [d, d] for a Linear of `dimension` inputs.
    ///
    /// # Errors
    /// [`Error::Argument`] if the dimension is below one; [`Error::Torch`] if the memory is not there.
    pub fn new(dimension: i64, device: Device) -> Result<Self> {
        Self::zeros(1, dimension, None, device)
    }

    /// Zeros for the inputs of `layer`: [d, d], or [groups, d, d] with d = c / groups * kh * kw.
    ///
    /// # Errors
    /// As [`Hessian::for_weight`].
    pub fn for_layer(layer: &Layer, device: Device) -> Result<Self> {
        Self::for_weight(layer.kind(), &layer.weight().size(), device)
    }

    /// Zeros for the inputs of a layer of this kind with a weight of this shape: [o, d] or [o, c / groups, kh, kw].
    ///
    /// # Errors
    /// [`Error::Argument`] if the shape is not the kind's; [`Error::Torch`] if the memory is not there.
    pub fn for_weight(kind: LayerKind, shape: &[i64], device: Device) -> Result<Self> {
        match (kind, shape) {
            (LayerKind::Linear, [_, d]) => Self::new(*d, device),
            (LayerKind::Conv2d(geometry), [o, c, kh, kw]) => {
                let groups = geometry.groups;
                let positive = [groups, *c, *kh, *kw, geometry.stride[0], geometry.stride[1]].iter().all(|size| *size >= 1);
                if !positive || o % groups != 0 {
                    return Err(Error::Argument(format!("a weight {shape:?} is none of a convolution with {geometry:?}")));
                }
                let windows = Windows { channels: c * groups, kernel: [*kh, *kw], geometry };
                Self::zeros(groups, c * kh * kw, Some(windows), device)
            }
            _ => Err(Error::Argument(format!("a weight {shape:?} is none of a {kind:?}"))),
        }
    }

    fn zeros(groups: i64, dimension: i64, windows: Option<Windows>, device: Device) -> Result<Self> {
        if dimension < 1 {
            return Err(Error::Argument(format!("a Hessian of {dimension} inputs")));
        }
        let sum = Tensor::f_zeros([groups, dimension, dimension], (Kind::Float, device))?;
        Ok(Hessian { sum, windows, vectors: 0, samples: 0 })
    }

    /// Adds the vectors of one input: [.., d] for a Linear, [b, c, h, w] for a convolution; any float dtype, any device.
    ///
    /// # Errors
    /// [`Error::Argument`] if the shape is not the layer's, [`Error::NotFinite`] if there is NaN or infinity in it. The Hessian
    /// is unchanged then.
    pub fn add(&mut self, input: &Tensor) -> Result<()> {
        let size = input.size();
        let fits = match self.windows {
            None => size.last() == Some(&self.dimension()),
            Some(windows) => size.len() == 4 && size.get(1) == Some(&windows.channels),
        };
        if !fits {
            let expected = match self.windows {
                None => format!("[.., {}]", self.dimension()),
                Some(windows) => format!("[b, {}, h, w]", windows.channels),
            };
            return Err(Error::Argument(format!("an input {size:?} where {expected} is expected")));
        }
        if input.numel() == 0 {
            return Ok(());
        }
        let input = input.f_detach()?.f_to_device(self.device())?.f_to_kind(Kind::Float)?;
        if !is_finite(&input)? {
            return Err(Error::NotFinite("the layer's input has NaN or infinite values in it".into()));
        }
        let vectors = match self.windows {
            None => self.add_vectors(&input)?,
            Some(windows) => self.add_windows(&input, windows)?,
        };
        self.vectors += vectors.unsigned_abs();
        self.samples += match size[..] {
            [] | [_] | [_, _] => 1,
            [batch, ..] => batch.unsigned_abs(),
        };
        Ok(())
    }

    fn add_vectors(&mut self, input: &Tensor) -> Result<i64> {
        let d = self.dimension();
        let vectors = input.numel() as i64 / d;
        self.accumulate(0, &input.f_reshape([vectors, d])?.f_transpose(0, 1)?)?;
        Ok(vectors)
    }

    fn add_windows(&mut self, input: &Tensor, windows: Windows) -> Result<i64> {
        let Windows { kernel, geometry: ConvGeometry { stride, padding, dilation, groups }, .. } = windows;
        let (batch, d) = (input.size4()?.0, self.dimension());
        // Unfolding copies the input kh * kw times, less where the windows step over pixels.
        let item = (input.numel() as i64 / batch).saturating_mul(kernel[0] * kernel[1]) / (stride[0] * stride[1]);
        let mut vectors = 0;
        for items in panels(batch, UNFOLDED / item.max(1)) {
            let count = items.end - items.start;
            let unfolded = input.f_narrow(0, items.start, count)?.f_im2col(kernel, dilation, padding, stride)?;
            let places = unfolded.size3()?.2;
            for group in 0..groups {
                let columns = unfolded.f_narrow(1, group * d, d)?.f_permute([1, 0, 2])?.f_reshape([d, count * places])?;
                self.accumulate(group, &columns)?;
            }
            vectors += count * places;
        }
        Ok(vectors)
    }

    /// Adds X X^T for X [d, vectors], the upper triangle only.
    fn accumulate(&mut self, group: i64, columns: &Tensor) -> Result<()> {
        let (sum, d) = (self.sum.f_select(0, group)?, self.dimension());
        for panel in panels(d, PANEL) {
            let left = columns.f_narrow(0, panel.start, panel.end - panel.start)?;
            let right = columns.f_narrow(0, panel.start, d - panel.start)?;
            let _ = block(&sum, panel.clone(), panel.start..d)?.f_addmm_(&left, &right.f_transpose(0, 1)?)?;
        }
        Ok(())
    }

    /// Adds what another Hessian of the same layer has seen.
    ///
    /// # Errors
    /// [`Error::Argument`] if the other belongs to a layer of another kind or shape.
    pub fn merge(&mut self, other: Hessian) -> Result<()> {
        if other.sum.size() != self.sum.size() || other.windows != self.windows {
            let (new, old) = (other.sum.size(), self.sum.size());
            return Err(Error::Argument(format!("a Hessian {new:?} cannot be added to one {old:?} of another layer")));
        }
        let _ = self.sum.f_add_(&other.sum.f_to_device(self.device())?)?;
        self.vectors += other.vectors;
        self.samples += other.samples;
        Ok(())
    }

    /// How many vectors were summed (for each group).
    pub fn vectors(&self) -> u64 {
        self.vectors
    }

    /// How many samples they came from, as coremltools counts.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// d, the length of the vectors.
    pub fn dimension(&self) -> i64 {
        self.sum.size().last().copied().unwrap_or_default()
    }

    /// How many independent parts the layer has; 1 but for grouped convolutions.
    pub fn groups(&self) -> i64 {
        self.sum.size().first().copied().unwrap_or_default()
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.sum.device()
    }

    /// H [groups, d, d], fp32; zeros if nothing was added. A new tensor, as large as the Hessian itself.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn matrix(&self) -> Result<Tensor> {
        let matrix = self.sum.f_mul_scalar(self.scale())?;
        for group in 0..self.groups() {
            let matrix = matrix.f_select(0, group)?;
            for panel in panels(self.dimension(), PANEL) {
                let mut below = block(&matrix, panel.end..self.dimension(), panel.clone())?;
                below.f_copy_(&block(&matrix, panel.clone(), panel.end..self.dimension())?.f_transpose(0, 1)?)?;
                let mut corner = block(&matrix, panel.clone(), panel)?;
                let upper = copy(&corner)?;
                corner.f_copy_(&upper.f_triu(0)?.f_add(&upper.f_triu(1)?.f_transpose(0, 1)?)?)?;
            }
        }
        Ok(matrix)
    }

    /// H [d, d] of one group as a new tensor; what lies below the diagonal has no meaning.
    pub(super) fn upper(&self, group: i64) -> Result<Tensor> {
        Ok(self.sum.f_select(0, group)?.f_mul_scalar(self.scale())?)
    }

    /// sum x x^T [d, d] of one group as a view; what lies below the diagonal has no meaning.
    pub(super) fn upper_sum(&self, group: i64) -> Result<Tensor> {
        Ok(self.sum.f_select(0, group)?)
    }

    fn scale(&self) -> f64 {
        2.0 / self.samples.max(1) as f64
    }
}
