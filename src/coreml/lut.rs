//! Palettes as Core ML's look-up tables, with scales multiplied in.

use half::f16;

use super::element::{ArrayType, Element};
use crate::container::{CompressedWeight, Values};
use crate::error::{Error, Result};

/// The palettes of a weight's blocks: its first two axes are cut into `groups` parts each.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lut {
    /// How many parts each of the first two axes has.
    pub groups: [u64; 2],
    /// The palettes, [groups 0, groups 1, 2^bits].
    pub entries: Vec<f16>,
}

impl Lut {
    /// The look-up table of a palettized weight. Scales are folded in: a palette of its own for each row, unless all rows that share a
    /// palette also share a scale. That is exact, since a weight is the product of entry and scale, rounded to fp16, and a product of an
    /// operation of its own is what the Neural Engine has been seen to fail on (coremltools pull request 2688).
    ///
    /// # Errors
    /// [`Error::Failed`] if the weight is not palettized; [`Error::NotFinite`] if a product that is used is beyond fp16.
    pub fn of(weight: &CompressedWeight) -> Result<Self> {
        let Values::Palettized { bits, axis, group_size, palettes, scales, .. } = &weight.values else {
            return Err(Error::Failed("a weight without palettes has no look-up table".into()));
        };
        let entries = 1usize << bits;
        let groups = palettes.len() / entries;
        let shared = if *axis == 0 { [groups as u64, 1] } else { [1, groups as u64] };
        let Some(scales) = scales else { return Ok(Lut { groups: shared, entries: palettes.clone() }) };

        // The rows that read each palette; along axis 1 all rows read all palettes.
        let rows_together = if *axis == 0 { *group_size } else { scales.len() };
        let same = scales.chunks(rows_together.max(1)).all(|rows| rows.windows(2).all(|pair| pair.first() == pair.last()));
        let product = |entry: &f16, scale: &f16| f16::from_f32(entry.to_f32() * scale.to_f32());
        let palette = |group: usize| palettes.get(group * entries..(group + 1) * entries).unwrap_or_default();
        let scaled = |group: usize, scale: f16| palette(group).iter().map(move |entry| product(entry, &scale));
        let lut = match (axis, same) {
            (0, true) => {
                let first = |group: usize| scales.get(group * group_size).copied().unwrap_or(f16::ONE);
                Lut { groups: shared, entries: (0..groups).flat_map(|group| scaled(group, first(group))).collect() }
            }
            (0, false) => {
                let rows = scales.iter().enumerate();
                let entries = rows.flat_map(|(row, scale)| scaled(row / group_size, *scale)).collect();
                Lut { groups: [scales.len() as u64, 1], entries }
            }
            (_, true) => {
                let scale = scales.first().copied().unwrap_or(f16::ONE);
                Lut { groups: shared, entries: (0..groups).flat_map(|group| scaled(group, scale)).collect() }
            }
            (_, false) => {
                let rows = scales.iter();
                let entries = rows.flat_map(|scale| (0..groups).flat_map(move |group| scaled(group, *scale))).collect();
                Lut { groups: [scales.len() as u64, groups as u64], entries }
            }
        };
        lut.without_infinities(weight)
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

    /// Its type for a weight of rank `rank`: [g0, g1, 1, .., 2^bits, 1].
    pub fn array(&self, bits: u8, rank: usize) -> ArrayType {
        let mut shape = self.groups.to_vec();
        shape.resize(rank, 1);
        shape.extend([1 << bits, 1]);
        ArrayType::new(Element::F16, shape)
    }

    /// Its entries as little-endian bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(axis: usize, group_size: usize, scales: Option<Vec<f16>>) -> CompressedWeight {
        let (rows, columns) = (6, 4);
        let channels = [rows, columns][axis];
        let palettes = (0..channels / group_size * 4).map(|i| f16::from_f32(0.37 * i as f32 - 2.1)).collect();
        let indices: Vec<u8> = (0..rows * columns).map(|i| ((i * 7 + i / 3) % 4) as u8).collect();
        let shape = vec![rows as i64, columns as i64];
        CompressedWeight::palettized(shape, None, 2, axis, group_size, palettes, &indices, scales).unwrap()
    }

    /// Looks every element up by the rule of `constexpr_lut_to_dense`.
    fn look_up(weight: &CompressedWeight, lut: &Lut) -> Vec<f16> {
        let Values::Palettized { indices, .. } = &weight.values else { panic!() };
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
            let lut = Lut::of(&weight).unwrap();
            assert_eq!(lut.groups, groups, "axis {axis}, {group_size}");
            assert_eq!(look_up(&weight, &lut), weight.decode().unwrap(), "axis {axis}, {group_size}");
            assert_eq!(lut.array(2, 4).shape, [groups[0], groups[1], 1, 1, 4, 1]);
        }
    }

    #[test]
    fn a_product_beyond_fp16_is_an_error_only_where_it_is_used() {
        let palettized = |indices: &[u8]| {
            let palettes = vec![f16::ONE, f16::MAX];
            CompressedWeight::palettized(vec![1, 2], None, 1, 0, 1, palettes, indices, Some(vec![f16::from_f32(2.0)])).unwrap()
        };
        let unused = Lut::of(&palettized(&[0, 0])).unwrap();
        assert_eq!(unused.entries, [f16::from_f32(2.0), f16::MAX]);
        assert!(matches!(Lut::of(&palettized(&[0, 1])), Err(Error::NotFinite(_))));
    }
}
