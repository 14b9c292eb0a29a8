//! Where the weights of a group lie.

use std::ops::Range;

use super::options::{Granularity, OnMisfit, PaletteOptions};
use crate::error::{Error, Result};

/// A weight [o, i, ...] cut into groups of channels of one axis.
///
/// A group's weights are `rows` runs of `run` neighbours: one run for groups of output channels, one run an output channel
/// for groups of input channels. The latter are the columns of coremltools' `(o * kh * kw, i)` matrix, in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub axis: usize,
    pub group_size: usize,
    pub groups: usize,
    rows: usize,
    run: usize,
}

/// Weights of shape [o, i, ...]: how many there are, and how many an output channel has.
pub(super) fn sizes(name: &str, shape: &[usize]) -> Result<(usize, usize)> {
    let refuse = || Error::Argument(format!("`{name}`: a weight of shape {shape:?} cannot be palettized"));
    let &outputs = shape.first().ok_or_else(refuse)?;
    let count = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size)).ok_or_else(refuse)?;
    if shape.len() < 2 || count == 0 { Err(refuse()) } else { Ok((count, count / outputs)) }
}

impl Layout {
    /// Of groups as large as a divisor of the channels.
    pub fn new(name: &str, shape: &[usize], axis: usize, group_size: usize) -> Result<Layout> {
        let (count, row) = sizes(name, shape)?;
        let channels = shape.get(axis).copied().unwrap_or(0);
        if axis > 1 || group_size == 0 || !channels.is_multiple_of(group_size) || channels == 0 {
            let problem = format!("groups of {group_size} along axis {axis} do not fit the shape {shape:?}");
            return Err(Error::Argument(format!("`{name}`: {problem}")));
        }
        let groups = channels / group_size;
        let (rows, run) = if axis == 0 { (1, count / groups) } else { (count / row, row / groups) };
        Ok(Layout { axis, group_size, groups, rows, run })
    }

    /// Weights in a group.
    pub fn group_len(&self) -> usize {
        self.rows * self.run
    }

    /// The runs of a group in the row-major weight, in order.
    pub fn runs(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let Layout { groups, run, .. } = *self;
        (0..self.rows).map(move |row| (row * groups + group) * run).map(move |begin| begin..begin + run)
    }
}

/// The layout that options ask for.
#[derive(Debug)]
pub(super) enum Fit {
    /// As asked, or with the smaller groups that the text tells of.
    Groups(Layout, Option<String>),
    /// None, for this reason.
    Dense(String),
}

/// Finds the layout for a weight.
pub(super) fn fit(name: &str, shape: &[usize], options: &PaletteOptions) -> Result<Fit> {
    sizes(name, shape)?;
    let (group_size, axis) = match options.granularity {
        Granularity::PerTensor => (shape.first().copied().unwrap_or(0), 0),
        Granularity::PerGroupedChannel { group_size, axis } => (group_size, axis),
    };
    let channels = shape.get(axis).copied().unwrap_or(0);
    if channels.is_multiple_of(group_size) {
        return Ok(Fit::Groups(Layout::new(name, shape, axis, group_size)?, None));
    }
    let side = if axis == 0 { "output" } else { "input" };
    let problem = format!("group_size {group_size} does not divide the {channels} {side} channels");
    match options.on_misfit {
        OnMisfit::Error => Err(Error::Argument(format!("`{name}`: {problem}"))),
        OnMisfit::Dense => Ok(Fit::Dense(problem)),
        OnMisfit::SmallerGroup => {
            let smaller = (1..=group_size.min(channels)).rev().find(|&size| channels.is_multiple_of(size)).unwrap_or(1);
            let layout = Layout::new(name, shape, axis, smaller)?;
            Ok(Fit::Groups(layout, Some(format!("{problem}; used {smaller}"))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_out_every_weight_once() {
        for (shape, axis, size) in [(vec![6, 4], 0, 2), (vec![6, 4], 1, 2), (vec![4, 6, 3, 2], 0, 4), (vec![4, 6, 3, 2], 1, 3)] {
            let layout = Layout::new("a", &shape, axis, size).unwrap();
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
