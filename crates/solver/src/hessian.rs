//! The second moments of a layer's inputs: H = 2/n sum x x^T.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::product::sums_halves;
use tch::{Device, Kind, Tensor};

use super::correlations::Correlations;
use super::geometry::{InputGeometry, Inputs, Windows};
use super::matrix::panels;
use super::triangle::{Triangle, panel_height};

/// The largest part of a convolution's unfolded input in memory at once, in elements (64 MiB in
/// fp32).
const UNFOLDED: i64 = 1 << 24;

/// The Hessian of a layer's squared output error with respect to one row of its weight: H = 2/n sum
/// x x^T in fp32.
///
/// x are the vectors that a row of the flattened weight [o, d] is multiplied with: the last
/// dimension of a Linear's input, the unfolded windows of a convolution's, channel by channel as
/// `torch.nn.Unfold` orders them. A convolution of several groups has one H for each group. n
/// counts samples as coremltools does (`OBSCompressionAlgorithm._compute_hessian`): the items of a
/// batch [n, ..], but an input of two dimensions is one sample. Only the upper triangle is computed
/// and kept; for a convolution of stride 1, the correlations from which it is assembled.
///
/// On one kind of processor the result is the same to the last bit on any number of threads.
#[derive(Debug)]
pub struct Hessian {
    /// sum x x^T without the factor.
    sum: Sum,
    unfolding: Option<Unfolding>,
    vectors: u64,
    samples: u64,
}

/// The form in which the sum is kept.
#[derive(Debug)]
enum Sum {
    /// One for each group; there is at least one.
    Triangles(Vec<Triangle>),
    Correlations(Correlations),
}

/// How a convolution's input becomes vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unfolding {
    /// The number of input channels in all groups together.
    channels: i64,
    kernel: [i64; 2],
    windows: Windows,
}

/// A tensor in the dtype in which it enters a sum of products: fp32, unless the device takes it as
/// it is.
pub(super) fn for_sum(input: &Tensor) -> Result<Tensor> {
    let kind = input.f_kind()?;
    Ok(if sums_halves(input.device(), kind) { input.shallow_clone() } else { input.f_to_kind(Kind::Float)? })
}

impl Hessian {
    /// Zeros [d, d] for a Linear of `dimension` inputs.
    ///
    /// # Errors
    /// [`Error::Argument`] if the dimension is below one; [`Error::Torch`] if the memory is not
    /// there.
    pub fn new(dimension: i64, device: Device) -> Result<Self> {
        Self::zeros(1, dimension, None, device)
    }

    /// Zeros for the inputs of a layer with a weight of this shape, [o, d] or [o, c / groups, kh,
    /// kw]: H is [d, d], or [groups, d, d] with d = c / groups * kh * kw.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape does not belong to the geometry; [`Error::Torch`] if the
    /// memory is not there.
    pub fn for_weight(geometry: InputGeometry, shape: &[i64], device: Device) -> Result<Self> {
        match geometry.inputs(shape)? {
            Inputs::Vectors { dimension, .. } => Self::new(dimension, device),
            Inputs::Windows { outputs, channels, kernel, windows } => {
                let groups = windows.groups;
                let sizes = [groups, channels, kernel[0], kernel[1], windows.stride[0], windows.stride[1]];
                if sizes.iter().any(|size| *size < 1) || outputs % groups != 0 {
                    return Err(Error::shape("the weight", shape, format!("that of a convolution with {windows:?}")));
                }
                let unfolding = Unfolding { channels: channels * groups, kernel, windows };
                Self::zeros(groups, channels * kernel[0] * kernel[1], Some(unfolding), device)
            }
        }
    }

    fn zeros(groups: i64, dimension: i64, unfolding: Option<Unfolding>, device: Device) -> Result<Self> {
        if dimension < 1 {
            return Err(Error::range("the number of inputs of a Hessian", dimension, "at least 1"));
        }
        let sum = match unfolding {
            Some(Unfolding { channels, kernel, windows }) if windows.correlate() => {
                Sum::Correlations(Correlations::zeros(channels, kernel, windows.padding, device)?)
            }
            Some(_) | None => Sum::Triangles((0..groups).map(|_| Triangle::zeros(dimension, 1, device)).collect::<Result<_>>()?),
        };
        Ok(Hessian { sum, unfolding, vectors: 0, samples: 0 })
    }

    /// Bytes of the Hessian of a layer with a weight of this shape while inputs are added.
    ///
    /// # Panics
    /// If the shape does not belong to the geometry.
    #[must_use]
    pub fn bytes(geometry: InputGeometry, shape: &[i64]) -> u64 {
        match geometry.inputs_of_layer(shape) {
            Inputs::Vectors { dimension, .. } => Triangle::bytes(dimension, 1),
            Inputs::Windows { channels, kernel, windows, .. } if windows.correlate() => {
                Correlations::bytes(channels, kernel, windows.padding)
            }
            Inputs::Windows { channels, kernel, windows, .. } => {
                windows.groups.unsigned_abs() * Triangle::bytes(channels * kernel[0] * kernel[1], 1)
            }
        }
    }

    /// Bytes of one [d, d] factor of such a layer, which [`prune`](super::prune) needs besides the
    /// Hessian, and of the inverses of the blocks on its diagonal, which are needed to compute
    /// the factor.
    ///
    /// # Panics
    /// If the shape does not belong to the geometry.
    #[must_use]
    pub fn factor_bytes(geometry: InputGeometry, shape: &[i64]) -> u64 {
        let inputs = geometry.inputs_of_layer(shape);
        let unit = match inputs {
            Inputs::Windows { kernel, windows, .. } if windows.correlate() => kernel[0] * kernel[1],
            Inputs::Windows { .. } | Inputs::Vectors { .. } => 1,
        };
        let dimension = inputs.dimension();
        Triangle::bytes(dimension, unit) + 4 * (dimension * panel_height(dimension, unit)).unsigned_abs()
    }

    /// Multiply-adds of adding an input of `places` vectors: pixels [height, width] of a
    /// convolution's input, else [1, vectors].
    ///
    /// # Panics
    /// If the shape does not belong to the geometry.
    #[must_use]
    pub fn work(geometry: InputGeometry, shape: &[i64], places: [i64; 2]) -> f64 {
        let [height, width] = places;
        match geometry.inputs_of_layer(shape) {
            Inputs::Vectors { .. } => (height * width) as f64 * Self::bytes(geometry, shape) as f64 / 4.0,
            Inputs::Windows { channels, kernel, windows, .. } if windows.correlate() => {
                Correlations::work(channels, kernel, windows.padding, height, width)
            }
            Inputs::Windows { channels, kernel, windows: Windows { stride, groups, .. }, .. } => {
                let vectors = (height / stride[0]) * (width / stride[1]);
                (groups * vectors) as f64 * Triangle::bytes(channels * kernel[0] * kernel[1], 1) as f64 / 4.0
            }
        }
    }

    /// Adds the vectors of one input: [.., d] for a Linear, [b, c, h, w] for a convolution; any
    /// float dtype, any device.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape is not the layer's, [`Error::NotFinite`] if there is NaN or
    /// infinity in it. The Hessian is unchanged then. On a GPU, which nothing waits for here, NaN
    /// and infinity are found when the Hessian is factored.
    pub fn add(&mut self, input: &Tensor) -> Result<()> {
        let _span = tracing::debug_span!("hessian").entered();
        let size = input.size();
        let fits = match self.unfolding {
            None => size.last() == Some(&self.dimension()),
            Some(unfolding) => size.len() == 4 && size[1] == unfolding.channels,
        };
        if !fits {
            let expected = match self.unfolding {
                None => format!("[.., {}]", self.dimension()),
                Some(unfolding) => format!("[b, {}, h, w]", unfolding.channels),
            };
            return Err(Error::shape("the input", size, expected));
        }
        if input.numel() == 0 {
            return Ok(());
        }
        let input = for_sum(&input.f_detach()?.f_to_device(self.device())?)?;
        if input.device() == Device::Cpu && !is_finite(&input)? {
            return Err(Error::NotFinite("the layer's input has NaN or infinite values in it".into()));
        }
        let vectors = match self.unfolding {
            None => self.add_vectors(&input)?,
            Some(unfolding) => self.add_windows(&input, unfolding)?,
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
        let Sum::Triangles(groups) = &self.sum else {
            unreachable!("only the sum of a convolution, which has windows, is kept as correlations")
        };
        for triangle in groups {
            triangle.add_products(&input.f_reshape([vectors, d])?)?;
        }
        Ok(vectors)
    }

    fn add_windows(&mut self, input: &Tensor, unfolding: Unfolding) -> Result<i64> {
        let Unfolding { kernel, windows: Windows { stride, padding, dilation, .. }, .. } = unfolding;
        let (batch, _, height, width) = input.size4()?;
        let groups = match &self.sum {
            Sum::Triangles(groups) => groups,
            Sum::Correlations(correlations) => {
                let places = |size, axis: usize| size + 2 * padding[axis] - kernel[axis] + 1;
                let (down, across) = (places(height, 0), places(width, 1));
                if down < 1 || across < 1 {
                    return Err(Error::shape("the input", input.size(), format!("at least the kernel's {kernel:?}")));
                }
                correlations.add(input)?;
                return Ok(batch * down * across);
            }
        };
        // Unfolding makes kh * kw copies of the input, fewer for larger strides.
        let item = (input.numel() as i64 / batch).saturating_mul(kernel[0] * kernel[1]) / (stride[0] * stride[1]);
        let mut vectors = 0;
        for items in panels(batch, UNFOLDED / item.max(1)) {
            let count = items.end - items.start;
            let unfolded = input.f_narrow(0, items.start, count)?.f_im2col(kernel, dilation, padding, stride)?;
            let places = unfolded.size3()?.2;
            let mut first = 0;
            for triangle in groups {
                let d = triangle.dimension();
                let windows = unfolded.f_narrow(1, first, d)?.f_permute([0, 2, 1])?.f_reshape([count * places, d])?;
                triangle.add_products(&windows)?;
                first += d;
            }
            vectors += count * places;
        }
        Ok(vectors)
    }

    /// Some of the vectors that [`add`](Self::add) would sum, at most `most` of them: [n, groups d]
    /// in fp32. Those of a convolution come from the middle of the first item.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shape is not the layer's.
    pub fn some_vectors(&self, input: &Tensor, most: i64) -> Result<Tensor> {
        let input = input.f_detach()?.f_to_device(self.device())?;
        let vectors = match self.unfolding {
            None => input.f_reshape([-1, self.dimension()])?,
            Some(Unfolding { kernel, windows: Windows { stride, padding, dilation, .. }, .. }) => {
                let side = (most as f64).sqrt() as i64;
                let (_, _, height, width) = input.size4()?;
                let middle = |size: i64, axis: usize| {
                    let length = ((side - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1).min(size);
                    ((size - length) / 2, length)
                };
                let ((top, down), (left, across)) = (middle(height, 0), middle(width, 1));
                let patch = input.f_narrow(0, 0, 1)?.f_narrow(2, top, down)?.f_narrow(3, left, across)?.f_to_kind(Kind::Float)?;
                // An input that is smaller than the window has no window inside, and needs its
                // padding.
                let inside = |axis: usize, size: i64| (kernel[axis] - 1) * dilation[axis] < size;
                let padding = if inside(0, down) && inside(1, across) { [0, 0] } else { padding };
                patch.f_im2col(kernel, dilation, padding, stride)?.f_squeeze_dim(0)?.f_transpose(0, 1)?
            }
        };
        let count = vectors.size2()?.0;
        let step = (count as u64).div_ceil(most.max(1) as u64).max(1) as i64;
        Ok(vectors.f_slice(0, 0, count, step)?.f_to_kind(Kind::Float)?.f_contiguous()?)
    }

    /// Adds the vectors of another Hessian of the same layer.
    ///
    /// # Errors
    /// [`Error::Shape`] if `other` belongs to a layer of another kind or shape.
    pub fn merge(&mut self, other: Hessian) -> Result<()> {
        let shape = |hessian: &Hessian| [hessian.groups(), hessian.dimension(), hessian.dimension()];
        if shape(self) != shape(&other) || self.unfolding != other.unfolding {
            return Err(Error::shape("the Hessian to add", shape(&other), format!("{:?} of the same layer", shape(self))));
        }
        match (&self.sum, &other.sum) {
            (Sum::Triangles(groups), Sum::Triangles(others)) => {
                groups.iter().zip(others).try_for_each(|(group, other)| group.add(other))?;
            }
            (Sum::Correlations(sum), Sum::Correlations(other)) => sum.merge(other)?,
            (Sum::Triangles(_), Sum::Correlations(_)) | (Sum::Correlations(_), Sum::Triangles(_)) => {
                unreachable!("the unfoldings, which were compared above, decide the form")
            }
        }
        self.vectors += other.vectors;
        self.samples += other.samples;
        Ok(())
    }

    /// The number of vectors added, for each group.
    #[must_use]
    pub fn vectors(&self) -> u64 {
        self.vectors
    }

    /// The number of samples added, as coremltools counts them.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// d, the length of the vectors.
    #[must_use]
    pub fn dimension(&self) -> i64 {
        match &self.sum {
            Sum::Triangles(groups) => groups[0].dimension(),
            Sum::Correlations(correlations) => correlations.dimension(),
        }
    }

    /// The number of groups of a convolution; 1 for other layers.
    #[must_use]
    pub fn groups(&self) -> i64 {
        match &self.sum {
            Sum::Triangles(groups) => groups.len() as i64,
            Sum::Correlations(_) => 1,
        }
    }

    /// The device of the Hessian.
    #[must_use]
    pub fn device(&self) -> Device {
        match &self.sum {
            Sum::Triangles(groups) => groups[0].device(),
            Sum::Correlations(correlations) => correlations.device(),
        }
    }

    /// The tensors that the sum consists of, in a fixed order.
    pub(super) fn sums_mut(&mut self) -> Vec<&mut Tensor> {
        match &mut self.sum {
            Sum::Triangles(groups) => groups.iter_mut().flat_map(Triangle::panels_mut).collect(),
            Sum::Correlations(correlations) => correlations.sums_mut().collect(),
        }
    }

    /// The Hessian on `device`. Where it is there already, the result shares its memory, so that
    /// two threads can read it.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let sum = match &self.sum {
            Sum::Triangles(groups) => Sum::Triangles(groups.iter().map(|group| group.to_device(device)).collect::<Result<_>>()?),
            Sum::Correlations(correlations) => Sum::Correlations(correlations.to_device(device)?),
        };
        Ok(Hessian { sum, ..*self })
    }

    /// H [groups, d, d], fp32, exactly symmetric; zeros if nothing was added. A new tensor, twice
    /// as large as the Hessian itself.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn matrix(&self) -> Result<Tensor> {
        let groups: Vec<Tensor> = (0..self.groups()).map(|group| self.triangle(group)?.symmetric()).collect::<Result<_>>()?;
        Ok(Tensor::f_stack(&groups, 0)?)
    }

    /// H of one group, in new memory.
    pub(super) fn triangle(&self, group: i64) -> Result<Triangle> {
        match &self.sum {
            Sum::Triangles(groups) => groups[group as usize].scaled(self.scale()),
            Sum::Correlations(correlations) => correlations.triangle(self.scale()),
        }
    }

    /// Calls `use_it` with a triangle and a factor whose product is H of one group. The triangle is
    /// the sum without the factor 2 / n where this avoids a copy.
    pub(super) fn with_triangle<T>(&self, group: i64, use_it: impl FnOnce(&Triangle, f64) -> Result<T>) -> Result<T> {
        match &self.sum {
            Sum::Triangles(groups) => use_it(&groups[group as usize], self.scale()),
            Sum::Correlations(correlations) => use_it(&correlations.triangle(self.scale())?, 1.0),
        }
    }

    fn scale(&self) -> f64 {
        2.0 / self.samples.max(1) as f64
    }
}
