//! Palettes as Core ML's look-up tables, with scales multiplied in.

use half::f16;

use super::element::{ArrayType, Element};
use crate::container::{CompressedWeight, Values};
use crate::error::{Error, Result};

/// The palettes of a weight's blocks: its first two axes are cut into `groups` parts each.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Lut {
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
    /// [`Error::Argument`] if the weight is not palettized; [`Error::NotFinite`] if a product that is used is beyond fp16.
    pub fn of(weight: &CompressedWeight) -> Result<Self> {
        let Values::Palettized { bits, axis, group_size, palettes, scales, .. } = &weight.values else {
            return Err(Error::Argument("a weight without palettes has no look-up table".into()));
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
