//! The Hessian of a convolution of stride 1 without unfolding its input.

use std::collections::BTreeSet;
use std::ops::Range;

use squeeze_base::error::Result;
use squeeze_numerics::product::add_product;
use tch::{Device, Kind, Tensor};

use super::triangle::Triangle;

/// Correlations [c, c] of an input with shifted copies of itself, from which the Hessian of a
/// convolution of stride 1 is assembled.
///
/// The vectors of a k x k convolution are windows, so block (i, j) of H, for taps i and j of the
/// kernel, sums x(p + i) x(p + j)^T over the places p of the output. The sum depends on j - i
/// alone, except for the input's first and last rows and columns, which some taps do not reach.
/// These are summed separately and subtracted. A 3 x 3 kernel takes 13 correlations where unfolding
/// takes 45 blocks, and nine copies of the input.
#[derive(Debug)]
pub(super) struct Correlations {
    channels: i64,
    kernel: [i64; 2],
    padding: [i64; 2],
    /// The terms in order, each with its sum [c, c].
    sums: Vec<(Term, Tensor)>,
}

/// The sum of x(q) x(q + shift)^T over some rows and columns of q.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Term {
    /// Down and right; down is never below zero.
    shift: [i64; 2],
    places: [Places; 2],
}

/// A range of rows or columns, among those for which both ends of the shift are in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Places {
    All,
    First(i64),
    Last(i64),
}

impl Places {
    /// The range in an input of `length` rows or columns.
    fn range(self, length: i64, shift: i64) -> Range<i64> {
        let (start, end) = ((-shift).max(0), length - shift.max(0));
        match self {
            Places::All => start..end.max(start),
            Places::First(count) => start..(start + count).min(end).max(start),
            Places::Last(count) => (end - count).max(start)..end.max(start),
        }
    }
}

/// The places that taps `first` and `second` do not reach, along one axis.
fn unreached(kernel: i64, padding: i64, first: i64, second: i64) -> Vec<Places> {
    let before = first.min(second) - padding;
    let after = kernel - 1 - padding - first.max(second);
    [(before, Places::First(before)), (after, Places::Last(after))]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(_, places)| places)
        .collect()
}

/// The terms whose sum is block (`first`, `second`) of H, each with its sign; `first` comes before
/// `second` or is the same tap.
fn terms_of(kernel: [i64; 2], padding: [i64; 2], first: [i64; 2], second: [i64; 2]) -> Vec<(f64, Term)> {
    let shift = [second[0] - first[0], second[1] - first[1]];
    let [rows, columns] = [0, 1].map(|axis| unreached(kernel[axis], padding[axis], first[axis], second[axis]));
    let term = |sign, rows, columns| (sign, Term { shift, places: [rows, columns] });
    let mut terms = vec![term(1.0, Places::All, Places::All)];
    terms.extend(rows.iter().map(|rows| term(-1.0, *rows, Places::All)));
    terms.extend(columns.iter().map(|columns| term(-1.0, Places::All, *columns)));
    // The overlap of both was subtracted twice.
    terms.extend(rows.iter().flat_map(|rows| columns.iter().map(|columns| term(1.0, *rows, *columns))));
    terms
}

/// Each pair of taps, the earlier one first.
fn pairs(kernel: [i64; 2]) -> impl Iterator<Item = ([i64; 2], [i64; 2])> {
    let taps = kernel[0] * kernel[1];
    let place = move |tap: i64| [tap / kernel[1], tap % kernel[1]];
    (0..taps).flat_map(move |first| (first..taps).map(move |second| (place(first), place(second))))
}

/// The terms of all blocks.
fn terms(kernel: [i64; 2], padding: [i64; 2]) -> BTreeSet<Term> {
    pairs(kernel).flat_map(|(first, second)| terms_of(kernel, padding, first, second)).map(|(_, term)| term).collect()
}

impl Correlations {
    /// The correlations on `device`: the same tensors if they are there already.
    pub(super) fn to_device(&self, device: Device) -> Result<Self> {
        let sums = self.sums.iter().map(|(term, sum)| Ok((*term, sum.f_to_device(device)?))).collect::<Result<_>>()?;
        Ok(Correlations { sums, ..*self })
    }

    /// Zeros for a convolution of `channels` with this kernel and padding, stride 1, one group.
    pub(crate) fn zeros(channels: i64, kernel: [i64; 2], padding: [i64; 2], device: Device) -> Result<Self> {
        let sums = terms(kernel, padding)
            .into_iter()
            .map(|term| Ok((term, Tensor::f_zeros([channels; 2], (Kind::Float, device))?)))
            .collect::<Result<_>>()?;
        Ok(Correlations { channels, kernel, padding, sums })
    }

    /// Bytes that [`zeros`](Self::zeros) takes.
    pub(crate) fn bytes(channels: i64, kernel: [i64; 2], padding: [i64; 2]) -> u64 {
        4 * terms(kernel, padding).len() as u64 * (channels * channels).unsigned_abs()
    }

    /// The sums of all terms, in order.
    pub(crate) fn sums_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.sums.iter_mut().map(|(_, sum)| sum)
    }

    /// Multiply-adds for an input of `height` x `width` pixels.
    pub(crate) fn work(channels: i64, kernel: [i64; 2], padding: [i64; 2], height: i64, width: i64) -> f64 {
        let places = terms(kernel, padding).into_iter().map(|Term { shift, places }| match places {
            [Places::All, Places::All] => (height + kernel[0] - 1) * (width + kernel[1] - 1),
            [rows, columns] => {
                let (rows, columns) = (rows.range(height, shift[0]), columns.range(width, shift[1]));
                (rows.end - rows.start) * (columns.end - columns.start)
            }
        });
        places.sum::<i64>() as f64 * (channels * channels) as f64
    }

    /// d.
    pub(crate) fn dimension(&self) -> i64 {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// The device of the sums.
    pub(crate) fn device(&self) -> Device {
        self.sums[0].1.device()
    }

    /// Adds the vectors of `input` [b, c, h, w] in fp32.
    pub(crate) fn add(&self, input: &Tensor) -> Result<()> {
        let (_, _, height, width) = input.size4()?;
        // Zeros after each row and each image, so that a shift is a constant step in memory: pixels
        // that are shifted over an edge are multiplied with zeros.
        let [below, right] = [self.kernel[0] - 1, self.kernel[1] - 1];
        let padded = input.f_permute([0, 2, 3, 1])?.f_constant_pad_nd([0, 0, 0, right, 0, below])?.f_contiguous()?;
        let flat = padded.f_view([-1, self.channels])?;
        for (Term { shift, places }, sum) in &self.sums {
            let (here, there) = match places {
                [Places::All, Places::All] => {
                    let step = shift[0] * (width + right) + shift[1];
                    let count = flat.size2()?.0 - step;
                    (flat.f_narrow(0, 0, count)?, flat.f_narrow(0, step, count)?)
                }
                [rows, columns] => {
                    let (rows, columns) = (rows.range(height, shift[0]), columns.range(width, shift[1]));
                    let part = |down: i64, right: i64| -> Result<Tensor> {
                        let part = padded.f_narrow(1, rows.start + down, rows.end - rows.start)?;
                        let part = part.f_narrow(2, columns.start + right, columns.end - columns.start)?;
                        Ok(part.f_reshape([-1, self.channels])?)
                    };
                    if rows.is_empty() || columns.is_empty() {
                        continue;
                    }
                    (part(0, 0)?, part(shift[0], shift[1])?)
                }
            };
            add_product(sum, &here.f_transpose(0, 1)?, &there)?;
        }
        Ok(())
    }

    /// Adds the sums of another part of the inputs of this convolution.
    pub(crate) fn merge(&self, other: &Correlations) -> Result<()> {
        for ((_, sum), (_, other)) in self.sums.iter().zip(&other.sums) {
            let _ = sum.shallow_clone().f_add_(&other.f_to_device(sum.device())?)?;
        }
        Ok(())
    }

    /// Block (`first`, `second`) of H, [c, c].
    fn block(&self, first: [i64; 2], second: [i64; 2], scale: f64) -> Result<Tensor> {
        let mut block = Tensor::f_zeros([self.channels; 2], (Kind::Float, self.device()))?;
        for (sign, term) in terms_of(self.kernel, self.padding, first, second) {
            let index = self.sums.binary_search_by(|(stored, _)| stored.cmp(&term));
            let index = index.expect("`zeros` makes a sum for every term of every block");
            let _ = block.f_add_(&self.sums[index].1.f_mul_scalar(sign * scale)?)?;
        }
        Ok(block)
    }

    /// H times `scale`, its rows and columns as `torch.nn.Unfold` orders them: channel by channel,
    /// tap by tap.
    pub(crate) fn triangle(&self, scale: f64) -> Result<Triangle> {
        let taps = self.kernel[0] * self.kernel[1];
        let triangle = Triangle::zeros(self.dimension(), taps, self.device())?;
        for (first, second) in pairs(self.kernel) {
            let [row, column] = [first, second].map(|tap| tap[0] * self.kernel[1] + tap[1]);
            let block = self.block(first, second, scale)?;
            let mut places = vec![(row, column, block.shallow_clone())];
            if row != column {
                places.push((column, row, block.f_transpose(0, 1)?));
            }
            for (row, column, block) in places {
                for index in 0..triangle.count() {
                    let rows = triangle.rows(index);
                    let channels = rows.start / taps..rows.end / taps;
                    let (height, width) = (channels.end - channels.start, self.channels - channels.start);
                    let from = block.f_narrow(0, channels.start, height)?.f_narrow(1, channels.start, width)?;
                    let panel = triangle.panel(index).f_view([height, taps, width, taps])?;
                    panel.f_select(1, row)?.f_select(-1, column)?.f_copy_(&from)?;
                }
            }
        }
        Ok(triangle)
    }
}
