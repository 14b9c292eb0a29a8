//! The positions of the weights of a group.

use std::ops::Range;

use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Grouping, PaletteOptions};

/// A weight [o, i, ...] cut into groups of channels of one axis.
///
/// The weights of a group are `rows` runs of `run` neighbours: a single run for groups of output
/// channels, one run per output channel for groups of input channels. A group of input channels has
/// the weights of some columns of coremltools' `(o * kh * kw, i)` matrix, in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub axis: usize,
    pub group_size: usize,
    pub groups: usize,
    rows: usize,
    run: usize,
}

/// The number of weights of shape [o, i, ...], and the number per output channel.
pub(super) fn sizes(name: &str, shape: &[usize]) -> Result<(usize, usize)> {
    let refuse = || {
        let found: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        Error::shape(format!("`{name}`"), found, "a weight of two or more dimensions, none of them 0,")
    };
    let &outputs = shape.first().ok_or_else(refuse)?;
    let count = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size)).ok_or_else(refuse)?;
    if shape.len() < 2 || count == 0 { Err(refuse()) } else { Ok((count, count / outputs)) }
}

impl Layout {
    /// The groups that `options` specify.
    ///
    /// # Errors
    /// [`Error::Shape`] for a shape of fewer than two dimensions or without weights,
    /// [`Error::Range`] for a group size of 0 and an axis above 1, [`Error::Argument`] for a group
    /// size that does not divide the channels. The message has `name`.
    pub(super) fn new(name: &str, shape: &[usize], options: &PaletteOptions) -> Result<Layout> {
        let (count, row) = sizes(name, shape)?;
        let (axis, group_size) = match options.grouping {
            Grouping::PerTensor => (0, shape[0]),
            Grouping::PerGroupedChannel { group_size } => (options.axis, group_size),
        };
        if group_size == 0 {
            return Err(Error::range(format!("`{name}`: group_size"), group_size, "at least 1"));
        }
        let side = match axis {
            0 => "output",
            1 => "input",
            _ => {
                let expected = "0 (output channels) or 1 (input channels)";
                return Err(Error::range(format!("`{name}`: channel_axis"), axis, expected));
            }
        };
        let channels = shape[axis];
        if !channels.is_multiple_of(group_size) {
            let problem = format!("`{name}`: group_size {group_size} does not divide the {channels} {side} channels");
            return Err(Error::Argument(problem));
        }
        let groups = channels / group_size;
        let (rows, run) = if axis == 0 { (1, count / groups) } else { (count / row, row / groups) };
        Ok(Layout { axis, group_size, groups, rows, run })
    }

    /// The number of weights in a group.
    pub(super) fn group_len(&self) -> usize {
        self.rows * self.run
    }

    /// Whether every group is one run, each after the one before it.
    pub(super) fn is_contiguous(&self) -> bool {
        self.rows == 1
    }

    /// The runs of a group in the row-major weight, in order.
    pub(super) fn runs(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let Layout { groups, run, .. } = *self;
        (0..self.rows).map(move |row| (row * groups + group) * run).map(move |begin| begin..begin + run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_out_every_weight_once() {
        for (shape, axis, size) in [(vec![6, 4], 0, 2), (vec![6, 4], 1, 2), (vec![4, 6, 3, 2], 0, 4), (vec![4, 6, 3, 2], 1, 3)] {
            let grouping = Grouping::PerGroupedChannel { group_size: size };
            let layout = Layout::new("a", &shape, &PaletteOptions { grouping, axis, ..PaletteOptions::default() }).unwrap();
            let inner: usize = shape[axis + 1..].iter().product();
            let mut group_of = vec![None; shape.iter().product()];
            for group in 0..layout.groups {
                let all = layout.runs(group).flatten().inspect(|&at| assert_eq!(group_of[at].replace(group), None));
                assert_eq!(all.count(), layout.group_len());
            }
            for (at, group) in group_of.iter().enumerate() {
                assert_eq!(*group, Some(at / inner % shape[axis] / size), "{shape:?} {axis} {at}");
            }
        }
    }
}
