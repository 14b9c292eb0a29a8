//! The steps on a block of columns that go column by column: kernels on a CUDA GPU. Elsewhere the
//! block goes to the host and back, and the rows of the solver for CPUs do the work.

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_codebook::Codebook;
use tch::{Device, Tensor};

use super::super::polish::{PASSES, PolishedRows};
use super::super::sorted_codebook::SortedCodebook;
use super::super::sweep::sweep_rows;
use super::host::bools;
use crate::kernels::{DevicePalettes, Kernels};
use crate::matrix::{numbers_mut, to_vec};
use crate::palette::values_of;

/// Sorted palettes, on the device and on the host, and the steps that need them.
#[derive(Debug)]
pub(super) struct Blocks {
    kernels: Option<Arc<Kernels>>,
    /// On the host, without indices.
    sorted: SortedCodebook,
    /// [groups, entries], fp32.
    pub entries: Tensor,
}

/// The columns of a block: U or the diagonal block of H, [b, b], and views [rows, b] of the mask
/// and of the indices.
pub(super) struct Columns<'a> {
    pub square: &'a Tensor,
    pub keep: Option<&'a Tensor>,
    pub indices: &'a Tensor,
}

impl Blocks {
    /// The steps on `device`, for a codebook along output channels.
    pub(super) fn new(codebook: &Codebook, device: Device) -> Result<Self> {
        let sorted = SortedCodebook::new(codebook, Vec::new());
        let entries = Tensor::f_from_slice(sorted.values())?.f_reshape([-1, sorted.entries as i64])?;
        Ok(Blocks { kernels: Kernels::of(device), sorted, entries: entries.f_to_device(device)? })
    }

    /// The palettes as a codebook stores them.
    pub(super) fn palettes(&self) -> Vec<f16> {
        self.sorted.palettes()
    }

    fn on_device(&self) -> DevicePalettes<'_> {
        DevicePalettes { entries: &self.entries, group_rows: self.sorted.group_rows as i64 }
    }

    /// The value of each index [o, d]: fp32, zero where pruned.
    pub(super) fn decode(&self, indices: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        values_of(&self.entries, indices, keep)
    }

    /// Rounds a block with error feedback: `values` [rows, b], contiguous, become the rounded
    /// weights, and the indices are set.
    pub(super) fn sweep(&self, values: &mut Tensor, columns: &Columns<'_>) -> Result<()> {
        let Columns { square: upper, keep, indices } = *columns;
        if let Some(kernels) = &self.kernels {
            return kernels.sweep(values, &upper.f_contiguous()?, keep, Some((self.on_device(), indices)), None, None);
        }
        let (sorted, width) = (&self.sorted, values.size2()?.1 as usize);
        let mut host = values.f_to_device(Device::Cpu)?.f_contiguous()?;
        let (upper, keep) = (to_vec(upper)?, keep.map(bools).transpose()?);
        let mut entries = vec![0; host.numel()];
        let rows = numbers_mut(&mut host)?.par_chunks_mut(width).zip(entries.par_chunks_mut(width));
        rows.enumerate().for_each(|(row, (values, entries))| {
            sweep_rows(values, entries, &upper, sorted.of_row(row), |j| is_kept(keep.as_ref(), row * width + j));
        });
        values.f_copy_(&host)?;
        set(indices, &Tensor::f_from_slice(&entries)?)
    }

    /// Coordinate descent over the indices of a block, given the gradient [rows, b]. It updates the
    /// view [rows, b] `change` of W - W0 and adds each row's number of changes to `changed`.
    pub(super) fn polish(&self, gradient: &Tensor, columns: &Columns<'_>, change: &Tensor, changed: &Tensor) -> Result<()> {
        let Columns { square: corner, keep, indices } = *columns;
        if let Some(kernels) = &self.kernels {
            let (gradient, corner) = (gradient.f_contiguous()?, corner.f_contiguous()?);
            return kernels.polish(&gradient, &corner, keep, self.on_device(), indices, change, changed, PASSES);
        }
        let (sorted, width) = (&self.sorted, gradient.size2()?.1 as usize);
        let (mut gradient, corner, keep) = (to_vec(gradient)?, to_vec(corner)?, keep.map(bools).transpose()?);
        let diagonal: Vec<f32> = corner.iter().step_by(width + 1).copied().collect();
        let mut entries: Vec<u8> = Vec::try_from(&indices.f_contiguous()?.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?;
        let mut moved = vec![0.0; gradient.len()];
        let rows = gradient.par_chunks_mut(width).zip(moved.par_chunks_mut(width)).zip(entries.par_chunks_mut(width));
        let numbers = rows.enumerate().map(|(row, ((gradient, moved), indices))| {
            let values = PolishedRows { gradient, moved, indices };
            let kept = |j| is_kept(keep.as_ref(), row * width + j);
            values.polish(&corner, &diagonal, sorted.of_row(row), kept) as i32
        });
        let numbers: Vec<i32> = numbers.collect();
        let _ = changed.shallow_clone().f_add_(&Tensor::f_from_slice(&numbers)?.f_to_device(changed.device())?)?;
        let moved = Tensor::f_from_slice(&moved)?.f_reshape(change.size())?.f_to_device(change.device())?;
        let _ = change.shallow_clone().f_add_(&moved)?;
        set(indices, &Tensor::f_from_slice(&entries)?)
    }
}

/// Copies numbers in row-major order into a view.
fn set(view: &Tensor, numbers: &Tensor) -> Result<()> {
    view.shallow_clone().f_copy_(&numbers.f_reshape(view.size())?)?;
    Ok(())
}

fn is_kept(keep: Option<&Vec<bool>>, at: usize) -> bool {
    keep.is_none_or(|keep| keep[at])
}
