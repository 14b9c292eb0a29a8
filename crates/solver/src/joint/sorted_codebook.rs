//! Sorted palettes in fp32, and the index of each weight: the form in which the solver works on a
//! codebook.

use half::f16;
use rayon::prelude::*;
use squeeze_codebook::Codebook;

/// The palettes of groups of rows, sorted for the search of the nearest entry, and the indices into
/// them.
#[derive(Debug, Clone)]
pub(super) struct SortedCodebook {
    /// 2^bits.
    pub entries: usize,
    /// The number of rows that share a palette.
    pub group_rows: usize,
    /// The palettes, [groups, entries], each ascending; the values are fp16 numbers.
    values: Vec<f32>,
    /// The midpoints of neighbouring entries, [groups, entries - 1].
    middles: Vec<f32>,
    /// The indices [o, d]; meaningless zeros for pruned elements.
    pub indices: Vec<u8>,
}

/// One group's palette.
#[derive(Debug, Clone, Copy)]
pub(super) struct Palette<'a> {
    /// The entries, ascending.
    pub values: &'a [f32],
    middles: &'a [f32],
}

impl Palette<'_> {
    /// The index of the nearest entry; the lower of two equally near ones.
    pub(super) fn nearest(&self, value: f32) -> u8 {
        // An index fits in u8, because a palette has at most 256 entries.
        if self.middles.len() < 32 {
            self.middles.iter().map(|middle| u8::from(*middle < value)).sum()
        } else {
            self.middles.partition_point(|middle| *middle < value) as u8
        }
    }
}

impl SortedCodebook {
    /// The sorted form of a codebook along output channels, whose palettes are ascending.
    pub(super) fn new(codebook: &Codebook, indices: Vec<u8>) -> Self {
        let (entries, group_rows) = (codebook.bits.entries(), codebook.group_size);
        let mut sorted = SortedCodebook { entries, group_rows, values: Vec::new(), middles: Vec::new(), indices };
        sorted.set(codebook.palettes.iter().map(|value| value.to_f32()).collect());
        sorted
    }

    fn set(&mut self, values: Vec<f32>) {
        let middles = |palette: &[f32]| palette.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect::<Vec<_>>();
        self.middles = values.chunks(self.entries).flat_map(middles).collect();
        self.values = values;
    }

    /// The number of palettes.
    pub(super) fn groups(&self) -> usize {
        self.values.len() / self.entries
    }

    /// The entries of all palettes.
    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// The palettes as a codebook stores them.
    pub(super) fn palettes(&self) -> Vec<f16> {
        self.values.iter().map(|value| f16::from_f32(*value)).collect()
    }

    /// The palette of a row.
    pub(super) fn of_row(&self, row: usize) -> Palette<'_> {
        let group = row / self.group_rows;
        let between = self.entries - 1;
        Palette {
            values: &self.values[group * self.entries..(group + 1) * self.entries],
            middles: &self.middles[group * between..(group + 1) * between],
        }
    }

    /// The value of element `at` of a weight with `columns` columns, if it is kept.
    pub(super) fn value(&self, at: usize, columns: usize) -> f32 {
        let group = at / columns / self.group_rows;
        self.values[group * self.entries + usize::from(self.indices[at])]
    }

    /// Replaces all entries, and sorts each palette again.
    pub(super) fn replace(&mut self, mut values: Vec<f32>, columns: usize) {
        let (entries, group) = (self.entries, self.group_rows * columns);
        values.par_chunks_mut(entries).zip(self.indices.par_chunks_mut(group)).for_each(|(values, indices)| {
            if values.is_sorted() {
                return;
            }
            let mut order: Vec<usize> = (0..entries).collect();
            order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
            let mut place = [0_u8; 256];
            let sorted: Vec<f32> = order.iter().map(|entry| values[*entry]).collect();
            for (new, old) in order.iter().enumerate() {
                place[*old] = new as u8;
            }
            values.copy_from_slice(&sorted);
            indices.iter_mut().for_each(|index| *index = place[usize::from(*index)]);
        });
        self.set(values);
    }
}
