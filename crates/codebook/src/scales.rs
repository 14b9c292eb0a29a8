//! Factors by which palette entries are multiplied.

use half::f16;

/// The factors of a weight [o, i, ...] whose palette entries are multiplied: one for each output
/// channel, or one for each block of columns in it.
///
/// The columns are those of the weight flattened to [o, d], as GPTQ cuts them. bitsandbytes cuts
/// the whole weight, so that its blocks are the same ones where the block divides d.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    /// [o, blocks], row-major.
    pub values: Vec<f16>,
    /// The number of columns in a block, below d; the last block of a row may have fewer. `None`
    /// is one scale for each output channel.
    pub block: Option<usize>,
}

impl From<Vec<f16>> for Scales {
    /// One scale for each output channel.
    fn from(values: Vec<f16>) -> Self {
        Scales { values, block: None }
    }
}

impl FromIterator<f16> for Scales {
    /// One scale for each output channel.
    fn from_iter<I: IntoIterator<Item = f16>>(scales: I) -> Self {
        Vec::from_iter(scales).into()
    }
}

impl Scales {
    /// The number of scales in a row of this many columns.
    ///
    /// # Errors
    /// If the row has no blocks of this size: they are empty, or a block is the whole row, whose
    /// scale has no block.
    pub fn in_row(block: Option<usize>, columns: usize) -> Result<usize, String> {
        match block {
            None => Ok(1),
            Some(block) if (1..columns).contains(&block) => Ok(columns.div_ceil(block)),
            Some(block) => Err(format!("blocks of {block} columns do not cut rows of {columns}")),
        }
    }

    /// The number of neighbouring columns from `column` on that share a scale.
    #[must_use]
    pub fn rest(&self, column: usize, columns: usize) -> usize {
        let rest = columns - column;
        self.block.map_or(rest, |block| rest.min(block - column % block))
    }

    /// The scale of an element in a row of this many columns.
    #[must_use]
    pub fn at(&self, row: usize, column: usize, columns: usize) -> f16 {
        match self.block {
            None => self.values[row],
            Some(block) => self.values[row * columns.div_ceil(block) + column / block],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_of_a_row_may_be_shorter() {
        let values = (0..6).map(|at| f16::from_f32(at as f32)).collect();
        let scales = Scales { values, block: Some(4) };
        let at = |row, column| scales.at(row, column, 10).to_f32();
        assert_eq!((at(0, 0), at(0, 3), at(0, 4), at(0, 9), at(1, 0), at(1, 9)), (0.0, 0.0, 1.0, 2.0, 3.0, 5.0));
        assert_eq!([0, 3, 4, 8, 9].map(|column| scales.rest(column, 10)), [4, 1, 4, 2, 1]);
        let rows = Scales::from(scales.values.clone());
        assert_eq!((rows.at(5, 9, 10).to_f32(), rows.rest(3, 10)), (5.0, 7));
        assert_eq!([None, Some(4), Some(9), Some(1)].map(|block| Scales::in_row(block, 10)), [Ok(1), Ok(3), Ok(2), Ok(10)]);
        for block in [0, 10, usize::MAX] {
            assert!(Scales::in_row(Some(block), 10).unwrap_err().contains("do not cut rows of 10"));
        }
    }
}
