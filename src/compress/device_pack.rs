//! Masks and indices packed where they are, so that only packed bytes come to the host.

use half::f16;
use squeeze_base::error::Result;
use squeeze_codebook::{BitWidth, Codebook};
use squeeze_container::{CompressedWeight, Mask, Packed, Values};
use tch::{Device, Kind, Tensor};

/// A palettized weight of `shape` from its mask (bool; `None` keeps all) and an index (u8) for each
/// element, both on one device. Indices of pruned elements are not read.
///
/// # Errors
/// As [`CompressedWeight::palettized`].
pub(super) fn palettized(
    shape: Vec<i64>,
    keep: Option<&Tensor>,
    codebook: Codebook,
    indices: &Tensor,
) -> Result<CompressedWeight> {
    let indices = match keep {
        None => indices.f_flatten(0, -1)?,
        Some(keep) => indices.f_masked_select(keep)?,
    };
    let packed = Packed::from_bytes(packed_bytes(&indices, codebook.bits)?, codebook.bits, indices.numel())?;
    CompressedWeight::new(shape, keep.map(mask).transpose()?, Values::Palettized { codebook, indices: packed })
}

/// A weight of `shape` that is only pruned, from its mask (bool) and values (fp16).
///
/// # Errors
/// As [`CompressedWeight::sparse`].
pub(super) fn sparse(shape: Vec<i64>, keep: &Tensor, weight: &Tensor) -> Result<CompressedWeight> {
    let values = weight.f_masked_select(keep)?.f_to_device(Device::Cpu)?;
    CompressedWeight::new(shape, Some(mask(keep)?), Values::Plain(Vec::<f16>::try_from(&values)?))
}

fn mask(keep: &Tensor) -> Result<Mask> {
    Mask::from_bytes(packed_bytes(&keep.f_flatten(0, -1)?.f_to_kind(Kind::Uint8)?, BitWidth::One)?, keep.numel())
}

/// Numbers [n] of u8, each below 2^bits, as [`Packed`] has them: number i in bits [i b, (i + 1) b)
/// of the stream, lowest bit first.
fn packed_bytes(numbers: &Tensor, bits: BitWidth) -> Result<Vec<u8>> {
    /// Numbers that are spread out to bits at once, a multiple of 8.
    const PIECE: i64 = 1 << 23;
    let device = numbers.device();
    let powers = Tensor::f_from_slice(&[1_u8, 2, 4, 8, 16, 32, 64, 128])?.f_to_device(device)?;
    let width = i64::from(bits.bits());
    let mut pieces = Vec::new();
    for piece in numbers.f_split(PIECE, 0)? {
        let bits = match width {
            8 => {
                pieces.push(piece);
                continue;
            }
            1 => piece,
            // Bit b of a number is set if the number has the power 2^b.
            _ => piece.f_unsqueeze(1)?.f_bitwise_and_tensor(&powers.f_narrow(0, 0, width)?)?.f_ne(0)?.f_flatten(0, -1)?,
        };
        let rest = (8 - bits.numel() as i64 % 8) % 8;
        let bits = bits.f_to_kind(Kind::Uint8)?.f_constant_pad_nd([0, rest])?.f_reshape([-1, 8])?;
        let bytes = bits.f_mul(&powers)?.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Int)?;
        pieces.push(bytes.f_to_kind(Kind::Uint8)?);
    }
    Ok(Vec::try_from(&Tensor::f_cat(&pieces, 0)?.f_to_device(Device::Cpu)?.f_contiguous()?)?)
}

#[cfg(test)]
mod tests {
    use squeeze_numerics::random::noise;

    use super::*;

    /// Every width, with numbers of elements that fill no byte.
    #[test]
    fn packing_on_a_device_gives_the_bytes_of_the_host() {
        let (rows, columns) = (6, 171);
        let random = |seed| noise(&[rows, columns], seed, Kind::Double).unwrap();
        let keep = random(1).gt(-0.3);
        let bools: Vec<bool> = Vec::try_from(&keep.flatten(0, -1)).unwrap();
        for bits in [BitWidth::One, BitWidth::Two, BitWidth::Three, BitWidth::Four, BitWidth::Six, BitWidth::Eight] {
            let entries = bits.entries();
            let indices = (random(2) * 1e4).to_kind(Kind::Int64).remainder(entries as i64).to_kind(Kind::Uint8);
            let bytes: Vec<u8> = Vec::try_from(&indices.flatten(0, -1)).unwrap();
            let palettes = (0..2 * entries).map(|at| f16::from_f32(at as f32 / 100.0)).collect();
            let codebook = Codebook { bits, axis: 0, group_size: 3, vector_length: 1, palettes, scales: None };
            for is_pruned in [false, true] {
                let (kept, host) = (is_pruned.then_some(&keep), is_pruned.then_some(bools.as_slice()));
                let packed = palettized(vec![rows, columns], kept, codebook.clone(), &indices).unwrap();
                assert_eq!(packed, CompressedWeight::palettized(vec![rows, columns], host, codebook.clone(), &bytes).unwrap());
            }
        }
        let weight = random(3).to_kind(Kind::Half);
        let values: Vec<f16> = Vec::try_from(&weight.flatten(0, -1)).unwrap();
        let expected = CompressedWeight::sparse(vec![rows, columns], &bools, &values).unwrap();
        assert_eq!(sparse(vec![rows, columns], &keep, &weight).unwrap(), expected);
    }
}
