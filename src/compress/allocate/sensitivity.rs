//! The effect of an error in a layer's output on the output of the UNet.

use std::collections::BTreeMap;

use squeeze_base::error::Result;
use squeeze_numerics::sum;
use tch::Kind;

use super::super::output_gradients::output_gradients;
use super::measurement::Measurement;

/// The effect of an error in each layer's output.
#[derive(Debug, Default)]
pub(super) struct Sensitivities {
    /// By name: the squared error of the UNet's output for a unit of squared error of the layer's.
    pub by_layer: BTreeMap<String, f64>,
    /// The squared norm of the UNet's output for one call.
    pub energy: f64,
}

/// Measures ‖J‖² / n of each layer on `probes` of the samples: J is the Jacobian of the UNet's
/// output by the layer's output, and n the size of the latter. An error that is spread evenly over
/// the layer's output is multiplied by this.
pub(super) fn measure(measurement: &Measurement<'_>, probes: usize) -> Result<Sensitivities> {
    let Measurement { job, folder, progress, .. } = measurement;
    let mut sums: BTreeMap<String, f64> = BTreeMap::new();
    let probed = output_gradients((job, probes), folder, *progress, &mut |layer, gradient| {
        let squares = sum::squares(&gradient.f_detach()?.f_to_kind(Kind::Float)?)?;
        *sums.entry(layer.to_owned()).or_default() += squares / gradient.numel().max(1) as f64;
        Ok(())
    })?;
    sums.values_mut().for_each(|sum| *sum /= probed.count as f64);
    Ok(Sensitivities { by_layer: sums, energy: probed.energy })
}
