//! One compressed weight in memory.

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::Codebook;

use super::look_up::{look_up, look_up_kept};
use super::packed::{Mask, Packed, count_ones};
use super::vectors;

/// The most values of an entry that a container holds.
const LONGEST_VECTOR: usize = 16;

/// A Conv2d or Linear weight of `shape` [o, i, …]: which elements are kept, and their values.
/// Everything is in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressedWeight {
    /// The dense weight's shape, output channels first.
    pub shape: Vec<i64>,
    /// Which elements are kept; all of them if absent. Pruned elements are +0.0. With vector
    /// palettes it has a bit for each vector of elements: [o / vector length, i, …].
    pub mask: Option<Mask>,
    /// The values of the kept elements.
    pub values: Values,
}

/// The values of a weight's kept elements, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Each as it is.
    Plain(Vec<f16>),
    /// Each an index into the palette of its group.
    Palettized {
        /// The palettes.
        codebook: Codebook,
        /// An index for each kept element, or for each kept vector of elements.
        indices: Packed,
    },
}

impl CompressedWeight {
    /// A palettized weight. `indices` has an entry for each element; those of elements that `keep`
    /// leaves out are not read. With vector palettes both have an entry for each vector of
    /// neighbouring output channels, [o / vector length, i, …].
    ///
    /// # Errors
    /// [`Error::Argument`] if sizes disagree, the group size does not divide the channels, or an
    /// index is too large; for vectors of more than 16 values, with scales, along input channels,
    /// or that do not divide the groups. [`Error::NotFinite`] if a palette or scale has NaN or
    /// infinite values.
    pub fn palettized(shape: Vec<i64>, keep: Option<&[bool]>, codebook: Codebook, indices: &[u8]) -> Result<Self> {
        let numel = numel(&shape).map_err(Error::Argument)?;
        check_vectors(codebook.vector_length, codebook.axis, codebook.group_size, codebook.scales.is_some())
            .map_err(Error::Argument)?;
        let count = numel / codebook.vector_length;
        if indices.len() != count {
            return Err(Error::shape("the list of indices", [indices.len() as i64], format!("the {count} of {shape:?}")));
        }
        let indices = match keep {
            None => Packed::pack(indices, codebook.bits)?,
            Some(keep) => Packed::pack(&kept(keep, indices)?, codebook.bits)?,
        };
        let values = Values::Palettized { codebook, indices };
        Self { shape, mask: keep.map(Mask::from_bools), values }.checked()
    }

    /// A weight that is only pruned. `weight` has a value for each element; those that `keep`
    /// leaves out are not read.
    ///
    /// # Errors
    /// [`Error::Argument`] if sizes disagree, [`Error::NotFinite`] if a kept value is NaN or
    /// infinite.
    pub fn sparse(shape: Vec<i64>, keep: &[bool], weight: &[f16]) -> Result<Self> {
        let values = Values::Plain(kept(keep, weight)?);
        Self { shape, mask: Some(Mask::from_bools(keep)), values }.checked()
    }

    /// A weight of parts that are packed already.
    ///
    /// # Errors
    /// [`Error::Argument`] if they disagree; [`Error::NotFinite`] if a value, palette or scale is
    /// NaN or infinite.
    pub fn new(shape: Vec<i64>, mask: Option<Mask>, values: Values) -> Result<Self> {
        Self { shape, mask, values }.checked()
    }

    fn checked(self) -> Result<Self> {
        self.check_structure().map_err(Error::Argument)?;
        self.check_finite().map_err(Error::NotFinite)?;
        Ok(self)
    }

    /// The dense weight, row-major.
    ///
    /// # Errors
    /// [`Error::Argument`] if the parts disagree; [`Error::NotFinite`] if a value is NaN or
    /// infinite.
    pub fn decode(&self) -> Result<Vec<f16>> {
        self.check_structure().map_err(Error::Argument)?;
        self.check_finite().map_err(Error::NotFinite)?;
        let dense = self.decode_checked();
        let scaled = match &self.values {
            Values::Plain(_) => false,
            Values::Palettized { codebook, .. } => codebook.scales.is_some(),
        };
        if scaled && !dense.par_iter().all(|value| value.is_finite()) {
            return Err(Error::NotFinite("a palette entry times its scale is beyond fp16".into()));
        }
        Ok(dense)
    }

    /// Blocks of elements are decoded in parallel; a count of the mask's bits says where the values
    /// of each begin.
    fn decode_checked(&self) -> Vec<f16> {
        const BLOCK: usize = 1 << 16;
        let mut dense = vec![f16::ZERO; self.numel()];
        if let Values::Palettized { codebook, indices } = &self.values
            && codebook.vector_length > 1
        {
            vectors::decode(codebook, indices, self.mask.as_ref(), &mut dense);
            return dense;
        }
        let mut first_values = Vec::with_capacity(dense.len().div_ceil(BLOCK));
        match &self.mask {
            None => first_values.extend((0..dense.len()).step_by(BLOCK)),
            Some(mask) => first_values.extend(mask.bytes().chunks(BLOCK / 8).scan(0, |before, bytes| {
                let first = *before;
                *before += count_ones(bytes);
                Some(first)
            })),
        }
        let (run_length, columns) = (self.run_length(), dense.len() / sizes(&self.shape)[0]);
        // The neighbouring elements from one on that have a palette and a scale in common.
        let alike = |at: usize| {
            let of_run = run_length - at % run_length;
            match &self.values {
                Values::Palettized { codebook: Codebook { scales: Some(scales), .. }, .. } => {
                    of_run.min(scales.rest(at % columns, columns))
                }
                Values::Palettized { .. } | Values::Plain(_) => of_run,
            }
        };
        dense.par_chunks_mut(BLOCK).zip(first_values).enumerate().for_each(|(block, (elements, mut value))| {
            let mut at = block * BLOCK;
            let mut left = elements;
            while !left.is_empty() {
                let length = alike(at).min(left.len());
                let (of_run, rest) = left.split_at_mut(length);
                value = self.decode_run(at, (at / run_length, columns), of_run, value);
                at += length;
                left = rest;
            }
        });
        dense
    }

    /// Decodes a part of run number `run` with one scale, in rows of `columns`, which begins at
    /// element `at` and value number `value`; returns the next value's number.
    fn decode_run(&self, at: usize, (run, columns): (usize, usize), elements: &mut [f16], mut value: usize) -> usize {
        match &self.values {
            Values::Plain(values) => {
                let is_kept = |i: usize| self.mask.as_ref().is_none_or(|mask| mask.get(at + i));
                for (_, element) in elements.iter_mut().enumerate().filter(|(i, _)| is_kept(*i)) {
                    *element = values[value];
                    value += 1;
                }
                value
            }
            Values::Palettized { codebook, indices } => {
                let palette = codebook.palette_of_run(run);
                let scale = codebook.scales.as_ref().map(|scales| scales.at(at / columns, at % columns, columns));
                // With room for any index of 8 bits, so that none is checked.
                let mut table = [f16::ZERO; 256];
                for (to, entry) in table.iter_mut().zip(palette) {
                    // The product of two fp16 numbers is exact in fp32, so that it is rounded once.
                    *to = scale.map_or(*entry, |scale| f16::from_f32(entry.to_f32() * scale.to_f32()));
                }
                match &self.mask {
                    None => look_up(&table, indices, elements, value),
                    Some(mask) => look_up_kept(&table, indices, mask, at, elements, value),
                }
            }
        }
    }

    /// How many neighbouring elements share a palette.
    fn run_length(&self) -> usize {
        match &self.values {
            Values::Palettized { codebook, .. } => codebook.run_length(&sizes(&self.shape)),
            Values::Plain(_) => self.numel(),
        }
    }

    /// The number of elements, kept and pruned.
    ///
    /// # Panics
    /// If the shape is that of no weight, which the constructors refuse.
    #[must_use]
    pub fn numel(&self) -> usize {
        numel(&self.shape).expect("a weight's shape was checked when it was made")
    }

    /// The number of kept elements.
    ///
    /// # Panics
    /// As [`numel`](Self::numel).
    #[must_use]
    pub fn kept(&self) -> usize {
        self.mask.as_ref().map_or(self.numel(), |mask| mask.kept() * self.vector_length())
    }

    /// How many neighbouring output channels share an index and a bit of the mask: 1 unless the
    /// palettes are of vectors.
    #[must_use]
    pub fn vector_length(&self) -> usize {
        match &self.values {
            Values::Plain(_) => 1,
            Values::Palettized { codebook, .. } => codebook.vector_length,
        }
    }

    /// The bytes of mask, indices, palettes, scales and values in a file, without names and
    /// metadata.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let mask = self.mask.as_ref().map_or(0, |mask| mask.bytes().len());
        let values = match &self.values {
            Values::Plain(values) => 2 * values.len(),
            Values::Palettized { codebook: Codebook { palettes, scales, .. }, indices } => {
                indices.bytes().len() + 2 * (palettes.len() + scales.as_ref().map_or(0, |scales| scales.values.len()))
            }
        };
        (mask + values) as u64
    }

    /// Stored bits for each element, kept and pruned.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.stored_bytes() as f64 / self.numel().max(1) as f64
    }

    /// The pruned elements' share, 0 to 1.
    #[must_use]
    pub fn sparsity(&self) -> f64 {
        1.0 - self.kept() as f64 / self.numel().max(1) as f64
    }

    /// Whether the sizes of all parts agree. Nothing is allocated.
    pub(super) fn check_structure(&self) -> Result<(), String> {
        let numel = numel(&self.shape)?;
        if let Values::Palettized { codebook, .. } = &self.values {
            check_vectors(codebook.vector_length, codebook.axis, codebook.group_size, codebook.scales.is_some())?;
            codebook.check(&sizes(&self.shape))?;
        }
        // Each has a bit of the mask, and an index or value if it is kept.
        let count = numel / self.vector_length();
        if let Some(mask) = self.mask.as_ref().filter(|mask| mask.len() != count) {
            return Err(format!("a mask of {} entries for a weight of {:?}, which needs {count}", mask.len(), self.shape));
        }
        let kept = self.mask.as_ref().map_or(count, Mask::kept);
        let agree = |what: &str, have: usize, want: usize| {
            if have == want { Ok(()) } else { Err(format!("{have} {what} where there should be {want}")) }
        };
        match &self.values {
            Values::Plain(values) => agree("values", values.len(), kept),
            Values::Palettized { codebook, indices } => {
                agree("indices", indices.len(), kept)?;
                agree("bits an index", usize::from(indices.bits().bits()), usize::from(codebook.bits.bits()))
            }
        }
    }

    /// Whether all values are numbers.
    pub(super) fn check_finite(&self) -> Result<(), String> {
        match &self.values {
            Values::Plain(values) if values.iter().all(|value| value.is_finite()) => Ok(()),
            Values::Plain(_) => Err("NaN or infinite values".into()),
            Values::Palettized { codebook, .. } => codebook.check_finite(),
        }
    }
}

/// Checks the length of a palette's vectors against what a container holds: at most 16 neighbouring
/// output channels of one group, without scales.
pub(super) fn check_vectors(length: usize, axis: usize, group_size: usize, scaled: bool) -> Result<(), String> {
    if !(1..=LONGEST_VECTOR).contains(&length) {
        return Err(format!("vectors of {length} values are not supported (1 to {LONGEST_VECTOR} are)"));
    }
    if length == 1 {
        return Ok(());
    }
    if axis != 0 {
        return Err(format!("vectors lie along axis 0, but the groups along axis {axis}"));
    }
    if !group_size.is_multiple_of(length) {
        return Err(format!("vectors of {length} do not divide groups of {group_size}"));
    }
    if scaled { Err(format!("vectors of {length} cannot have scales")) } else { Ok(()) }
}

/// The number of elements of a weight.
pub(super) fn numel(shape: &[i64]) -> Result<usize, String> {
    let product = shape.iter().try_fold(1usize, |product, n| product.checked_mul(usize::try_from(*n).ok().filter(|n| *n > 0)?));
    // Of two bytes each, in one allocation.
    product
        .filter(|numel| !shape.is_empty() && *numel <= isize::MAX as usize / 2)
        .ok_or_else(|| format!("{shape:?} is not the shape of a weight"))
}

/// The dimensions of a shape that [`numel`] accepts.
pub(super) fn sizes(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|size| usize::try_from(*size).expect("`numel` refuses sizes below 1")).collect()
}

/// The values at the elements that `keep` is true for.
fn kept<T: Copy + Default + Send + Sync>(keep: &[bool], all: &[T]) -> Result<Vec<T>> {
    const PIECE: usize = 1 << 16;
    if keep.len() != all.len() {
        return Err(Error::shape("the mask", [keep.len() as i64], format!("[{}]", all.len())));
    }
    let counts: Vec<usize> = keep.par_chunks(PIECE).map(|keep| keep.iter().filter(|kept| **kept).count()).collect();
    let mut values = vec![T::default(); counts.iter().sum()];
    let mut rest = values.as_mut_slice();
    let mut places = Vec::with_capacity(counts.len());
    for count in counts {
        let (place, after) = rest.split_at_mut(count);
        rest = after;
        places.push(place);
    }
    let pieces = places.into_par_iter().zip(keep.par_chunks(PIECE).zip(all.par_chunks(PIECE)));
    pieces.for_each_init(
        || vec![T::default(); PIECE],
        |packed, (place, (keep, all))| {
            let mut count = 0;
            for (value, kept) in all.iter().zip(keep) {
                // Each is written, and overwritten by the next one if it is not kept.
                packed[count] = *value;
                count += usize::from(*kept);
            }
            place.copy_from_slice(&packed[..count]);
        },
    );
    Ok(values)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use squeeze_codebook::{BitWidth, Scales};

    use super::*;

    /// A weight's parts, as a caller has them.
    #[derive(Debug, Clone)]
    struct Parts {
        shape: Vec<i64>,
        keep: Option<Vec<bool>>,
        bits: BitWidth,
        axis: usize,
        group_size: usize,
        vector_length: usize,
        palettes: Vec<f16>,
        indices: Vec<u8>,
        scales: Option<Scales>,
    }

    impl Parts {
        fn build(&self) -> Result<CompressedWeight> {
            let Parts { shape, keep, bits, axis, group_size, vector_length, palettes, indices, scales } = self.clone();
            let codebook = Codebook { bits, axis, group_size, vector_length, palettes, scales };
            CompressedWeight::palettized(shape, keep.as_deref(), codebook, &indices)
        }

        /// The definition, an element at a time.
        fn value(&self, element: usize) -> f16 {
            let inner: usize = self.shape[2..].iter().map(|n| *n as usize).product();
            let columns = self.shape[1] as usize * inner;
            let row = element / columns;
            let vector = row / self.vector_length * columns + element % columns;
            if self.keep.as_ref().is_some_and(|keep| !keep[vector]) {
                return f16::ZERO;
            }
            let group = if self.axis == 0 { row } else { element / inner % self.shape[1] as usize } / self.group_size;
            let entry = group * self.bits.entries() + usize::from(self.indices[vector]);
            let entry = self.palettes[entry * self.vector_length + row % self.vector_length];
            match &self.scales {
                None => entry,
                Some(Scales { values, block }) => {
                    let (block, in_row) = block.map_or((columns, 1), |block| (block, columns.div_ceil(block)));
                    let scale = values[row * in_row + element % columns / block];
                    f16::from_f64(entry.to_f64() * scale.to_f64())
                }
            }
        }
    }

    fn halves(count: usize) -> impl Strategy<Value = Vec<f16>> {
        prop::collection::vec((-100f32..100.0).prop_map(f16::from_f32), count)
    }

    fn parts() -> impl Strategy<Value = Parts> {
        let sizes = (1..4usize, 1..4usize, 1..4usize, 1..4usize, prop::option::of((1..4i64, 1..4i64)));
        let vectors = prop::sample::select(vec![1, 1, 2, 3, 4, 16]);
        (sizes, prop::sample::select(&BitWidth::ALL[..]), 0..2usize, any::<[bool; 2]>(), vectors)
            .prop_flat_map(|((groups, group_size, others, more, kernel), bits, axis, [masked, scaled], vector_length)| {
                // Vectors lie along the output channels and have no scales.
                let (axis, scaled) = if vector_length > 1 { (0, false) } else { (axis, scaled) };
                let group_size = group_size * vector_length;
                let (grouped, other) = (groups * group_size, others * more);
                let mut shape = if axis == 0 { vec![grouped as i64, other as i64] } else { vec![other as i64, grouped as i64] };
                shape.extend(kernel.into_iter().flat_map(|(height, width)| [height, width]));
                let count = shape.iter().product::<i64>() as usize / vector_length;
                let indices = prop::collection::vec(any::<u8>().prop_map(move |index| index & bits.max_index()), count);
                let keep = prop::collection::vec(any::<bool>(), count).prop_map(move |keep| masked.then_some(keep));
                let (outputs, columns) = (shape[0] as usize, shape[1..].iter().product::<i64>() as usize);
                let scales = (1..=columns).prop_flat_map(move |block| {
                    let block = Some(block).filter(|block| *block < columns);
                    let count = outputs * Scales::in_row(block, columns).unwrap();
                    halves(count).prop_map(move |values| scaled.then_some(Scales { values, block }))
                });
                let palettes = halves(groups * bits.entries() * vector_length);
                (Just((shape, bits, axis, group_size, vector_length)), palettes, indices, keep, scales)
            })
            .prop_map(|((shape, bits, axis, group_size, vector_length), palettes, indices, keep, scales)| Parts {
                shape,
                keep,
                bits,
                axis,
                group_size,
                vector_length,
                palettes,
                indices,
                scales,
            })
    }

    /// NaN-free bits, in which -0 and +0 differ.
    fn bits(values: &[f16]) -> Vec<u16> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn decoding_follows_the_definition(parts in parts()) {
            let weight = parts.build().unwrap();
            let count = parts.indices.len();
            let numel = count * parts.vector_length;
            let expected: Vec<f16> = (0..numel).map(|element| parts.value(element)).collect();
            prop_assert_eq!(bits(&weight.decode().unwrap()), bits(&expected));
            let indices = parts.keep.as_ref().map_or(count, |keep| keep.iter().filter(|kept| **kept).count());
            let mask = if parts.keep.is_some() { count.div_ceil(8) } else { 0 };
            let scales = parts.scales.as_ref().map_or(0, |scales| scales.values.len());
            let bytes = mask + (indices * usize::from(parts.bits.bits())).div_ceil(8) + 2 * (parts.palettes.len() + scales);
            let kept = indices * parts.vector_length;
            prop_assert_eq!(weight.stored_bytes(), bytes as u64);
            prop_assert_eq!((weight.kept(), weight.vector_length()), (kept, parts.vector_length));
            prop_assert!((weight.sparsity() - (1.0 - kept as f64 / numel as f64)).abs() < 1e-12);
            prop_assert!((weight.bits_per_weight() - 8.0 * bytes as f64 / numel as f64).abs() < 1e-12);
        }

        #[test]
        fn a_pruned_weight_comes_back(values in halves(60), keep in prop::collection::vec(any::<bool>(), 60)) {
            let weight = CompressedWeight::sparse(vec![5, 3, 2, 2], &keep, &values).unwrap();
            let expected: Vec<f16> = values.iter().zip(&keep).map(|(value, kept)| if *kept { *value } else { f16::ZERO }).collect();
            prop_assert_eq!(bits(&weight.decode().unwrap()), bits(&expected));
            prop_assert_eq!(weight.stored_bytes(), 8 + 2 * weight.kept() as u64);
        }

        #[test]
        fn parts_that_disagree_are_refused(parts in parts(), which in 0..13) {
            let mut wrong = parts.clone();
            match which {
                0 => wrong.palettes.push(f16::ONE),
                1 => wrong.indices.push(0),
                2 => wrong.keep = Some(vec![true; parts.indices.len() + 1]),
                3 => wrong.scales = Some(vec![f16::ONE; parts.shape[0] as usize + 1].into()),
                4 => wrong.group_size = parts.shape[parts.axis] as usize + 1,
                5 => wrong.axis = 2,
                6 => wrong.palettes[0] = f16::NAN,
                7 => wrong.vector_length = 0,
                8 => wrong.vector_length = 17 * parts.vector_length,
                9 => wrong.vector_length += 1,
                10 => (wrong.vector_length, wrong.scales) = (2, Some(vec![f16::ONE; parts.shape[0] as usize].into())),
                11 => {
                    let columns = parts.shape[1..].iter().product::<i64>() as usize;
                    wrong.scales = Some(Scales { values: vec![f16::ONE; parts.shape[0] as usize], block: Some(columns) });
                }
                _ => wrong.shape.push(2),
            }
            prop_assert!(wrong.build().is_err());
            // Weights that are damaged through their public fields are refused too.
            let mut weight = parts.build().unwrap();
            if let Values::Palettized { codebook, .. } = &mut weight.values {
                codebook.palettes.pop();
            }
            prop_assert!(weight.decode().is_err());
        }
    }

    /// More than one block, so that the mask's counts between blocks matter, on any number of
    /// threads.
    #[test]
    fn blocks_decode_to_what_the_whole_weight_is() {
        let (rows, columns) = (517, 389);
        let random = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        for (axis, group_size) in [(0, 47), (1, 389)] {
            let groups = if axis == 0 { rows / group_size } else { columns / group_size };
            let parts = Parts {
                shape: vec![rows as i64, columns as i64],
                keep: Some((0..rows * columns).map(|i| random(i) % 5 > 1).collect()),
                bits: BitWidth::Three,
                axis,
                group_size,
                vector_length: 1,
                palettes: (0..groups << 3).map(|i| f16::from_f32(i as f32 / 7.0 - 3.0)).collect(),
                indices: (0..rows * columns).map(|i| (random(i) >> 8) as u8 & 7).collect(),
                // In blocks of 64, the last of which has 5 columns; then one a row.
                scales: Some(match axis {
                    0 => {
                        Scales { values: (0..rows * 7).map(|i| f16::from_f32(1.0 + i as f32 / 100.0)).collect(), block: Some(64) }
                    }
                    _ => (0..rows).map(|i| f16::from_f32(1.0 + i as f32 / 100.0)).collect::<Vec<_>>().into(),
                }),
            };
            let expected: Vec<f16> = (0..rows * columns).map(|element| parts.value(element)).collect();
            let weight = parts.build().unwrap();
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert_eq!(bits(&pool.install(|| weight.decode()).unwrap()), bits(&expected));
            }
        }
    }

    /// Rows of vectors that begin within a byte of the mask, on any number of threads.
    #[test]
    fn vectors_decode_to_what_the_definition_says_on_any_number_of_threads() {
        let (rows, columns) = (516, 389);
        let random = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        for (vector_length, width, group_size) in [(2, BitWidth::Six, 258), (4, BitWidth::Eight, 12), (3, BitWidth::Three, 516)] {
            let count = rows * columns / vector_length;
            let parts = |keep| Parts {
                shape: vec![rows as i64, columns as i64],
                keep,
                bits: width,
                axis: 0,
                group_size,
                vector_length,
                palettes: (0..rows / group_size * width.entries() * vector_length)
                    .map(|i| f16::from_f32(i as f32 / 7.0))
                    .collect(),
                indices: (0..count).map(|i| (random(i) >> 8) as u8 & width.max_index()).collect(),
                scales: None,
            };
            for keep in [None, Some((0..count).map(|i| random(i) % 5 > 1).collect())] {
                let parts = parts(keep);
                let expected: Vec<f16> = (0..rows * columns).map(|element| parts.value(element)).collect();
                let weight = parts.build().unwrap();
                for threads in [1, 2, 5] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    assert_eq!(bits(&pool.install(|| weight.decode()).unwrap()), bits(&expected));
                }
            }
        }
    }

    #[test]
    fn weights_at_the_limits_decode_or_are_refused() {
        // Nothing kept; a product beyond fp16; shapes that are none.
        let keep = [false; 4];
        let codebook = |group_size, value, scales| Codebook {
            bits: BitWidth::One,
            axis: 0,
            group_size,
            vector_length: 1,
            palettes: vec![value; 2],
            scales,
        };
        let none = CompressedWeight::palettized(vec![2, 2], Some(&keep), codebook(2, f16::ONE, None), &[1; 4]).unwrap();
        assert_eq!((none.decode().unwrap(), none.sparsity(), none.stored_bytes()), (vec![f16::ZERO; 4], 1.0, 5));
        let vectors = Codebook { vector_length: 2, palettes: vec![f16::ONE; 4], ..codebook(2, f16::ONE, None) };
        let along_inputs = Codebook { axis: 1, ..vectors.clone() };
        let pruned = CompressedWeight::palettized(vec![2, 2], Some(&[false; 2]), vectors, &[1; 2]).unwrap();
        assert_eq!((pruned.decode().unwrap(), pruned.sparsity(), pruned.stored_bytes()), (vec![f16::ZERO; 4], 1.0, 9));
        let refused = CompressedWeight::palettized(vec![2, 2], None, along_inputs, &[1; 2]).unwrap_err().to_string();
        assert!(refused.contains("vectors lie along axis 0"), "{refused}");
        let large = |scale| {
            let scales = Some(vec![f16::from_f32(scale)].into());
            CompressedWeight::palettized(vec![1, 1], None, codebook(1, f16::MAX, scales), &[1]).unwrap().decode()
        };
        assert!(matches!(large(2.0), Err(Error::NotFinite(_))));
        assert_eq!(large(-1.0).unwrap(), [f16::MIN]);
        for shape in [vec![], vec![0, 4], vec![-2, -2], vec![1 << 40, 1 << 40], vec![i64::MAX], vec![1 << 62]] {
            let weight = CompressedWeight { shape, mask: None, values: Values::Plain(Vec::new()) };
            assert!(weight.decode().is_err(), "{weight:?}");
        }
        for bits in [0, 5, 7, 16] {
            assert!(BitWidth::try_from(bits).is_err());
        }
    }
}
