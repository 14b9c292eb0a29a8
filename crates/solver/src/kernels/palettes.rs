//! Exact palettes of groups of rows.

use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use super::{Kernels, Number, plain};

/// The number of fp16 values, infinities and NaN included.
const KEYS: i64 = 1 << 16;

/// The number of finite fp16 values, zero counted once.
const MOST_VALUES: i64 = 63_487;

/// The bytes of working memory that are taken at once, unless one group needs more.
const ROOM: i64 = 512 << 20;

/// The sum of a group's weights of values stays below 2^62: 2^36 for each of at most 2^26 elements.
const LARGEST_WEIGHT: f64 = (1_u64 << 36) as f64;
const MOST_ELEMENTS: i64 = 1 << 26;

/// Weights of groups, [groups, length] fp16 and contiguous, and which are kept.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub weights: &'a Tensor,
    /// [groups, length], bool; `None` if all are kept.
    pub keep: Option<&'a Tensor>,
}

impl Groups<'_> {
    fn size(&self) -> Result<[i64; 2]> {
        let (groups, length) = self.weights.size2()?;
        plain(self.weights, [groups, length], Kind::Half)?;
        if let Some(keep) = self.keep {
            plain(keep, [groups, length], Kind::Bool)?;
        }
        if length > MOST_ELEMENTS {
            return Err(Error::internal("groups that are too large for the kernels"));
        }
        Ok([groups, length])
    }

    fn pointers(&self) -> [u64; 2] {
        [self.weights, self.keep.unwrap_or(&Tensor::new())]
            .map(|tensor| if tensor.defined() { tensor.data_ptr() as u64 } else { 0 })
    }

    fn narrow(&self, start: i64, count: i64) -> Result<(Tensor, Option<Tensor>)> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, start, count);
        Ok((part(self.weights)?, self.keep.map(part).transpose()?))
    }
}

impl Kernels {
    /// Whether [`palettes`](Self::palettes) and [`look_up`](Self::look_up) take this many groups of
    /// this many elements.
    pub(crate) fn takes_groups(groups: usize, length: i64) -> bool {
        /// The thread blocks that a launch may have in its second dimension.
        const MOST_GROUPS: usize = 65_535;
        groups <= MOST_GROUPS && length <= MOST_ELEMENTS
    }

    /// The palette of each group that has the least sum of squared errors, each weighted by the
    /// importance of its column: [groups, entries] fp16, each ascending. A palette with fewer
    /// distinct values repeats the last one; that of a completely pruned group is zeros.
    ///
    /// `importance` has a number >= 0 for each of a row's columns; they are rounded to 36 bits of
    /// the largest.
    pub(crate) fn palettes(&self, groups: Groups<'_>, importance: Option<&[f64]>, entries: i64) -> Result<Tensor> {
        let [count, length] = groups.size()?;
        if !(1..=256).contains(&entries) {
            return Err(Error::internal("palettes that are too large for the kernels"));
        }
        let device = groups.weights.device();
        let importance = match importance {
            None => None,
            Some(numbers) => Some(Tensor::f_from_slice(&fixed_point(numbers))?.f_to_device(device)?),
        };
        let columns = importance.as_ref().map_or(1, |importance| importance.numel() as i64);
        let room = length.min(MOST_VALUES);
        let of_group = 8 * KEYS + (4 + 16 + 16 + 2 * entries) * (room + 1);
        let at_once = (ROOM / of_group).clamp(1, count);
        let palettes = Tensor::f_zeros([count, entries], (Kind::Half, device))?;
        for start in (0..count).step_by(at_once as usize) {
            let some = at_once.min(count - start);
            let (weights, keep) = groups.narrow(start, some)?;
            let part = Groups { weights: &weights, keep: keep.as_ref() };
            let new = |size: &[i64], kind| Tensor::f_empty(size, (kind, device));
            let histograms = Tensor::f_zeros([some, KEYS], (Kind::Int64, device))?;
            let (values, sums) = (new(&[some, room], Kind::Float)?, new(&[some, room + 1, 2], Kind::Double)?);
            let (counts, costs) = (new(&[some], Kind::Int)?, new(&[some, 2, room + 1], Kind::Double)?);
            let begins = new(&[some, entries, room + 1], Kind::Int16)?;
            let palettes = palettes.f_narrow(0, start, some)?;
            let at = |tensor: &Tensor| tensor.data_ptr() as u64;
            let numbers = [room, entries].map(|number| Number::Int(number as i32));
            let blocks = u32::try_from(some).map_err(|_| Error::internal("more groups than a GPU takes"))?;

            let [weights, keep] = part.pointers();
            let pointers = [weights, keep, importance.as_ref().map_or(0, at), at(&histograms)];
            let sizes = [Number::Long(length), Number::Int(columns as i32)];
            self.start(&self.count_values, &pointers, &sizes, [splits(length), blocks], 256)?;
            let pointers = [at(&histograms), at(&values), at(&sums), at(&counts)];
            self.start(&self.collect_values, &pointers, &numbers[..1], [blocks, 1], 1024)?;
            let pointers = [at(&values), at(&sums), at(&counts), at(&costs), at(&begins), at(&palettes)];
            self.start(&self.cut_values, &pointers, &numbers, [blocks, 1], 512)?;
        }
        Ok(palettes)
    }

    /// The index of the entry nearest to each kept weight, [groups, length] u8; 0 where pruned.
    pub(crate) fn look_up(&self, groups: Groups<'_>, palettes: &Tensor) -> Result<Tensor> {
        let [count, length] = groups.size()?;
        let entries = palettes.size2()?.1;
        plain(palettes, [count, entries], Kind::Half)?;
        let indices = Tensor::f_empty([count, length], (Kind::Uint8, palettes.device()))?;
        let [weights, keep] = groups.pointers();
        let pointers = [weights, keep, palettes.data_ptr() as u64, indices.data_ptr() as u64];
        let blocks = u32::try_from(count).map_err(|_| Error::internal("more groups than a GPU takes"))?;
        let numbers = [Number::Long(length), Number::Int(entries as i32)];
        self.start(&self.look_up, &pointers, &numbers, [splits(length), blocks], 256)?;
        Ok(indices)
    }
}

/// The number of thread blocks for the elements of a group: 16 elements a thread.
fn splits(length: i64) -> u32 {
    u32::try_from(length / 4096).unwrap_or(u32::MAX).clamp(1, 256)
}

/// Numbers >= 0 as integers of at most [`LARGEST_WEIGHT`]; none but zero becomes zero.
fn fixed_point(numbers: &[f64]) -> Vec<i64> {
    let largest = numbers.iter().copied().fold(0.0, f64::max);
    let scaled = |number: f64| if number > 0.0 { (number / largest * LARGEST_WEIGHT).round().max(1.0) as i64 } else { 0 };
    numbers.iter().map(|number| scaled(*number)).collect()
}

#[cfg(test)]
mod tests {
    use super::{Kernels, fixed_point};

    #[test]
    fn more_groups_than_a_launch_has_are_left_to_the_host() {
        assert!(Kernels::takes_groups(65_535, 1 << 26));
        assert!(!Kernels::takes_groups(65_536, 1) && !Kernels::takes_groups(1, (1 << 26) + 1));
    }

    #[test]
    fn importances_keep_their_proportions() {
        assert_eq!(fixed_point(&[0.0, 2.0, 1.0, 1e-300]), [0, 1 << 36, 1 << 35, 1]);
        assert_eq!(fixed_point(&[0.0; 3]), [0; 3]);
    }
}
