//! Forwards of single carries, counted, and ended early where an observer asks for it.
//!
//! Where the activations of a carry are beyond fp16, its forward is made again in a wider dtype
//! ([`Overflows`]). Each carry is decided on alone, so that the result does not depend on the order
//! of the carries or on the device that has them.

use sdxl_model::Unobserved;
use sdxl_model::unet::{Carry, Part, Scope};
use squeeze_base::error::{Error, Result};
use tch::Kind;

use super::dense_outputs::DenseOutputs;
use super::gather::Gatherer;
use super::overflows::Overflows;
use super::statistics::Counter;

/// Sends `carry` through `scope` of `part`; returns multiply-adds too.
pub(super) fn forward(part: &Part, scope: Scope, carry: Carry, overflows: &Overflows) -> Result<(Carry, f64)> {
    let mut multiply_adds = 0.0;
    let mut run = |carry: Carry| {
        let mut counted = Unobserved;
        let mut counter = Counter::of(&mut counted);
        let after = part.forward(scope, carry, &mut counter)?.fitted();
        multiply_adds += counter.multiply_adds;
        after
    };
    let after = run(carry.shallow_clone())?;
    if carry.kind()? != Kind::Half || after.is_finite()? {
        return Ok((after, multiply_adds));
    }
    let again = again(part, scope, carry, overflows, &mut run)?;
    Ok((again, multiply_adds))
}

/// The dense outputs of `layers` for a carry, the carry after `scope` of `part`, and multiply-adds.
/// Without the carry after it, the forward ends with the last output.
pub(super) fn dense_outputs(
    part: &Part,
    scope: Scope,
    carry: Carry,
    layers: &[String],
    advances: bool,
    overflows: &Overflows,
) -> Result<(DenseOutputs, Option<Carry>, f64)> {
    let mut multiply_adds = 0.0;
    let mut run = |carry: Carry| -> Result<(DenseOutputs, Option<Carry>)> {
        let mut outputs = DenseOutputs::of(layers.to_vec());
        if !advances {
            outputs = outputs.ending_early();
        }
        let mut counter = Counter::of(&mut outputs);
        let result = part.forward(scope, carry, &mut counter);
        multiply_adds += counter.multiply_adds;
        match result {
            Ok(after) => Ok((outputs, if advances { Some(after.fitted()?) } else { None })),
            Err(Error::SeenEnough) => Ok((outputs, None)),
            Err(error) => Err(error),
        }
    };
    let (outputs, after) = run(carry.shallow_clone())?;
    let is_finite = || match &after {
        Some(after) => after.is_finite(),
        None => outputs.are_finite(),
    };
    if carry.kind()? != Kind::Half || is_finite()? {
        return Ok((outputs, after, multiply_adds));
    }
    let (outputs, after) = again(part, scope, carry, overflows, &mut run)?;
    Ok((outputs, after, multiply_adds))
}

/// Sends `carry` through `scope` of `part` as far as the gatherer lets it; returns multiply-adds.
pub(super) fn gather(part: &Part, scope: Scope, carry: Carry, gatherer: &mut Gatherer, overflows: &Overflows) -> Result<f64> {
    let mut multiply_adds = 0.0;
    let mut run = |gatherer: &mut Gatherer, carry: Carry| {
        let mut counter = Counter::of(gatherer);
        let result = unless_ended_early(part.forward(scope, carry, &mut counter));
        multiply_adds += counter.multiply_adds;
        result
    };
    if carry.kind()? != Kind::Half {
        run(gatherer, carry)?;
        return Ok(multiply_adds);
    }
    gatherer.begin_checked();
    let result = match run(gatherer, carry.shallow_clone()) {
        // What was seen before the overflow is in the sums already, and is passed over.
        Err(Error::Layer { source, .. }) if matches!(*source, Error::NotFinite(_)) => {
            again(part, scope, carry, overflows, &mut |carry| run(gatherer, carry))
        }
        result => result,
    };
    gatherer.end_checked();
    result.map(|()| multiply_adds)
}

/// Runs a carry again in a wider dtype than fp16, which is noted.
fn again<T>(
    part: &Part,
    scope: Scope,
    carry: Carry,
    overflows: &Overflows,
    run: &mut dyn FnMut(Carry) -> Result<T>,
) -> Result<T> {
    let wide = carry.beyond_half()?;
    let kind = wide.kind()?;
    let result = run(wide)?;
    overflows.add(part, scope, kind);
    Ok(result)
}

/// Maps [`Error::SeenEnough`], with which an observer ends a forward early, to `Ok`.
pub(super) fn unless_ended_early<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) | Err(Error::SeenEnough) => Ok(()),
        Err(error) => Err(error),
    }
}
