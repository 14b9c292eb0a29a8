//! Checks of a container against the architecture of its network.

use std::path::Path;

use sdxl_model::checkpoint::ConfigFile;
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use squeeze_base::error::Result;
use squeeze_container::{Container, Network, Verification};

use super::network_weights::StoredNetwork;
use super::unet_weights::UnetWeights;

/// Checks the container `path`: that it has exactly the tensors of its architecture, and everything
/// that [`Container::verify`] checks.
///
/// # Errors
/// [`Error::Read`](squeeze_base::Error::Read); [`Error::BadFile`](squeeze_base::Error::BadFile) or
/// [`Error::Tensors`](squeeze_base::Error::Tensors) naming the problem and the weight.
pub fn verify(path: &Path) -> Result<Verification> {
    let container = Container::open_unverified(path)?;
    check_architecture(&container)?;
    container.verify()
}

/// Checks that a container has exactly the tensors of its architecture. A VAE's may lack the
/// encoder.
///
/// # Errors
/// [`Error::ConfigKey`](squeeze_base::Error::ConfigKey) if the architecture is not implemented;
/// [`Error::Tensors`](squeeze_base::Error::Tensors) naming the tensors that are missing, misshapen
/// or surplus.
pub fn check_architecture(container: &Container) -> Result<()> {
    let config = ConfigFile::from_entries(container.path(), container.info().config.clone());
    match container.info().network {
        Network::Unet => UnetWeights::from(container).chain().map(drop),
        Network::TextEncoder | Network::TextEncoder2 => {
            container.check_against(&ClipText::tensors(&TextConfig::parse(config)?)?, &|_| false)
        }
        Network::Vae => {
            let config = VaeConfig::parse(config)?;
            let decoder = VaeDecoder::tensors(&config)?;
            container.check_against(&decoder, &VaeDecoder::is_unused)?;
            match container.shapes().any(|(name, _)| VaeDecoder::is_unused(name)) {
                true => container.check_against(&VaeEncoder::tensors(&config)?, &VaeEncoder::is_unused),
                false => Ok(()),
            }
        }
    }
}
