//! A palettized weight whose palette entries are trained.

use half::f16;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::Scales;
use squeeze_container::{CompressedWeight, Values};
use tch::{Device, Kind, Tensor};

/// The fixed parts of a palettized weight on a device: for each element the place of its value in
/// the palettes, whether it is kept, and the scale of its output channel.
#[derive(Debug)]
pub(super) struct Table {
    /// The weight's shape.
    shape: Vec<i64>,
    /// Output channels that share an index.
    vector: i64,
    /// u8 [o / vector, inner], inner being the number of elements of an output channel: the index
    /// of each vector in its palette; 0 where the vector is pruned.
    indices: Tensor,
    /// i64 [o / vector, 1] or [1, inner]: the place of the first value of the vector's palette.
    first: Tensor,
    /// Bool [o, inner]; absent if all elements are kept.
    mask: Option<Tensor>,
    /// fp32 [o, 1]; absent if there are none.
    scales: Option<Tensor>,
    /// The number of values in all palettes.
    values: i64,
}

impl Table {
    /// The fixed parts of `weight` on `device`, and its palettes as one row of values; `None` for a
    /// weight without palettes, or with scales for blocks: its palette is not fitted to it.
    ///
    /// # Errors
    /// If the parts of the weight disagree, or libtorch refuses, usually for want of memory.
    pub(super) fn of(weight: &CompressedWeight, device: Device) -> Result<Option<(Self, Vec<f16>)>> {
        let Values::Palettized { codebook, indices } = &weight.values else { return Ok(None) };
        if codebook.scales.as_ref().is_some_and(|scales| scales.block.is_some()) {
            return Ok(None);
        }
        let (vector, outputs) = (codebook.vector_length, weight.shape[0] as usize);
        let inner = weight.numel() / outputs;
        let vectors = outputs / vector * inner;
        // Whether each vector is kept; a mask has a bit for each vector.
        let kept = weight.mask.as_ref().map(|mask| mask.to_bools());
        if kept.as_ref().is_some_and(|kept| kept.len() != vectors) {
            return Err(Error::internal("a mask has not a bit for each index"));
        }
        let mut stored = indices.unpack().into_iter();
        let mut next = || stored.next().ok_or_else(|| Error::internal("a weight has too few indices"));
        let dense: Vec<u8> = match &kept {
            None => (0..vectors).map(|_| next()).collect::<Result<_>>()?,
            Some(kept) => kept.iter().map(|kept| if *kept { next() } else { Ok(0) }).collect::<Result<_>>()?,
        };
        let place = |group: usize| (group * codebook.bits.entries() * vector) as i64;
        let by_row = codebook.axis == 0;
        let first: Vec<i64> = match by_row {
            true => (0..outputs / vector).map(|row| place(row * vector / codebook.group_size)).collect(),
            false => {
                let width = inner / (weight.shape[1] as usize);
                (0..inner).map(|column| place(column / width / codebook.group_size)).collect()
            }
        };
        let (rows, inner) = ((outputs / vector) as i64, inner as i64);
        let mask = |kept: Vec<bool>| -> Result<Tensor> {
            let each = Tensor::f_from_slice(&kept)?.f_view([rows, 1, inner])?.f_expand([rows, vector as i64, inner], false)?;
            Ok(each.f_reshape([rows * vector as i64, inner])?.f_to_device(device)?)
        };
        let scales = |scales: &Scales| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&scales.values)?.f_to_kind(Kind::Float)?.f_view([-1, 1])?.f_to_device(device)?)
        };
        let table = Table {
            shape: weight.shape.clone(),
            vector: vector as i64,
            indices: Tensor::f_from_slice(&dense)?.f_view([rows, inner])?.f_to_device(device)?,
            first: Tensor::f_from_slice(&first)?.f_view(if by_row { [-1, 1] } else { [1, -1] })?.f_to_device(device)?,
            mask: kept.map(mask).transpose()?,
            scales: codebook.scales.as_ref().map(scales).transpose()?,
            values: codebook.palettes.len() as i64,
        };
        Ok(Some((table, codebook.palettes.clone())))
    }

    /// For each element the place of its value, i64 `[o inner]`.
    fn places(&self) -> Result<Tensor> {
        let places = self.indices.f_to_kind(Kind::Int64)?.f_mul_scalar(self.vector)?.f_add(&self.first)?;
        if self.vector == 1 {
            return Ok(places.f_view([-1])?);
        }
        let member = Tensor::f_arange(self.vector, (Kind::Int64, places.device()))?.f_view([1, -1, 1])?;
        Ok(places.f_unsqueeze(1)?.f_add(&member)?.f_reshape([-1])?)
    }

    /// The weight for `palettes` (fp32 `[values]`), in fp32.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub(super) fn decode(&self, palettes: &Tensor) -> Result<Tensor> {
        let mut weight = palettes.f_index_select(0, &self.places()?)?.f_view([self.shape[0], -1])?;
        if let Some(scales) = &self.scales {
            // As a container is decoded: rounded once to fp16.
            weight = weight.f_mul(scales)?.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?;
        }
        if let Some(mask) = &self.mask {
            weight = weight.f_mul(mask)?;
        }
        Ok(weight.f_view(self.shape.as_slice())?)
    }

    /// The gradient of the palettes, fp32 `[values]`, for that of the weight: the sum over the
    /// elements that have each value. The sum is in a fixed order: one by one in fp64 on a CPU, by
    /// sorted places on a GPU.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub(super) fn gradient(&self, of_weight: &Tensor) -> Result<Tensor> {
        let mut gradient = of_weight.f_to_kind(Kind::Float)?.f_reshape([self.shape[0], -1])?;
        for factor in self.mask.iter().chain(&self.scales) {
            gradient = gradient.f_mul(factor)?;
        }
        let (places, gradient) = (self.places()?, gradient.f_reshape([-1])?);
        if gradient.device() == Device::Cpu {
            return Ok(places.f_bincount(Some(&gradient.f_to_kind(Kind::Double)?), self.values)?.f_to_kind(Kind::Float)?);
        }
        let sums = Tensor::f_zeros([self.values], (Kind::Float, gradient.device()))?;
        Ok(sums.f_index_put(&[Some(places)], &gradient, true)?)
    }
}
