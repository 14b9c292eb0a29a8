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
    let refuse = || Error::Argument(format!("`{name}`: a weight of shape {shape:?} cannot be palettized"));
    let &outputs = shape.first().ok_or_else(refuse)?;
    let count = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size)).ok_or_else(refuse)?;
    if shape.len() < 2 || count == 0 { Err(refuse()) } else { Ok((count, count / outputs)) }
}

impl Layout {
    /// The groups that `options` specify.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape of fewer than two dimensions or without weights, for a group
    /// size that is 0 or does not divide the channels, and for an axis above 1. The message has
    /// `name`.
    pub(super) fn new(name: &str, shape: &[usize], options: &PaletteOptions) -> Result<Layout> {
        let (count, row) = sizes(name, shape)?;
        let refuse = |problem: String| Err(Error::Argument(format!("`{name}`: {problem}")));
        let (axis, group_size) = match options.grouping {
            Grouping::PerTensor => (0, shape[0]),
            Grouping::PerGroupedChannel { group_size } => (options.axis, group_size),
        };
        if group_size == 0 {
            return refuse("group_size is 0; it must be at least 1".into());
        }
        let side = match axis {
            0 => "output",
            1 => "input",
            _ => return refuse(format!("channel_axis is {axis}; it can be 0 (output channels) or 1 (input channels)")),
        };
        let channels = shape[axis];
        if !channels.is_multiple_of(group_size) {
            return refuse(format!("group_size {group_size} does not divide the {channels} {side} channels"));
        }
        let groups = channels / group_size;
        let (rows, run) = if axis == 0 { (1, count / groups) } else { (count / row, row / groups) };
        Ok(Layout { axis, group_size, groups, rows, run })
    }

    /// The number of weights in a group.
    pub(super) fn group_len(&self) -> usize {
        self.rows * self.run
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
