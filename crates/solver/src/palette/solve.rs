//! The palettizer.

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Codebook, PaletteOptions};

use super::histogram::{Counts, Histogram, Nearest};
use super::layout::{Layout, sizes};
use super::palettized::{Palettized, change, check_mask, squared_error};
use super::rounding;
use super::values::{Bucket, optimal_palette, palette_of_checked};
use super::vectors::{self, STARTS};

/// Palettizes the weight [o, i, ...] (row-major) of layer `name`: the best palette for each group,
/// and the nearest of its entries for each weight (the lower of two equally near entries).
///
/// `keep` [o, i, ...] is true for kept weights; `None` keeps all. Pruned weights have no influence.
/// A kept weight of zero is a value like any other, and -0 is 0. A group with at most 2^bits
/// distinct values is kept without loss.
///
/// With vectors of output channels, an index and a palette's entry belong to `vector_length`
/// neighbouring channels, and pruned weights must be whole vectors. Their palettes are no exact
/// optimum, but the best of several k-means runs.
///
/// With per-channel scales, s_o is the largest magnitude among the kept weights of output channel o
/// (1 if that is 0), and the palettized values are weight / s_o, rounded to fp16. As in
/// coremltools, all channels of a group then have equal importance.
///
/// With a quantizer the palette is fixed and not fitted, and each block of columns has a scale by
/// its largest kept magnitude.
///
/// The result does not depend on the number of rayon threads.
///
/// # Errors All name the layer. [`Error::Argument`]: a group size that is 0 or does not divide the
/// channels, an axis above 1, vectors that do not fit, a shape with fewer than two dimensions or
/// without weights, or one that the lengths of `weight` and `keep` do not fit; a quantizer with
/// error feedback, which [`gptq`](crate::gptq()) takes.
/// [`Error::NotFinite`]: NaN or infinity anywhere in the weight, even where it is pruned.
pub fn palettize(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    options: &PaletteOptions,
) -> Result<Palettized> {
    solve(name, weight, shape, keep, None, options, STARTS)
}

/// As [`palettize`], but each palette minimises the sum of importance * error^2. Fixed palettes do
/// not depend on the importance.
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
    palettize_from(name, weight, shape, keep, importance, options, STARTS)
}

/// [`palettize_weighted`] with at most `starts` starts of k-means, if the palettes are of vectors.
pub(crate) fn palettize_from(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    importance: &[f64],
    options: &PaletteOptions,
    starts: u64,
) -> Result<Palettized> {
    if importance.len() != weight.len() {
        let expected = format!("[{}]", weight.len());
        return Err(Error::shape(format!("`{name}`: the list of importances"), [importance.len() as i64], expected));
    }
    if let Some(number) = importance.iter().find(|number| !(number.is_finite() && **number >= 0.0)) {
        return Err(Error::range(format!("`{name}`: an importance"), number, "finite and at least 0"));
    }
    solve(name, weight, shape, keep, Some(importance), options, starts)
}

fn solve(
    name: &str,
    weight: &[f16],
    shape: &[usize],
    keep: Option<&[bool]>,
    importance: Option<&[f64]>,
    options: &PaletteOptions,
    starts: u64,
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
    if let Some(at) = first_not_finite(weight) {
        let problem = format!("weight {at} of {count} is {}; palettes need finite weights", weight[at]);
        return Err(Error::NotFinite(format!("`{name}`: {problem}")));
    }
    if options.quantizer.is_some() {
        return rounding::round(name, weight, shape, keep, options);
    }
    let layout = Layout::new(name, shape, options)?;
    if options.vector_length != 1 {
        return vectors::palettize(vectors::Weight { name, values: weight, shape, keep, importance, starts }, &layout, options);
    }
    if u32::try_from(layout.group_len()).is_err() {
        return Err(Error::Argument(format!("`{name}`: a group has {} weights, more than are counted", layout.group_len())));
    }

    let scales = options.per_channel_scale.then(|| scales(weight, keep, row));
    let scaled = scales.as_ref().map(|scales| divided(weight, scales, row));
    let values = Values { name, values: scaled.as_deref().unwrap_or(weight), keep, importance };
    let mut indices = vec![0; count];
    let groups = match layout.is_contiguous() {
        true => {
            let parts = indices.par_chunks_mut(layout.group_len()).enumerate();
            parts
                .map_init(Workspace::default, |workspace, (group, indices)| {
                    workspace.group(values, &layout, group, entries, indices)
                })
                .collect::<Result<Vec<_>>>()?
        }
        false => scattered(values, &layout, entries, &mut indices)?,
    };
    let Layout { axis, group_size, .. } = layout;
    let mut palettized = Palettized {
        name: name.to_owned(),
        shape: shape.to_owned(),
        codebook: Codebook {
            bits: options.bits,
            axis,
            group_size,
            vector_length: 1,
            palettes: groups.iter().flat_map(|group| group.palette.iter().copied()).collect(),
            scales: scales.map(Into::into),
        },
        indices,
        squared_error: 0.0,
        kept: keep.map_or(count, |keep| keep.par_chunks(PIECE).map(|keep| keep.iter().filter(|keep| **keep).count()).sum()),
    };
    palettized.squared_error = match palettized.codebook.scales {
        None => groups.iter().map(|group| group.squared_error).sum(),
        Some(_) => squared_error(&palettized.decode(keep)?, weight, keep, row),
    };
    Ok(palettized)
}

/// Values that a thread takes at once from a large group.
const PIECE: usize = 1 << 17;

/// The place of the first value that is NaN or infinite.
fn first_not_finite(weight: &[f16]) -> Option<usize> {
    let piece = weight.par_chunks(PIECE).position_first(|piece| {
        let largest = piece.iter().fold(0, |largest, value| (value.to_bits() & 0x7fff).max(largest));
        largest >= f16::INFINITY.to_bits()
    })?;
    let at = weight[piece * PIECE..].iter().position(|value| !value.is_finite());
    at.map(|at| piece * PIECE + at)
}

/// The groups of a weight in which these are not contiguous.
fn scattered(values: Values<'_>, layout: &Layout, entries: usize, indices: &mut [u8]) -> Result<Vec<Group>> {
    let groups = (0..layout.groups).into_par_iter().map_init(Workspace::default, |workspace, group| {
        let mut indices = vec![0; layout.group_len()];
        Ok((workspace.group(values, layout, group, entries, &mut indices)?, indices))
    });
    let groups = groups.collect::<Result<Vec<(Group, Vec<u8>)>>>()?;
    for (group, (_, of_group)) in groups.iter().enumerate() {
        let mut rest = of_group.as_slice();
        for run in layout.runs(group) {
            let (of_run, after) = rest.split_at(run.len());
            rest = after;
            indices[run].copy_from_slice(of_run);
        }
    }
    Ok(groups.into_iter().map(|(group, _)| group).collect())
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
    /// Counts the kept values of a group.
    fn count(&self, layout: &Layout, group: usize, counts: &mut Counts) {
        for run in layout.runs(group) {
            let (values, keep) = (&self.values[run.clone()], self.keep.map(|keep| &keep[run]));
            if values.len() <= PIECE {
                counts.add(values, keep);
                continue;
            }
            let pieces = (0..values.len().div_ceil(PIECE)).into_par_iter().fold(Counts::new, |mut counts, piece| {
                let piece = piece * PIECE..values.len().min((piece + 1) * PIECE);
                counts.add(&values[piece.clone()], keep.map(|keep| &keep[piece]));
                counts
            });
            // Sums of integers do not depend on their order.
            let all = pieces.reduce_with(|mut counts, others| {
                counts.merge(&others);
                counts
            });
            all.iter().for_each(|all| counts.merge(all));
        }
    }

    /// Sums the importances of the kept values of a group.
    fn weigh(&self, layout: &Layout, group: usize, importance: &[f64], histogram: &mut Histogram) {
        for run in layout.runs(group) {
            let (values, importance) = (&self.values[run.clone()], &importance[run.clone()]);
            let keep = self.keep.map(|keep| &keep[run]);
            for (at, (&value, &importance)) in values.iter().zip(importance).enumerate() {
                if keep.is_none_or(|keep| keep[at]) {
                    histogram.add(value, importance);
                }
            }
        }
    }

    /// Writes the palette entries of a group's weights, in the order of its runs; 0 where pruned.
    fn look_up(&self, layout: &Layout, group: usize, nearest: &Nearest, indices: &mut [u8]) {
        let mut rest = indices;
        for run in layout.runs(group) {
            let (of_run, after) = rest.split_at_mut(run.len());
            rest = after;
            let (values, keep) = (&self.values[run.clone()], self.keep.map(|keep| &keep[run]));
            of_run.par_chunks_mut(PIECE).enumerate().for_each(|(piece, indices)| {
                let piece = piece * PIECE..piece * PIECE + indices.len();
                nearest.write(&values[piece.clone()], keep.map(|keep| &keep[piece]), indices);
            });
        }
    }
}

/// A group's palette.
#[derive(Debug)]
struct Group {
    /// Its entries, padded by repetitions of the last.
    palette: Vec<f16>,
    /// The sum over kept values of (entry - value)^2.
    squared_error: f64,
}

/// The buffers of a thread for one group, reused for its next group: about 2 MB.
#[derive(Debug)]
struct Workspace {
    counts: Counts,
    /// For values of unequal importance.
    histogram: Option<Histogram>,
    buckets: Vec<Bucket>,
    nearest: Nearest,
}

impl Default for Workspace {
    fn default() -> Self {
        Workspace { counts: Counts::new(), histogram: None, buckets: Vec::new(), nearest: Nearest::new() }
    }
}

impl Workspace {
    /// Finds the palette of a group, and writes its indices.
    fn group(&mut self, values: Values<'_>, layout: &Layout, group: usize, entries: usize, indices: &mut [u8]) -> Result<Group> {
        let named = |why| Error::Argument(format!("`{}`: group {group}: {why}", values.name));
        let mut palette = None;
        if let Some(importance) = values.importance {
            let histogram = self.histogram.get_or_insert_with(Histogram::new);
            values.weigh(layout, group, importance, histogram);
            histogram.drain(&mut self.buckets);
            if !self.buckets.is_empty() {
                palette = Some(optimal_palette(&self.buckets, entries).map_err(named)?);
            }
        }
        values.count(layout, group, &mut self.counts);
        self.counts.drain(&mut self.buckets);
        let mut palette = palette.unwrap_or_else(|| palette_of_checked(&self.buckets, entries));
        self.nearest.set(&palette);
        values.look_up(layout, group, &self.nearest, indices);
        let error = |bucket: &Bucket| {
            let entry = palette[usize::from(self.nearest.entry(bucket.value))];
            bucket.weight * (entry.to_f64() - bucket.value.to_f64()).powi(2)
        };
        let squared_error = self.buckets.iter().map(error).sum();
        // A completely pruned group has no values, and a palette of zeros.
        let last = palette.last().copied().unwrap_or(f16::ZERO);
        palette.resize(entries, last);
        Ok(Group { palette, squared_error })
    }
}
