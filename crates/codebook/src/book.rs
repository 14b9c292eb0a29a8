//! The palettes of a weight, and the values of indices into them.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::{BitWidth, Scales};

/// The palettes of a weight [o, i, ...], which give the value for each element's index.
///
/// The channels of one axis are cut into groups of `group_size` neighbours. An element's index
/// names an entry of the palette of its group; with scales, its value is the product of that entry
/// and the scale of its output channel, or of its block of columns there, rounded once to fp16.
///
/// In a vector palette an entry has `vector_length` values, and an index gives them to as many
/// neighbouring output channels, as coremltools' `cluster_dim` does. There is one index for each
/// vector then: [o / vector_length, i, ...].
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    /// The width of an index. A palette has 2^bits entries.
    pub bits: BitWidth,
    /// The axis whose channels are grouped: 0 (output) or 1 (input).
    pub axis: usize,
    /// Channels in a group; it divides their number. One palette for the whole weight has all
    /// channels in one group.
    pub group_size: usize,
    /// The values in a palette's entry; 1 for scalar palettes.
    pub vector_length: usize,
    /// The palettes, [groups, 2^bits, vector_length].
    pub palettes: Vec<f16>,
    /// Factors for output channels, or for blocks of columns in them.
    pub scales: Option<Scales>,
}

impl Codebook {
    /// The number of palettes of a weight of this shape.
    ///
    /// # Errors
    /// If `axis` is not 0 or 1, or `group_size` does not divide its channels.
    pub fn groups_of(shape: &[usize], axis: usize, group_size: usize) -> Result<usize, String> {
        let channels = shape.get(axis).filter(|_| axis < 2);
        let channels = *channels.ok_or_else(|| format!("axis {axis} cannot be grouped in a weight of {shape:?}"))?;
        if group_size == 0 || !channels.is_multiple_of(group_size) {
            return Err(format!("groups of {group_size} do not divide the {channels} channels of axis {axis}"));
        }
        Ok(channels / group_size)
    }

    /// The number of palettes.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.palettes.len() / self.palette_length()
    }

    /// The palette of a group.
    #[must_use]
    pub fn palette(&self, group: usize) -> &[f16] {
        let length = self.palette_length();
        &self.palettes[group * length..(group + 1) * length]
    }

    /// The number of values in one palette.
    fn palette_length(&self) -> usize {
        self.bits.entries() * self.vector_length
    }

    /// Checks that the sizes are those for a weight of this shape. Allocates nothing.
    ///
    /// # Errors
    /// The size that is wrong.
    pub fn check(&self, shape: &[usize]) -> Result<(), String> {
        let groups = Self::groups_of(shape, self.axis, self.group_size)?;
        let (outputs, length) = (shape[0], self.vector_length);
        if length == 0 || !outputs.is_multiple_of(length) || (self.axis == 0 && !self.group_size.is_multiple_of(length)) {
            return Err(format!("vectors of {length} do not divide the {outputs} output channels or their groups"));
        }
        let entries = groups.checked_mul(self.palette_length()).ok_or("too many palettes")?;
        agree("palette entries", self.palettes.len(), entries)?;
        let Some(Scales { values, block }) = &self.scales else { return Ok(()) };
        let columns =
            shape[1..].iter().try_fold(1_usize, |product, size| product.checked_mul(*size)).ok_or("too many columns")?;
        let count = outputs.checked_mul(Scales::in_row(*block, columns)?).ok_or("too many scales")?;
        agree("scales", values.len(), count)
    }

    /// Checks that palettes and scales are finite.
    ///
    /// # Errors
    /// A message that says whether NaN or infinity is in the palettes or in the scales.
    pub fn check_finite(&self) -> Result<(), String> {
        let finite = |place: &str, values: &[f16]| match values.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(format!("NaN or infinite {place}")),
        };
        finite("palette entries", &self.palettes)?;
        self.scales.as_ref().map_or(Ok(()), |scales| finite("scales", &scales.values))
    }

    /// The length of a run: the number of neighbouring elements of a row-major weight of this shape
    /// in one output channel and one group, which have one palette.
    #[must_use]
    pub fn run_length(&self, shape: &[usize]) -> usize {
        let inner: usize = shape[self.axis + 1..].iter().product();
        if self.axis == 0 { inner } else { self.group_size * inner }
    }

    /// The palette of a run, runs being counted in row-major order.
    #[must_use]
    pub fn palette_of_run(&self, run: usize) -> &[f16] {
        self.palette(if self.axis == 0 { run / self.group_size } else { run % self.groups() })
    }

    /// The values of a weight of this shape, row-major, from an index for each element or vector of
    /// elements; zero where `keep`, which has an entry for each element, is false.
    ///
    /// # Errors
    /// If the sizes disagree, or an index is not in its palette.
    pub fn decode(&self, shape: &[usize], indices: &[u8], keep: Option<&[bool]>) -> Result<Vec<f16>, String> {
        self.check(shape)?;
        let count = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size)).filter(|count| *count > 0);
        let count = count.ok_or_else(|| format!("{shape:?} is not the shape of a weight"))?;
        agree("indices", indices.len(), count / self.vector_length)?;
        keep.map_or(Ok(()), |keep| agree("mask entries", keep.len(), count))?;
        if let Some(index) = indices.iter().find(|index| **index > self.bits.max_index()) {
            return Err(format!("index {index} in a palette of {}", self.bits.entries()));
        }
        let row: usize = shape[1..].iter().product();
        let length = self.run_length(shape);
        let mut decoded = vec![f16::ZERO; count];
        // One output channel at a time: blocks with one scale lie in one.
        decoded.par_chunks_mut(row).enumerate().for_each(|(channel, values)| {
            let (vector, member) = (channel / self.vector_length, channel % self.vector_length);
            let indices = &indices[vector * row..(vector + 1) * row];
            let first = channel * row / length;
            for (run, (values, indices)) in (first..).zip(values.chunks_mut(length).zip(indices.chunks(length))) {
                let palette = self.palette_of_run(run);
                let entry = |index: u8| palette[usize::from(index) * self.vector_length + member];
                values.iter_mut().zip(indices).for_each(|(value, index)| *value = entry(*index));
            }
            if let Some(scales) = &self.scales {
                for (block, values) in values.chunks_mut(scales.block.unwrap_or(row)).enumerate() {
                    multiply(values, scales.at(channel, block * scales.block.unwrap_or(row), row));
                }
            }
            if let Some(keep) = keep {
                let keep = &keep[channel * row..(channel + 1) * row];
                values.iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(value, _)| *value = f16::ZERO);
            }
        });
        Ok(decoded)
    }
}

/// Multiplies in fp32 and rounds to fp16, a block at a time: half converts blocks much faster than
/// single values.
fn multiply(values: &mut [f16], scale: f16) {
    let scale = scale.to_f32();
    let mut block = [0.0_f32; 512];
    for values in values.chunks_mut(block.len()) {
        let wide = &mut block[..values.len()];
        values.convert_to_f32_slice(wide);
        wide.iter_mut().for_each(|value| *value *= scale);
        values.convert_from_f32_slice(wide);
    }
}

/// Checks a number of values: `want` of the kind `what` are expected, and there are `have`.
fn agree(what: &str, have: usize, want: usize) -> Result<(), String> {
    if have == want { Ok(()) } else { Err(format!("{have} {what} where there should be {want}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(axis: usize, group_size: usize, vector_length: usize, groups: usize, scaled: Option<usize>) -> Codebook {
        let palettes = (0..groups * 4 * vector_length).map(|i| f16::from_f32(0.5 * i as f32 - 3.0)).collect();
        // A number of scales in each of the 8 rows of 18 columns.
        let scales = scaled.map(|count| Scales {
            values: (0..8 * count).map(|at| f16::from_f32(1.0 + at as f32 / 8.0)).collect(),
            block: (count > 1).then(|| 18_usize.div_ceil(count)),
        });
        Codebook { bits: BitWidth::Two, axis, group_size, vector_length, palettes, scales }
    }

    #[test]
    fn vectors_are_decoded_by_definition() {
        let shape = [8, 6, 3];
        for (axis, group_size, groups) in [(0, 4, 2), (0, 8, 1), (1, 3, 2)] {
            for vector_length in [1, 2, 4] {
                for scaled in [None, Some(1), Some(2), Some(4)] {
                    let book = book(axis, group_size, vector_length, groups, scaled);
                    let indices: Vec<u8> = (0..144 / vector_length).map(|i| ((i * 7 + i / 5) % 4) as u8).collect();
                    let keep: Vec<bool> = (0..144).map(|i| i % 5 > 0).collect();
                    let decoded = book.decode(&shape, &indices, Some(&keep)).unwrap();
                    for (element, value) in decoded.into_iter().enumerate() {
                        let (row, column, inner) = (element / 18, element / 3 % 6, element % 18);
                        let group = if axis == 0 { row / group_size } else { column / group_size };
                        let index = usize::from(indices[row / vector_length * 18 + inner]);
                        let entry = book.palette(group)[index * vector_length + row % vector_length];
                        let scale = scaled.map_or(1.0, |count| {
                            let block = inner / 18_usize.div_ceil(count);
                            1.0 + (row * count + block) as f64 / 8.0
                        });
                        let expected = if keep[element] { f16::from_f64(entry.to_f64() * scale) } else { f16::ZERO };
                        assert_eq!(value, expected, "{axis} {group_size} {vector_length} {element}");
                    }
                }
            }
        }
    }

    #[test]
    fn vectors_that_do_not_divide_are_refused() {
        let refused = |book: Codebook, indices: usize| book.decode(&[8, 6, 3], &vec![0; indices], None).unwrap_err();
        assert!(refused(book(0, 8, 3, 1, None), 48).contains("vectors of 3"));
        assert!(refused(book(0, 2, 4, 4, None), 36).contains("vectors of 4"));
        assert!(refused(book(0, 8, 0, 1, None), 0).contains("vectors of 0"));
        for (scales, words) in [(vec![f16::ONE; 9], "9 scales where there should be 16"), (vec![f16::ONE; 16], "")] {
            let scales = Some(Scales { values: scales, block: Some(9) });
            let decoded = Codebook { scales, ..book(0, 8, 1, 1, None) }.decode(&[8, 6, 3], &[0; 144], None);
            assert_eq!(decoded.err().unwrap_or_default(), words);
        }
        assert!(refused(book(0, 8, 2, 1, None), 144).contains("144 indices where there should be 72"));
    }
}
