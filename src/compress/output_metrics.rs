//! The metrics of the outputs of layers that are polished by them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;
use squeeze_solver::{OutputGradients, OutputMetric};
use tch::Tensor;

use super::job::Job;
use super::output_gradients::output_gradients;
use super::workspace::Workspace;

/// The metric of each layer's outputs, by name.
pub(super) type OutputMetrics = BTreeMap<String, OutputMetric>;

/// The channels of a layer's output: the second dimension of a convolution's, the last of others.
fn outputs(output: &Tensor) -> i64 {
    match output.size()[..] {
        [_, channels, _, _] => channels,
        [.., channels] => channels,
        [] => 1,
    }
}

/// Measures the metrics of the layers whose recipe has
/// [`output_probes`](squeeze_codebook::Effort::output_probes), and that `store` does not have yet.
/// The dense network is measured: its gradients do not depend on other layers' results.
///
/// # Errors
/// If a forward or a gradient has NaN or infinite values.
pub(super) fn output_metrics(job: &Job<'_>, store: &Workspace, folder: &Path, progress: &dyn Progress) -> Result<OutputMetrics> {
    let probes = |name: &str| {
        let probes = job.layers.get(name)?.output_probes();
        Some(probes).filter(|probes| *probes > 0 && !store.has(name))
    };
    let Some(most) = job.layers.keys().filter_map(|name| probes(name)).max() else { return Ok(OutputMetrics::new()) };
    let mut sums: BTreeMap<String, OutputGradients> = BTreeMap::new();
    let _probed = output_gradients((job, most), folder, progress, &mut |layer, gradient| {
        if probes(layer).is_none() {
            return Ok(());
        }
        let sum = match sums.entry(layer.to_owned()) {
            Entry::Occupied(sum) => sum.into_mut(),
            Entry::Vacant(free) => free.insert(OutputGradients::new(outputs(gradient), gradient.device())?),
        };
        sum.add(gradient).map_err(Error::layer(layer))
    })?;
    let metric = |(name, sum): (String, OutputGradients)| {
        let metric = sum.metric().map_err(Error::layer(&name))?;
        Ok(metric.map(|metric| (name, metric)))
    };
    sums.into_iter().filter_map(|sum| metric(sum).transpose()).collect()
}
