//! The palettizer.

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Codebook, PaletteOptions};

use super::histogram::{Histogram, Nearest};
use super::layout::{Layout, sizes};
use super::palettized::{Palettized, change, check_mask, squared_error};
use super::values::{Bucket, optimal_palette};

/// Palettizes the weight [o, i, ...] (row-major) of layer `name`: the best palette for each group,
/// and the nearest of its entries for each weight (the lower of two equally near entries).
///
/// `keep` [o, i, ...] is true for kept weights; `None` keeps all. Pruned weights have no influence.
/// A kept weight of zero is a value like any other, and -0 is 0. A group with at most 2^bits
/// distinct values is kept without loss.
///
/// With per-channel scales, s_o is the largest magnitude among the kept weights of output channel o
/// (1 if that is 0), and the palettized values are weight / s_o, rounded to fp16. As in
/// coremltools, all channels of a group then have equal importance.
///
/// The result does not depend on the number of rayon threads.
///
/// # Errors
/// All name the layer. [`Error::Argument`]: a group size that is 0 or does not divide the channels,
/// an axis above 1, a shape with fewer than two dimensions or without weights, or one that the
/// lengths of `weight` and `keep` do not fit. [`Error::NotFinite`]: NaN or infinity anywhere in the
/// weight, even where it is pruned.
pub fn palettize(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    options: &PaletteOptions,
) -> Result<Palettized> {
    solve(name, weight, shape, keep, None, options)
}

/// As [`palettize`], but each palette minimises the sum of importance * error^2.
/// [`Palettized::squared_error`] is still the sum of errors^2.
///
/// `importance` [o, i, ...] must be finite and not negative. Weights of importance 0 get the
/// nearest entry of a palette that is made without them. In a group where all importances are 0,
/// all weights have equal importance.
///
/// # Errors
/// As [`palettize`], and [`Error::Argument`] for an importance that is negative, not finite or of
/// another length, or if the importances of a group sum to more than 1e140.
pub fn palettize_weighted(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    importance: &[f64],
    options: &PaletteOptions,
) -> Result<Palettized> {
    if importance.len() != weight.len() {
        let expected = format!("[{}]", weight.len());
        return Err(Error::shape(format!("`{name}`: the list of importances"), [importance.len() as i64], expected));
    }
    if let Some(number) = importance.iter().find(|number| !(number.is_finite() && **number >= 0.0)) {
        return Err(Error::range(format!("`{name}`: an importance"), number, "finite and at least 0"));
    }
    solve(name, weight, shape, keep, Some(importance), options)
}

fn solve(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    importance: Option<&[f64]>,
    options: &PaletteOptions,
) -> Result<Palettized> {
    let entries = options.bits.entries();
    let (count, row) = sizes(name, shape)?;
    if weight.len() != count {
        return Err(Error::shape(
            format!("`{name}`: the list of weights"),
            [weight.len() as i64],
            format!("the {count} of {shape:?}"),
        ));
    }
    check_mask(name, keep, count)?;
    if let Some(at) = weight.iter().position(|value| !value.is_finite()) {
        let problem = format!("weight {at} of {count} is {}; palettes need finite weights", weight[at]);
        return Err(Error::NotFinite(format!("`{name}`: {problem}")));
    }
    let layout = Layout::new(name, shape, options)?;

    let scales = options.per_channel_scale.then(|| scales(weight, keep, row));
    let scaled = scales.as_ref().map(|scales| divided(weight, scales, row));
    let values = Values { name, values: scaled.as_deref().unwrap_or(weight), keep, importance };
    let groups: Vec<(Vec<f16>, Vec<u8>)> = (0..layout.groups)
        .into_par_iter()
        .map_init(Workspace::default, |workspace, group| workspace.group(values, &layout, group, entries))
        .collect::<Result<_>>()?;

    let mut palettes = Vec::with_capacity(layout.groups * entries);
    let mut indices = vec![0; count];
    for (group, (palette, of_group)) in groups.iter().enumerate() {
        palettes.extend_from_slice(palette);
        let mut rest = of_group.as_slice();
        for run in layout.runs(group) {
            let (of_run, after) = rest.split_at(run.len());
            rest = after;
            indices[run].copy_from_slice(of_run);
        }
    }
    drop(groups);
    let Layout { axis, group_size, .. } = layout;
    let mut palettized = Palettized {
        name: name.to_owned(),
        shape: shape.to_owned(),
        codebook: Codebook { bits: options.bits, axis, group_size, vector_length: 1, palettes, scales },
        indices,
        squared_error: 0.0,
        kept: keep.map_or(count, |keep| keep.iter().filter(|keep| **keep).count()),
    };
    palettized.squared_error = squared_error(&palettized.decode(keep)?, weight, keep, row);
    Ok(palettized)
}

/// The largest magnitude in each row, 1 where that is 0.
fn scales(weight: &[f16], keep: Option<&[bool]>, row: usize) -> Vec<f16> {
    let largest = |at: usize, weight: &[f16]| {
        let keep = keep.and_then(|keep| keep.chunks(row).nth(at));
        // Magnitudes are in the order of their bits.
        let magnitude = |value: &f16| value.to_bits() & 0x7fff;
        match keep {
            Some(keep) => weight.iter().zip(keep).filter(|(_, keep)| **keep).map(|(value, _)| magnitude(value)).max(),
            None => weight.iter().map(magnitude).max(),
        }
    };
    let scale = |bits: Option<u16>| bits.filter(|bits| *bits > 0).map_or(f16::ONE, f16::from_bits);
    weight.par_chunks(row).enumerate().map(|(at, weight)| scale(largest(at, weight))).collect()
}

/// Each row divided by its scale, in fp32, rounded to fp16. Pruned weights may be larger than the
/// scale; their values are not used.
fn divided(weight: &[f16], scales: &[f16], row: usize) -> Vec<f16> {
    let mut scaled = weight.to_owned();
    scaled.par_chunks_mut(row).zip(scales).for_each(|(row, scale)| {
        let scale = scale.to_f32();
        change(row, |value| value / scale);
    });
    scaled
}

/// The values that are palettized, with their mask and importance.
#[derive(Debug, Clone, Copy)]
struct Values<'a> {
    name: &'a str,
    values: &'a [f16],
    keep: Option<&'a [bool]>,
    importance: Option<&'a [f64]>,
}

impl Values<'_> {
    /// Counts the kept values of a group, by importance if `weighted`.
    fn count(&self, layout: &Layout, group: usize, weighted: bool, histogram: &mut Histogram) {
        for run in layout.runs(group) {
            let values = &self.values[run.clone()];
            let keep = self.keep.map(|keep| &keep[run.clone()]);
            let importance = self.importance.filter(|_| weighted).map(|importance| &importance[run]);
            for (at, &value) in values.iter().enumerate() {
                if keep.is_none_or(|keep| keep[at]) {
                    histogram.add(value, importance.map_or(1.0, |importance| importance[at]));
                }
            }
        }
    }

    /// The palette entries of a group's weights, in the order of its runs; 0 where pruned.
    fn look_up(&self, layout: &Layout, group: usize, nearest: &Nearest) -> Vec<u8> {
        let mut indices = Vec::with_capacity(layout.group_len());
        for run in layout.runs(group) {
            let values = &self.values[run.clone()];
            match self.keep.map(|keep| &keep[run]) {
                None => indices.extend(values.iter().map(|&value| nearest.entry(value))),
                Some(keep) => {
                    indices.extend(values.iter().zip(keep).map(|(&value, &keep)| if keep { nearest.entry(value) } else { 0 }));
                }
            }
        }
        indices
    }
}

/// The buffers of a thread for one group, reused for its next group: about 0.6 MB.
#[derive(Debug)]
struct Workspace {
    histogram: Histogram,
    buckets: Vec<Bucket>,
    nearest: Nearest,
}

impl Default for Workspace {
    fn default() -> Self {
        Workspace { histogram: Histogram::new(), buckets: Vec::new(), nearest: Nearest::new() }
    }
}

impl Workspace {
    /// The palette of a group, padded to `entries`, and its indices.
    fn group(&mut self, values: Values<'_>, layout: &Layout, group: usize, entries: usize) -> Result<(Vec<f16>, Vec<u8>)> {
        values.count(layout, group, true, &mut self.histogram);
        self.histogram.drain(&mut self.buckets);
        if self.buckets.is_empty() && values.importance.is_some() {
            values.count(layout, group, false, &mut self.histogram);
            self.histogram.drain(&mut self.buckets);
        }
        let named = |why| Error::Argument(format!("`{}`: group {group}: {why}", values.name));
        let mut palette = optimal_palette(&self.buckets, entries).map_err(named)?;
        self.nearest.set(&palette);
        let indices = values.look_up(layout, group, &self.nearest);
        // A completely pruned group has no values, and a palette of zeros.
        let last = palette.last().copied().unwrap_or(f16::ZERO);
        palette.resize(entries, last);
        Ok((palette, indices))
    }
}
