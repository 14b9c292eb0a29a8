//! Palettes in fp32, laid out for the search of the nearest entry, and the index of each weight or
//! vector: the form in which the solver works on a codebook.

use half::f16;
use rayon::prelude::*;
use squeeze_codebook::Codebook;

use crate::palette::VectorTable;

/// The palettes of groups of rows, and the indices into them. Palettes of single values are sorted.
#[derive(Debug, Clone)]
pub(super) struct SortedCodebook {
    /// 2^bits.
    pub entries: usize,
    /// V, the rows whose weights share an index.
    pub vector_length: usize,
    /// The number of rows that share a palette.
    pub group_rows: usize,
    /// The palettes, [groups, entries, V]; single values ascend. The values are fp16 numbers.
    values: Vec<f32>,
    search: Search,
    /// The indices [o / V, d]; meaningless zeros for pruned elements.
    pub indices: Vec<u8>,
}

/// The tables for the search of the nearest entry, one for each group.
#[derive(Debug, Clone)]
enum Search {
    /// For single values: the midpoints of neighbouring entries, [groups, entries - 1].
    Middles(Vec<f32>),
    Pairs(Vec<VectorTable<2>>),
    Fours(Vec<VectorTable<4>>),
}

/// One group's palette.
#[derive(Debug, Clone, Copy)]
pub(super) enum Palette<'a> {
    Scalars(Scalars<'a>),
    Pairs(&'a VectorTable<2>),
    Fours(&'a VectorTable<4>),
}

/// The palettes of all groups.
#[derive(Debug)]
pub(super) enum Tables<'a> {
    Scalars(Vec<Scalars<'a>>),
    Pairs(&'a [VectorTable<2>]),
    Fours(&'a [VectorTable<4>]),
}

/// A palette whose entries are vectors of V values.
pub(super) trait Entries<const V: usize> {
    /// The index of the entry c of least c A c + 2 c b, for a positive definite A.
    fn least(&self, a: &[[f32; V]; V], b: &[f32; V]) -> u8;
    /// The index of the nearest entry; the lowest of equally near ones.
    fn nearest(&self, x: [f32; V]) -> u8;
    /// The entry of an index.
    fn entry(&self, index: u8) -> [f32; V];
}

impl<const V: usize> Entries<V> for VectorTable<V> {
    #[inline(always)]
    fn least(&self, a: &[[f32; V]; V], b: &[f32; V]) -> u8 {
        VectorTable::least(self, a, b)
    }

    #[inline(always)]
    fn nearest(&self, x: [f32; V]) -> u8 {
        VectorTable::nearest(self, x)
    }

    #[inline(always)]
    fn entry(&self, index: u8) -> [f32; V] {
        self.vector(index)
    }
}

/// A palette of single values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalars<'a> {
    /// The entries, ascending.
    pub values: &'a [f32],
    middles: &'a [f32],
}

impl Entries<1> for Scalars<'_> {
    #[inline(always)]
    fn least(&self, [[a]]: &[[f32; 1]; 1], [b]: &[f32; 1]) -> u8 {
        self.nearest([-b / a])
    }

    #[inline(always)]
    fn nearest(&self, [value]: [f32; 1]) -> u8 {
        // An index fits in u8, because a palette has at most 256 entries.
        if self.middles.len() < 32 {
            self.middles.iter().map(|middle| u8::from(*middle < value)).sum()
        } else {
            self.middles.partition_point(|middle| *middle < value) as u8
        }
    }

    #[inline(always)]
    fn entry(&self, index: u8) -> [f32; 1] {
        [self.values[usize::from(index)]]
    }
}

impl SortedCodebook {
    /// The working form of a codebook along output channels. Palettes of single values must be
    /// ascending, and vectors have 2 or 4 values: those that the palettizer makes.
    pub(super) fn new(codebook: &Codebook, indices: Vec<u8>) -> Self {
        let Codebook { bits, group_size, vector_length, palettes, .. } = codebook;
        let values: Vec<f32> = palettes.iter().map(|value| value.to_f32()).collect();
        let (entries, vector_length) = (bits.entries(), *vector_length);
        let search = Search::of(&values, entries, vector_length);
        SortedCodebook { entries, vector_length, group_rows: *group_size, values, search, indices }
    }

    fn set(&mut self, values: Vec<f32>) {
        self.search = Search::of(&values, self.entries, self.vector_length);
        self.values = values;
    }

    /// The number of values in a palette.
    pub(super) fn palette_length(&self) -> usize {
        self.entries * self.vector_length
    }

    /// The number of palettes.
    pub(super) fn groups(&self) -> usize {
        self.values.len() / self.palette_length()
    }

    /// The values of all palettes.
    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// The palettes as a codebook stores them.
    pub(super) fn palettes(&self) -> Vec<f16> {
        self.values.iter().map(|value| f16::from_f32(*value)).collect()
    }

    /// A group's palette of single values, given the midpoints of all groups.
    fn scalars<'a>(&'a self, middles: &'a [f32], group: usize) -> Scalars<'a> {
        let (entries, between) = (self.entries, self.entries - 1);
        Scalars {
            values: &self.values[group * entries..(group + 1) * entries],
            middles: &middles[group * between..(group + 1) * between],
        }
    }

    /// The palettes of all groups.
    pub(super) fn tables(&self) -> Tables<'_> {
        match &self.search {
            Search::Middles(middles) => Tables::Scalars((0..self.groups()).map(|group| self.scalars(middles, group)).collect()),
            Search::Pairs(tables) => Tables::Pairs(tables),
            Search::Fours(tables) => Tables::Fours(tables),
        }
    }

    /// The palette of a row.
    pub(super) fn of_row(&self, row: usize) -> Palette<'_> {
        let group = row / self.group_rows;
        match &self.search {
            Search::Middles(middles) => Palette::Scalars(self.scalars(middles, group)),
            Search::Pairs(tables) => Palette::Pairs(&tables[group]),
            Search::Fours(tables) => Palette::Fours(&tables[group]),
        }
    }

    /// The place in its palette of the value of element `at` of a weight with `columns` columns.
    pub(super) fn place(&self, at: usize, columns: usize) -> usize {
        match self.vector_length {
            1 => usize::from(self.indices[at]),
            length => {
                let (row, column) = (at / columns, at % columns);
                usize::from(self.indices[row / length * columns + column]) * length + row % length
            }
        }
    }

    /// The value of element `at` of a weight with `columns` columns, if it is kept.
    pub(super) fn value(&self, at: usize, columns: usize) -> f32 {
        let group = at / columns / self.group_rows;
        self.values[group * self.palette_length() + self.place(at, columns)]
    }

    /// Replaces all values, and sorts each palette of single values again.
    pub(super) fn replace(&mut self, mut values: Vec<f32>, columns: usize) {
        if self.vector_length > 1 {
            self.set(values);
            return;
        }
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

impl Search {
    /// The tables of palettes [groups, entries, V].
    fn of(values: &[f32], entries: usize, vector_length: usize) -> Self {
        let middles = |palette: &[f32]| palette.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect::<Vec<_>>();
        match vector_length {
            2 => Search::Pairs(tables(values, entries)),
            4 => Search::Fours(tables(values, entries)),
            _ => Search::Middles(values.chunks(entries).flat_map(middles).collect()),
        }
    }
}

fn tables<const V: usize>(values: &[f32], entries: usize) -> Vec<VectorTable<V>> {
    values.as_chunks::<V>().0.chunks(entries).map(VectorTable::new).collect()
}
