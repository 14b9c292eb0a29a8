//! Quantization to fixed values with a scale for each block: the common 4-bit formats of others.

use half::f16;

use super::BitWidth;

/// The values that a weight may have, up to the scale of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// Whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1.
    Int,
    /// The 16 values of NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): quantiles of a normal
    /// distribution.
    Nf4,
}

/// bitsandbytes' table (`get_4bit_type("nf4")` in `bitsandbytes/functional.py`).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

impl Grid {
    /// The name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Grid::Int => "int",
            Grid::Nf4 => "nf4",
        }
    }

    /// The values in fp16, ascending: the palette of every weight. Whole numbers of 4 or 8 bits,
    /// NF4 of 4.
    ///
    /// # Errors
    /// A sentence about the width, if there is no such grid.
    pub fn entries(self, bits: BitWidth) -> Result<Vec<f16>, String> {
        match (self, bits) {
            (Grid::Int, BitWidth::Four | BitWidth::Eight) => {
                let half = 1_i16 << (bits.bits() - 1);
                Ok((-half..half).map(|number| f16::from_f32(f32::from(number))).collect())
            }
            (Grid::Nf4, BitWidth::Four) => Ok(NF4.map(f16::from_f32).to_vec()),
            (Grid::Int, BitWidth::One | BitWidth::Two | BitWidth::Three | BitWidth::Six) => {
                Err(format!("`values: int` has 4 or 8 bits, not {bits}"))
            }
            (Grid::Nf4, BitWidth::One | BitWidth::Two | BitWidth::Three | BitWidth::Six | BitWidth::Eight) => {
                Err(format!("`values: nf4` has 4 bits, not {bits}"))
            }
        }
    }

    /// The number that the largest magnitude of a block is scaled to.
    ///
    /// Of whole numbers it is half of the range, 7.5 for 4 bits: so scale torchao
    /// (`MappingType.SYMMETRIC`) and GPTQ (`sym=True`). Of NF4 it is 1.
    #[must_use]
    pub fn reach(self, bits: BitWidth) -> f32 {
        match self {
            Grid::Int => f32::from(bits.max_index()) / 2.0,
            Grid::Nf4 => 1.0,
        }
    }
}

/// A palette of fixed values in the place of one that is fitted, and a scale for each block of
/// columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantizer {
    /// The palette.
    pub grid: Grid,
    /// The number of columns that share a scale, at least 1. Rows that are no longer have one scale
    /// each.
    pub block_size: usize,
    /// Whether each column's error is fed back to the columns after it, by the Hessian (GPTQ);
    /// otherwise each weight gets the nearest value.
    pub feedback: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_ascend_and_hold_zero() {
        for (grid, bits) in [(Grid::Int, BitWidth::Four), (Grid::Int, BitWidth::Eight), (Grid::Nf4, BitWidth::Four)] {
            let entries = grid.entries(bits).unwrap();
            assert_eq!(entries.len(), bits.entries());
            assert!(entries.windows(2).all(|pair| pair[0] < pair[1]) && entries.contains(&f16::ZERO), "{grid:?}");
        }
        assert_eq!((Grid::Int.reach(BitWidth::Four), Grid::Int.reach(BitWidth::Eight)), (7.5, 127.5));
        assert!(Grid::Int.entries(BitWidth::Six).unwrap_err().contains("4 or 8 bits, not 6"));
        assert!(Grid::Nf4.entries(BitWidth::Eight).unwrap_err().contains("4 bits, not 8"));
    }
}
