//! Palettes in fp32, and which of their entries each weight has.

use half::f16;
use rayon::prelude::*;

use crate::codebook::Codebook;

/// The palettes of groups of rows, and indices into them.
#[derive(Debug, Clone)]
pub(super) struct Levels {
    /// 2^bits.
    pub entries: usize,
    /// Rows that share a palette.
    pub group_rows: usize,
    /// [groups, entries], each ascending, fp16 numbers.
    values: Vec<f32>,
    /// [groups, entries - 1]: half way between neighbours.
    middles: Vec<f32>,
    /// [o, d]; of pruned elements 0, without meaning.
    pub indices: Vec<u8>,
}

/// One group's palette.
#[derive(Debug, Clone, Copy)]
pub(super) struct Palette<'a> {
    /// Its entries, ascending.
    pub values: &'a [f32],
    middles: &'a [f32],
}

impl Palette<'_> {
    /// The nearest entry; of two as near, the lower.
    pub fn nearest(&self, value: f32) -> u8 {
        // At most 256 entries.
        if self.middles.len() < 32 {
            self.middles.iter().map(|middle| u8::from(*middle < value)).sum()
        } else {
            self.middles.partition_point(|middle| *middle < value) as u8
        }
    }
}

impl Levels {
    /// Of a codebook along output channels, whose palettes are ascending.
    pub fn new(codebook: &Codebook, indices: Vec<u8>) -> Self {
        let (entries, group_rows) = (codebook.bits.entries(), codebook.group_size);
        let mut levels = Levels { entries, group_rows, values: Vec::new(), middles: Vec::new(), indices };
        levels.set(codebook.palettes.iter().map(|value| value.to_f32()).collect());
        levels
    }

    fn set(&mut self, values: Vec<f32>) {
        let middles = |palette: &[f32]| palette.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect::<Vec<_>>();
        self.middles = values.chunks(self.entries).flat_map(middles).collect();
        self.values = values;
    }

    /// How many palettes there are.
    pub fn groups(&self) -> usize {
        self.values.len() / self.entries
    }

    /// All entries.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The entries as they are stored.
    pub fn palettes(&self) -> Vec<f16> {
        self.values.iter().map(|value| f16::from_f32(*value)).collect()
    }

    /// The palette of a row.
    pub fn of_row(&self, row: usize) -> Palette<'_> {
        let group = row / self.group_rows;
        let between = self.entries - 1;
        Palette {
            values: &self.values[group * self.entries..(group + 1) * self.entries],
            middles: &self.middles[group * between..(group + 1) * between],
        }
    }

    /// The value of element `at` of a weight with `columns` columns, if it is kept.
    pub fn value(&self, at: usize, columns: usize) -> f32 {
        let group = at / columns / self.group_rows;
        self.values[group * self.entries + usize::from(self.indices[at])]
    }

    /// Takes other entries and puts each palette in ascending order again.
    pub fn replace(&mut self, mut values: Vec<f32>, columns: usize) {
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
