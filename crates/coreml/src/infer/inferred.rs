//! Types that are inferred, and the axes of the arrays that they describe.

use super::super::element::ArrayType;

/// The types of an operation's outputs, or the reason for which its operands do not fit together.
pub(super) type Inferred = Result<Vec<ArrayType>, String>;

/// A possibly negative axis of an array.
pub(super) fn axis(axis: i32, rank: usize) -> Result<usize, String> {
    let from_end = i64::from(axis) + if axis < 0 { rank as i64 } else { 0 };
    usize::try_from(from_end).ok().filter(|axis| *axis < rank).ok_or_else(|| format!("there is no axis {axis} in rank {rank}"))
}

/// The sizes of an array of four dimensions.
pub(super) fn rank4(shape: &[u64]) -> Result<[u64; 4], String> {
    shape.try_into().map_err(|_| format!("{shape:?} where four dimensions are needed"))
}
