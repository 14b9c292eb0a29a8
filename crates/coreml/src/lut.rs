//! Palettes as Core ML's look-up tables, with scales multiplied in.

use half::f16;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{BitWidth, Codebook};
use squeeze_container::CompressedWeight;

use super::element::{ArrayType, Element};

/// The palettes of a weight's blocks: its first two axes are cut into `groups` parts each.
#[derive(Debug, Clone, PartialEq)]
pub struct Lut {
    /// How many parts each of the first two axes has.
    pub groups: [u64; 2],
    /// The width of an index.
    bits: BitWidth,
    /// The values in an entry.
    vector_length: usize,
    /// The palettes, [groups 0, groups 1, 2^bits, vector length].
    pub entries: Vec<f16>,
}

impl Lut {
    /// The look-up table of a weight with this codebook. Scales are folded in: a palette of its own
    /// for each row, unless all rows that share a palette also share a scale. That is exact,
    /// since a weight is the product of entry and scale, rounded to fp16. A separate operation
    /// for the product makes the Neural Engine fail (coremltools pull request 2688).
    ///
    /// # Errors
    /// [`Error::Argument`] for scales of blocks of columns; [`Error::NotFinite`] if a product that
    /// is used is beyond fp16.
    pub fn of(weight: &CompressedWeight, codebook: &Codebook) -> Result<Self> {
        let Codebook { bits, axis, group_size, vector_length, palettes, scales } = codebook;
        let groups = codebook.groups();
        let shared = if *axis == 0 { [groups as u64, 1] } else { [1, groups as u64] };
        let Some(scales) = scales else {
            return Ok(Lut { groups: shared, bits: *bits, vector_length: *vector_length, entries: palettes.clone() });
        };

        if scales.block.is_some() {
            return Err(Error::Argument("scales of blocks of columns cannot be multiplied into the palettes".into()));
        }
        let scales = &scales.values;

        // The rows that read each palette; along axis 1 all rows read all palettes.
        let rows_together = if *axis == 0 { *group_size } else { scales.len() };
        let is_shared = scales.chunks(rows_together).all(|rows| rows.iter().all(|scale| *scale == rows[0]));
        let product = |entry: &f16, scale: f16| f16::from_f32(entry.to_f32() * scale.to_f32());
        let scaled = |group: usize, scale: f16| codebook.palette(group).iter().map(move |entry| product(entry, scale));
        let row_count = scales.len() as u64;
        let (groups, entries) = match (axis, is_shared) {
            (0, true) => (shared, (0..groups).flat_map(|group| scaled(group, scales[group * group_size])).collect()),
            (0, false) => {
                let rows = scales.iter().enumerate();
                ([row_count, 1], rows.flat_map(|(row, scale)| scaled(row / group_size, *scale)).collect())
            }
            (_, true) => (shared, (0..groups).flat_map(|group| scaled(group, scales[0])).collect()),
            (_, false) => {
                let row = |scale: &f16| {
                    let scale = *scale;
                    (0..groups).flat_map(move |group| scaled(group, scale))
                };
                ([row_count, groups as u64], scales.iter().flat_map(row).collect())
            }
        };
        Lut { groups, bits: *bits, vector_length: *vector_length, entries }.without_infinities(weight)
    }

    /// A product beyond fp16 is an error if an element has it, and else any number will do.
    fn without_infinities(mut self, weight: &CompressedWeight) -> Result<Self> {
        if self.entries.iter().any(|entry| !entry.is_finite()) {
            weight.decode()?;
            for entry in self.entries.iter_mut().filter(|entry| !entry.is_finite()) {
                *entry = f16::MAX.copysign(*entry);
            }
        }
        Ok(self)
    }

    /// Its type for a weight of rank `rank`: [g0, g1, 1, .., 2^bits, vector length].
    #[must_use]
    pub fn array(&self, rank: usize) -> ArrayType {
        let mut shape = self.groups.to_vec();
        shape.resize(rank, 1);
        shape.extend([self.bits.entries() as u64, self.vector_length as u64]);
        ArrayType::new(Element::F16, shape)
    }

    /// Its entries widened to fp32, as little-endian bytes.
    #[must_use]
    pub fn wide_bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|entry| entry.to_f32().to_le_bytes()).collect()
    }

    /// Its entries as little-endian bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use squeeze_container::Values;

    use super::*;

    fn weight(axis: usize, group_size: usize, scales: Option<Vec<f16>>) -> CompressedWeight {
        let (rows, columns) = (6, 4);
        let channels = [rows, columns][axis];
        let palettes = (0..channels / group_size * 4).map(|i| f16::from_f32(0.37 * i as f32 - 2.1)).collect();
        let indices: Vec<u8> = (0..rows * columns).map(|i| ((i * 7 + i / 3) % 4) as u8).collect();
        let shape = vec![rows as i64, columns as i64];
        let codebook =
            Codebook { bits: BitWidth::Two, axis, group_size, vector_length: 1, palettes, scales: scales.map(Into::into) };
        CompressedWeight::palettized(shape, None, codebook, &indices).unwrap()
    }

    fn lut(weight: &CompressedWeight) -> Result<Lut> {
        let Values::Palettized { codebook, .. } = &weight.values else { panic!("only pruned") };
        Lut::of(weight, codebook)
    }

    /// Looks every element up by the rule of `constexpr_lut_to_dense`.
    fn look_up(weight: &CompressedWeight, lut: &Lut) -> Vec<f16> {
        let Values::Palettized { indices, .. } = &weight.values else { panic!("only pruned") };
        let [rows, columns] = [0, 1].map(|axis| weight.shape[axis] as usize);
        let [down, right] = lut.groups.map(|n| n as usize);
        assert_eq!(lut.entries.len(), down * right * 4);
        let group = |row: usize, column: usize| row / (rows / down) * right + column / (columns / right);
        (0..rows * columns).map(|i| lut.entries[group(i / columns, i % columns) * 4 + usize::from(indices.get(i))]).collect()
    }

    #[test]
    fn scales_are_folded_in_exactly() {
        let uneven: Vec<f16> = (0..6).map(|row| f16::from_f32(0.3 + 0.117 * row as f32)).collect();
        let of_groups: Vec<f16> = (0..6).map(|row| f16::from_f32(0.3 + 0.117 * (row / 3) as f32)).collect();
        let even = vec![f16::from_f32(0.7); 6];
        let cases = [
            (0, 3, None, [2, 1]),
            (0, 3, Some(&uneven), [6, 1]),
            (0, 3, Some(&of_groups), [2, 1]),
            (0, 6, Some(&of_groups), [6, 1]),
            (0, 6, Some(&even), [1, 1]),
            (1, 2, None, [1, 2]),
            (1, 2, Some(&even), [1, 2]),
            (1, 2, Some(&uneven), [6, 2]),
        ];
        for (axis, group_size, scales, groups) in cases {
            let weight = weight(axis, group_size, scales.cloned());
            let lut = lut(&weight).unwrap();
            assert_eq!(lut.groups, groups, "axis {axis}, {group_size}");
            assert_eq!(look_up(&weight, &lut), weight.decode().unwrap(), "axis {axis}, {group_size}");
            assert_eq!(lut.array(4).shape, [groups[0], groups[1], 1, 1, 4, 1]);
        }
    }

    #[test]
    fn a_product_beyond_fp16_is_an_error_only_where_it_is_used() {
        let palettized = |indices: &[u8]| {
            let (palettes, scales) = (vec![f16::ONE, f16::MAX], Some(vec![f16::from_f32(2.0)].into()));
            let codebook = Codebook { bits: BitWidth::One, axis: 0, group_size: 1, vector_length: 1, palettes, scales };
            CompressedWeight::palettized(vec![1, 2], None, codebook, indices).unwrap()
        };
        let unused = lut(&palettized(&[0, 0])).unwrap();
        assert_eq!(unused.entries, [f16::from_f32(2.0), f16::MAX]);
        assert!(matches!(lut(&palettized(&[0, 1])), Err(Error::NotFinite(_))));
    }
}
