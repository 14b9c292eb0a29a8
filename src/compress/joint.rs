//! The joint solver on one layer.

use tch::Tensor;

use super::layer::{Calibrated, Found, Treatment};
use crate::error::{Error, Result};
use crate::solver::{Joint, JointFactors, LayerEvidence, joint};

/// Mask, weights and palettes of `weight` [o, ...], together.
pub(super) fn find(name: &str, weight: &Tensor, treatment: &Treatment, calibrated: Option<Calibrated<'_>>) -> Result<Found> {
    let (Some(options), Some(Calibrated { hessian, joint: made, correction, held_out, .. })) =
        (treatment.joint_options(), calibrated)
    else {
        return Err(Error::Argument("cannot be solved jointly: no calibration input reached it".into()));
    };
    let own;
    let factors = match made.filter(|made| made.fit(options.dampening(), options.order())) {
        Some(made) => made,
        None => {
            own = JointFactors::new(hessian, options.dampening(), options.order())?;
            &own
        }
    };
    let Joint { weight: half, mask, palettized, pruned_loss, notes, target, .. } =
        joint(name, weight, hessian, factors, &LayerEvidence { residual: correction, held_out }, &options)?;
    Ok(Found { half, keep: mask, palettized, loss: pruned_loss, target, notes: notes.iter().map(ToString::to_string).collect() })
}
