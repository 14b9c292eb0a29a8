//! Whether text encoders and VAE fit on the disk, together with the UNet of the same run.

use std::path::PathBuf;

use squeeze_base::error::Result;
use squeeze_base::number;
use squeeze_base::output::parent;

use super::prepare::PreparedNetwork;
use crate::compress::workspace::workspace_folder;
use crate::plan::{self, Disk};

/// Checks that the files of a run fit on the disk: those of `networks`, which come first and keep
/// their finished layers until all is done, and those of the `unet`, if it is compressed too.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::Error::Argument) with the numbers; if the weights cannot be
/// read.
pub fn check_disk_of(networks: &[PreparedNetwork<'_>], unet: Option<&Disk>) -> Result<()> {
    let Some(first) = networks.first() else { return Ok(()) };
    let disks = networks.iter().map(|network| Ok(network.plan()?.disk)).collect::<Result<Vec<_>>>()?;
    let mut paths: Vec<PathBuf> = networks.iter().map(|network| network.path().to_owned()).collect();
    paths.extend(unet.map(|_| first.path().with_file_name("unet.squeezed.safetensors")));
    let there = paths.iter().map(|path| plan::taken(&workspace_folder(path))).sum();
    let needed = needed(&disks, unet);
    let which = if unet.is_some() { "text encoders, VAE and UNet" } else { "text encoders and VAE" };
    let what = format!("{} on the disk: finished layers and results of {which}", number::size(needed));
    plan::check_disk(parent(first.path()), needed, there, &what)
}

/// The most bytes on the disk at once.
fn needed(networks: &[Disk], unet: Option<&Disk>) -> u64 {
    let (mut before, mut most) = (0, 0);
    for disk in networks.iter().chain(unet) {
        most = most.max(before + disk.peak());
        before += disk.samples + disk.parts + disk.result;
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_finished_before_stays_on_the_disk() {
        let of = |parts, result| Disk { samples: 1, carries: 0, carries_left: 0, parts, result };
        // One network: its layers, and the result twice while it is put in its place.
        assert_eq!(needed(&[of(10, 20)], None), 51);
        // The second one's, beside the layers and the result of the first.
        assert_eq!(needed(&[of(10, 20), of(5, 8)], None), 31 + 22);
        // A large first network takes most itself.
        assert_eq!(needed(&[of(10, 20), of(1, 1)], None), 51);
        assert_eq!(needed(&[of(10, 20)], Some(&Disk { carries: 900, ..of(5, 8) })), 31 + 906);
        assert_eq!(needed(&[], None), 0);
    }
}
