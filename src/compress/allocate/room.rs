//! The bytes that allocated layers may take.

use squeeze_base::error::{Error, Result};
use squeeze_base::number;

use super::prices::Shapes;
use crate::config::BudgetTarget;
use crate::plan::Plan;
use crate::recipe::{Recipe, stored_bytes};

/// What a result consists of besides the layers that are allocated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Bytes of everything that is not allocated.
    pub fixed_bytes: u64,
    /// Bytes of the compressed weights among it.
    pub compressed_bytes: u64,
    /// Elements of all compressed weights, allocated or not.
    pub elements: u64,
}

impl Room {
    /// The room beside the `layers` that are allocated; `plan` is that of `recipe` as it is.
    pub(super) fn beside<'a>(layers: impl Iterator<Item = &'a String>, shapes: &Shapes, recipe: &Recipe, plan: &Plan) -> Self {
        // The bytes of the allocated layers in the recipe as it is; the bytes of everything else
        // are fixed.
        let allocated: u64 = layers.map(|name| stored_bytes(&shapes[name], &recipe.layers[name])).sum();
        Room {
            fixed_bytes: plan.payload_bytes - allocated,
            compressed_bytes: plan.compressed_bytes - allocated,
            elements: plan.compressed_elements,
        }
    }

    /// Bytes of all tensors of a result of this size.
    ///
    /// # Errors
    /// [`Error::Internal`] if `target` is no size.
    fn total_bytes(&self, target: BudgetTarget) -> Result<u64> {
        match target {
            BudgetTarget::Size(bytes) => Ok(bytes),
            BudgetTarget::Bits(bits) => Ok(self.fixed_bytes + (bits / 8.0 * self.elements as f64) as u64 - self.compressed_bytes),
            BudgetTarget::Error(_) | BudgetTarget::Psnr(_) => Err(Error::internal("a closeness was taken for a size")),
        }
    }

    /// Bytes for the layers that are allocated, of a result of this size. `least` is what they take
    /// at least.
    ///
    /// # Errors
    /// [`Error::Argument`] if that is more; the message names the smallest size of a result.
    /// [`Error::Internal`] if `target` is no size.
    pub(super) fn bytes_of_layers(&self, target: BudgetTarget, least: u64) -> Result<u64> {
        let (total, smallest) = (self.total_bytes(target)?, self.fixed_bytes + least);
        if total < smallest {
            let shown = |bytes| format!("{} ({} bytes)", number::size(bytes), number::count(bytes));
            return Err(Error::Argument(format!(
                "{} are too few: the smallest settings take {} beside the file's header",
                shown(total),
                shown(smallest)
            )));
        }
        Ok(total - self.fixed_bytes)
    }
}
