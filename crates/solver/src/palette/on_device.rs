//! The palettizer for weights on a GPU, by [kernels](crate::kernels).

use std::sync::Arc;

use half::f16;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Codebook, Grouping, PaletteOptions};
use squeeze_numerics::finite::is_finite;
use tch::{Device, Kind, Tensor};

use super::layout::Layout;
use super::palettized::Palettized;
use crate::kernels::{Groups, Kernels};

/// The kernels that make palettes of a weight [o, ...] on `device`; `None` where
/// [`palettize`](super::palettize) on the host has to.
fn kernels_for(device: Device, rows: usize, columns: usize, options: &PaletteOptions) -> Option<Arc<Kernels>> {
    let group_rows = match options.grouping {
        Grouping::PerTensor => rows,
        Grouping::PerGroupedChannel { group_size } if options.axis == 0 => group_size,
        Grouping::PerGroupedChannel { .. } => return None,
    };
    let length = i64::try_from(group_rows.checked_mul(columns)?).ok()?;
    let groups = rows / group_rows.max(1);
    let is_plain = !options.per_channel_scale && options.vector_length == 1 && options.quantizer.is_none();
    Kernels::of(device).filter(|_| is_plain && Kernels::takes_groups(groups, length))
}

/// Whether [`palettize_on_device`] makes the palettes of a weight [o, ...].
#[must_use]
pub fn palettizes_on_device(weight: &Tensor, options: &PaletteOptions) -> bool {
    let rows = weight.size().first().map_or(0, |rows| rows.unsigned_abs() as usize);
    let columns = weight.numel() / rows.max(1);
    kernels_for(weight.device(), rows, columns, options).is_some()
}

/// [`palettize`](super::palettize) of fp16 weights [o, d] on a GPU, of which `keep` [o, d] are
/// kept, each with the importance of its column. Returns palettes without indices, and the indices
/// [o, d], u8, on the GPU; `None` where the GPU cannot.
///
/// # Errors
/// As [`palettize`](super::palettize).
pub fn palettize_on_device(
    name: &str,
    weight: &Tensor,
    keep: Option<&Tensor>,
    importance: Option<&[f64]>,
    options: &PaletteOptions,
) -> Result<Option<(Palettized, Tensor)>> {
    let (rows, columns) = weight.size2()?;
    let shape = [rows as usize, columns as usize];
    let Some(kernels) = kernels_for(weight.device(), shape[0], shape[1], options) else { return Ok(None) };
    let layout = Layout::new(name, &shape, options)?;
    if !is_finite(weight)? {
        return Err(Error::NotFinite(format!("`{name}`: palettes need finite weights")));
    }
    let grouped = |tensor: &Tensor| tensor.f_contiguous()?.f_view([layout.groups as i64, -1]);
    let (weights, keep) = (grouped(weight)?, keep.map(grouped).transpose()?);
    let groups = Groups { weights: &weights, keep: keep.as_ref() };
    let entries = options.bits.entries() as i64;
    let palettes = kernels.palettes(groups, importance, entries)?;
    let indices = kernels.look_up(groups, &palettes)?;
    let mut squares = values_of(&palettes.f_to_kind(Kind::Float)?, &indices, None)?.f_sub_(&weights)?.f_square_()?;
    let kept = match &keep {
        None => Tensor::f_from_slice(&[weights.numel() as f64])?.f_to_device(weight.device())?,
        Some(keep) => {
            squares = squares.f_mul_(keep)?;
            keep.f_sum(Kind::Int64)?.f_to_kind(Kind::Double)?.f_reshape([1])?
        }
    };
    let sums = Tensor::f_cat(&[squares.f_sum(Kind::Double)?.f_reshape([1])?, kept], 0)?;
    let sums = Vec::<f64>::try_from(&sums.f_to_device(Device::Cpu)?)?;
    let palettes: Vec<f16> = Vec::try_from(&palettes.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?;
    let Layout { axis, group_size, .. } = layout;
    let palettized = Palettized {
        name: name.to_owned(),
        shape: shape.to_vec(),
        codebook: Codebook { bits: options.bits, axis, group_size, vector_length: 1, palettes, scales: None },
        indices: Vec::new(),
        squared_error: sums[0],
        kept: sums[1] as usize,
    };
    Ok(Some((palettized, indices.f_view([rows, columns])?)))
}

/// The values of indices [o, d] into palettes of whole output channels without scales, on the
/// indices' device: fp32, zero where `keep` [o, d] is false.
///
/// # Errors
/// [`Error::Torch`] if the shapes disagree.
pub fn decode_on_device(codebook: &Codebook, indices: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
    let palettes = Tensor::f_from_slice(&codebook.palettes)?.f_view([-1, codebook.bits.entries() as i64])?;
    values_of(&palettes.f_to_device(indices.device())?.f_to_kind(Kind::Float)?, indices, keep)
}

/// [`decode_on_device`] for palettes [groups, entries] in fp32. The indices may be [o, d] or
/// [groups, o d / groups].
pub(crate) fn values_of(palettes: &Tensor, indices: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
    let of_groups = indices.f_reshape([palettes.size2()?.0, -1])?.f_to_kind(Kind::Int64)?;
    let values = palettes.f_gather(1, &of_groups, false)?.f_view(indices.size().as_slice())?;
    match keep {
        None => Ok(values),
        Some(keep) => Ok(values.f_masked_fill(&keep.f_logical_not()?, 0.0)?),
    }
}

#[cfg(test)]
mod tests {
    use squeeze_codebook::BitWidth;

    use super::*;

    #[test]
    fn values_are_those_that_the_codebook_decodes() {
        let (rows, columns) = (6, 7);
        let palettes = (0..12).map(|at| f16::from_f32(at as f32 / 3.0 - 2.0)).collect();
        let codebook = Codebook { bits: BitWidth::Two, axis: 0, group_size: 2, vector_length: 1, palettes, scales: None };
        let indices: Vec<u8> = (0..rows * columns).map(|at| (at * 5 % 4) as u8).collect();
        let keep: Vec<bool> = (0..rows * columns).map(|at| at % 3 > 0).collect();
        let matrix = |tensor: Tensor| tensor.view([rows as i64, columns as i64]);
        for keep in [None, Some(&keep)] {
            let expected = codebook.decode(&[rows, columns], &indices, keep.map(Vec::as_slice)).unwrap();
            let mask = keep.map(|keep| matrix(Tensor::from_slice(keep)));
            let values = decode_on_device(&codebook, &matrix(Tensor::from_slice(&indices)), mask.as_ref()).unwrap();
            assert_eq!(values, matrix(Tensor::from_slice(&expected)).to_kind(Kind::Float));
        }
    }

    #[test]
    fn a_cpu_makes_no_palettes_on_a_device() {
        let weight = Tensor::zeros([4, 8], (Kind::Half, Device::Cpu));
        let options = PaletteOptions { grouping: Grouping::PerTensor, ..PaletteOptions::default() };
        assert!(!palettizes_on_device(&weight, &options));
        assert!(palettize_on_device("a", &weight, None, None, &options).unwrap().is_none());
    }
}
