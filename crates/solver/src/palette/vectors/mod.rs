//! Palettes of vectors: an index gives the values of V neighbouring output channels, as with
//! coremltools' `cluster_dim`.
//!
//! coremltools clusters vectors by scikit-learn's k-means with random starts
//! (`optimize/torch/palettization/_utils/kmeans.py`). Here the starts are seeded, weights have
//! their importance, and pruned vectors are left out.

mod clusters;
mod points;
mod table;

use half::f16;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{Codebook, PaletteOptions};
pub(crate) use table::VectorTable;

use super::layout::Layout;
use super::palettized::{Palettized, squared_error};
pub(crate) use clusters::STARTS;
use clusters::cluster;
use points::{PIECE, Points};

/// A weight whose shape, values and mask are checked: what [`palettize`](super::palettize) takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weight<'a> {
    pub name: &'a str,
    pub values: &'a [f16],
    pub shape: &'a [usize],
    pub keep: Option<&'a [bool]>,
    pub importance: Option<&'a [f64]>,
    /// Starts of k-means, at most.
    pub starts: u64,
}

/// Palettizes a weight [o, i, ...] by vectors of `options.vector_length` output channels. A vector
/// has the mean importance of its values.
///
/// # Errors
/// [`Error::Range`] for a vector length other than 2 and 4; [`Error::Argument`] for groups of input
/// channels, scales, vectors that do not divide the channels or their groups, or a mask that keeps
/// a part of a vector.
pub(super) fn palettize(weight: Weight<'_>, layout: &Layout, options: &PaletteOptions) -> Result<Palettized> {
    let refuse = |problem: &str| Err(Error::Argument(format!("`{}`: {problem}", weight.name)));
    if layout.axis != 0 {
        return refuse("vectors of output channels have no groups of input channels");
    }
    if options.per_channel_scale {
        return refuse("vectors have no scales for each channel");
    }
    match options.vector_length {
        2 => of_length::<2>(weight, layout, options),
        4 => of_length::<4>(weight, layout, options),
        length => Err(Error::range(format!("`{}`: cluster_dim", weight.name), length, "1, 2 or 4")),
    }
}

fn of_length<const V: usize>(weight: Weight<'_>, layout: &Layout, options: &PaletteOptions) -> Result<Palettized> {
    let Weight { name, values, shape, keep, .. } = weight;
    let (outputs, row) = (shape[0], values.len() / shape[0]);
    if !layout.group_size.is_multiple_of(V) {
        let problem =
            format!("vectors of {V} do not divide the {outputs} output channels or their groups of {}", layout.group_size);
        return Err(Error::Argument(format!("`{name}`: {problem}")));
    }
    if keep.is_some_and(|keep| keep.par_chunks(V * row).any(|rows| (0..row).any(|at| cuts::<V>(rows, at, row)))) {
        return Err(Error::Argument(format!("`{name}`: the mask keeps a part of a vector")));
    }
    let entries = options.bits.entries();
    let mut indices = vec![0; values.len() / V];
    let groups = indices.par_chunks_mut(layout.group_len() / V).enumerate();
    let palettes = groups.map(|(group, indices)| of_group::<V>(weight, row, group * layout.group_len(), entries, indices));
    let palettes: Vec<Vec<f16>> = palettes.collect();
    let mut palettized = Palettized {
        name: name.to_owned(),
        shape: shape.to_owned(),
        codebook: Codebook {
            bits: options.bits,
            axis: 0,
            group_size: layout.group_size,
            vector_length: V,
            palettes: palettes.concat(),
            scales: None,
        },
        indices,
        squared_error: 0.0,
        kept: keep.map_or(values.len(), |keep| keep.iter().filter(|keep| **keep).count()),
    };
    palettized.squared_error = squared_error(&palettized.decode(keep)?, values, keep, row);
    Ok(palettized)
}

/// Whether a mask keeps some values of the vector at column `at` of V rows, and not others.
fn cuts<const V: usize>(rows: &[bool], at: usize, row: usize) -> bool {
    (1..V).any(|member| rows[member * row + at] != rows[at])
}

/// The palette [2^n, V] of the group whose first value is number `first`; its indices are written.
fn of_group<const V: usize>(weight: Weight<'_>, row: usize, first: usize, entries: usize, indices: &mut [u8]) -> Vec<f16> {
    let place = |at: usize| first + at / row * V * row + at % row;
    let is_kept = |at: usize| weight.keep.is_none_or(|keep| keep[place(at)]);
    let vector = |at: usize| -> [f32; V] { std::array::from_fn(|member| weight.values[place(at) + member * row].to_f32()) };
    let kept = || (0..indices.len()).filter(|at| is_kept(*at));
    let importance = |at: usize| -> f64 {
        let mean = |all: &[f64]| (0..V).map(|member| all[place(at) + member * row]).sum::<f64>() / V as f64;
        weight.importance.map_or(1.0, mean)
    };
    // As shares of the largest, so that they are in the range of fp32.
    let largest = kept().map(importance).fold(0.0, f64::max);
    let share = |importance: f64| if largest > 0.0 { (importance / largest) as f32 } else { 1.0 };
    let mut points = Points::<V>::default();
    kept().for_each(|at| points.push(vector(at), share(importance(at))));
    let mut palette: Vec<[f16; V]> = cluster(&points, entries, weight.starts).iter().map(|vector| vector.map(rounded)).collect();
    palette.sort_by(|a, b| {
        a.iter().zip(b).map(|(a, b)| a.total_cmp(b)).find(|order| order.is_ne()).unwrap_or(std::cmp::Ordering::Equal)
    });
    let wide: Vec<[f32; V]> = palette.iter().map(|vector| vector.map(f16::to_f32)).collect();
    let table = VectorTable::new(&wide);
    let arch = Arch::new();
    indices.par_chunks_mut(PIECE).enumerate().for_each(|(piece, indices)| {
        let vectors: Vec<[f32; V]> = (0..indices.len()).map(|at| vector(piece * PIECE + at)).collect();
        arch.dispatch(LookUp { vectors: &vectors, table: &table, indices });
        let pruned = indices.iter_mut().enumerate().filter(|(at, _)| !is_kept(piece * PIECE + at));
        pruned.for_each(|(_, index)| *index = 0);
    });
    // A completely pruned group has no vectors, and a palette of zeros.
    let last = palette.last().copied().unwrap_or([f16::ZERO; V]);
    palette.resize(entries, last);
    palette.concat()
}

/// The fp16 number nearest to a mean of fp16 numbers; a zero has no sign.
fn rounded(value: f32) -> f16 {
    f16::from_f32(value + 0.0)
}

/// Writes the index of the nearest vector of each.
struct LookUp<'a, const V: usize> {
    vectors: &'a [[f32; V]],
    table: &'a VectorTable<V>,
    indices: &'a mut [u8],
}

impl<const V: usize> WithSimd for LookUp<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (index, vector) in self.indices.iter_mut().zip(self.vectors) {
            *index = self.table.nearest(*vector);
        }
    }
}
