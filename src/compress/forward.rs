//! Forwards of single carries, counted, and ended early where an observer asks for it.

use sdxl_model::Observer;
use sdxl_model::unet::{Carry, Part, Scope};
use squeeze_base::error::{Error, Result};

use super::statistics::Counter;

/// Sends `carry` through `scope` of `part`; returns multiply-adds too.
pub(super) fn forward(part: &Part, scope: Scope, carry: Carry, observer: &mut dyn Observer) -> Result<(Carry, f64)> {
    let mut counter = Counter::of(observer);
    let after = part.forward(scope, carry, &mut counter)?;
    Ok((after, counter.multiply_adds))
}

/// Sends `carry` through `scope` of `part` as far as the observer lets it; returns multiply-adds.
pub(super) fn observe(part: &Part, scope: Scope, carry: Carry, observer: &mut dyn Observer) -> Result<f64> {
    let mut counter = Counter::of(observer);
    unless_ended_early(part.forward(scope, carry, &mut counter))?;
    Ok(counter.multiply_adds)
}

/// Maps [`Error::SeenEnough`], with which an observer ends a forward early, to `Ok`.
pub(super) fn unless_ended_early<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) | Err(Error::SeenEnough) => Ok(()),
        Err(error) => Err(error),
    }
}
