//! Pruning by magnitude, without calibration inputs: the baseline for SparseGPT.

use squeeze_base::error::{Error, Result};
use squeeze_codebook::{NmRatio, Sparsity};
use tch::{Kind, Tensor};

use super::matrix::to_vec;
use super::sparsity::mark_smallest;
use super::weight::flat;

/// A pruned weight and its mask.
#[derive(Debug)]
pub struct Masked {
    /// [o, d] fp32 on the weight's device, exactly zero where pruned.
    pub weight: Tensor,
    /// [o, d] bool, true where kept.
    pub mask: Tensor,
}

/// Prunes the smallest magnitudes of `weight` [o, ...]: of the whole weight, as Core ML's
/// `OpMagnitudePrunerConfig` does, or n of every m in a row. An incomplete last group of m columns
/// stays dense. Of `rows_together` neighbouring rows, which have one mask, the root of the sum of
/// squares counts. Of equal magnitudes the first are pruned; zeros are all pruned.
///
/// # Errors
/// [`squeeze_base::Error::Argument`] for a sparsity out of range, or rows that cannot be pruned so
/// many at a time,
/// [`squeeze_base::Error::NotFinite`] for NaN in the weight.
pub fn magnitude_prune(weight: &Tensor, sparsity: Sparsity, rows_together: usize) -> Result<Masked> {
    sparsity.check()?;
    let flat = flat(weight)?;
    let rows = flat.size2()?.0 as usize;
    if rows_together == 0 || !rows.is_multiple_of(rows_together) {
        return Err(Error::Argument(format!("{rows} output channels cannot be pruned {rows_together} at a time")));
    }
    let columns = flat.size2()?.1 as usize;
    let magnitudes = match rows_together {
        1 => flat.f_abs()?,
        together => {
            let vectors = flat.f_reshape([-1, together as i64, columns as i64])?;
            vectors.f_square()?.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)?.f_sqrt()?
        }
    };
    let magnitudes: Vec<f32> = to_vec(&magnitudes)?;
    let mut pruned = vec![false; magnitudes.len()];
    match sparsity {
        Sparsity::Unstructured(share) => {
            let count = (magnitudes.len() as f64 * share) as usize;
            mark_smallest(&magnitudes, count, &mut pruned);
        }
        Sparsity::NOfM(NmRatio { n, m }) => {
            for (magnitudes, pruned) in magnitudes.chunks(columns).zip(pruned.chunks_mut(columns)) {
                for (magnitudes, pruned) in magnitudes.chunks_exact(m).zip(pruned.chunks_exact_mut(m)) {
                    let mut order: Vec<usize> = (0..m).collect();
                    order.sort_by(|a, b| magnitudes[*a].total_cmp(&magnitudes[*b]));
                    order.iter().take(n).for_each(|column| pruned[*column] = true);
                }
            }
        }
    }
    let pruned = Tensor::f_from_slice(&pruned)?.f_reshape([-1, columns as i64])?.f_to_device(flat.device())?;
    let pruned = pruned.f_repeat_interleave_self_int(rows_together as i64, 0, None)?;
    Ok(Masked { weight: flat.f_masked_fill(&pruned, 0.0)?, mask: pruned.f_logical_not()? })
}
