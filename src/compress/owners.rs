//! The sums of a pass over the samples, shared out to devices.

use std::collections::BTreeMap;

use sdxl_model::{Layer, LayerInput};
use squeeze_base::error::{Error, Result};
use squeeze_solver::{Hessian, OutputResidual};
use tch::Device;

use super::each_device::on_each;
use super::gather::Gatherer;
use super::watcher::Seen;
use crate::geometry::input_geometry;

/// The sums of every input on the one device that owns it, so that each device needs memory for its
/// share of the Hessians alone.
pub(super) struct Owners {
    /// One for each device.
    gatherers: Vec<Gatherer>,
    /// The place of each input's device.
    owners: BTreeMap<LayerInput, usize>,
}

impl Owners {
    /// Zeros for the inputs of `layers`, in execution order, and for their output residuals if they
    /// are fitted to the outputs of the dense network.
    pub(super) fn new(layers: &[&Layer], has_target: bool, devices: &[Device]) -> Result<Self> {
        let owners = deal(&sizes(layers, has_target), devices.len());
        let gatherers = devices.iter().enumerate().map(|(place, device)| {
            let own = layers.iter().copied().filter(|layer| owners[layer.input()] == place);
            if has_target { Gatherer::with_targets(own, *device) } else { Gatherer::new(own, *device) }
        });
        Ok(Owners { gatherers: gatherers.collect::<Result<_>>()?, owners })
    }

    /// Adds what was seen in some batches, in their order, on all devices at once. Each tensor is
    /// dropped when it is added.
    ///
    /// # Errors
    /// The first one in the order of what was seen.
    pub(super) fn add(&mut self, batches: Vec<Vec<Seen>>) -> Result<()> {
        let mut shares: Vec<Share<'_>> = self.gatherers.iter_mut().map(|sums| Share { sums, seen: Vec::new() }).collect();
        for (place, seen) in batches.into_iter().flatten().enumerate() {
            shares[self.owners[seen.source()]].seen.push((place, seen));
        }
        let failures = on_each(&mut shares, &|_, share| Ok(share.add()))?;
        match failures.into_iter().flatten().min_by_key(|(place, _)| *place) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// All sums, each on its device.
    pub(super) fn into_gatherer(self) -> Result<Gatherer> {
        let mut all = Gatherer::default();
        self.gatherers.into_iter().try_for_each(|sums| all.merge(sums))?;
        Ok(all)
    }
}

/// The sums of one device, and what is to be added to them.
struct Share<'a> {
    sums: &'a mut Gatherer,
    /// With the place in the order of all devices.
    seen: Vec<(usize, Seen)>,
}

impl Share<'_> {
    /// Adds everything; returns the first failure with its place.
    fn add(&mut self) -> Option<(usize, Error)> {
        let mut seen = std::mem::take(&mut self.seen).into_iter();
        seen.find_map(|(place, seen)| self.sums.add_seen(seen).err().map(|error| (place, error)))
    }
}

/// The bytes of the sums of each input, in execution order.
fn sizes(layers: &[&Layer], has_target: bool) -> Vec<(LayerInput, u64)> {
    let mut sizes: Vec<(LayerInput, u64)> = Vec::new();
    for layer in layers {
        let shape = layer.weight().size();
        let residual = if has_target { OutputResidual::bytes(&shape) } else { 0 };
        match sizes.iter_mut().find(|(input, _)| input == layer.input()) {
            Some((_, bytes)) => *bytes += residual,
            None => sizes.push((layer.input().clone(), Hessian::bytes(input_geometry(layer), &shape) + residual)),
        }
    }
    sizes
}

/// Deals inputs to devices, the largest first, each to the device with the fewest bytes so far.
fn deal(sizes: &[(LayerInput, u64)], devices: usize) -> BTreeMap<LayerInput, usize> {
    let mut largest_first: Vec<&(LayerInput, u64)> = sizes.iter().collect();
    largest_first.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let mut dealt = vec![0; devices];
    let mut owners = BTreeMap::new();
    for (input, bytes) in largest_first {
        let owner = (0..devices).min_by_key(|device| dealt[*device]).expect("a run has at least one device");
        dealt[owner] += bytes;
        owners.insert(input.clone(), owner);
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_dealt_by_their_bytes() {
        let input = |name: &str| LayerInput::Features(name.to_owned());
        let sizes = [("a", 2), ("b", 8), ("c", 3), ("d", 3)].map(|(name, bytes)| (input(name), bytes));
        let owners = |devices: usize| ["a", "b", "c", "d"].map(|name| deal(&sizes, devices)[&input(name)]);
        assert_eq!(owners(1), [0; 4]);
        assert_eq!(owners(2), [1, 0, 1, 1]);
        assert_eq!(owners(3), [1, 0, 1, 2]);
        assert_eq!(owners(5), [3, 0, 1, 2]);
    }
}
