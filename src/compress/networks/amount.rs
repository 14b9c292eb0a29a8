//! How much a network is calibrated on, and which of the texts.

use squeeze_base::error::Result;
use squeeze_container::Network;

use crate::config::{RunConfig, read_prompts};

/// `count` of the texts that a config names for calibration, evenly: the prompts, the captions, and
/// the empty text of negative prompts.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn texts(config: &RunConfig, count: usize) -> Result<Vec<String>> {
    let mut texts = config.calibration.prompts.load()?;
    if let Some(path) = &config.calibration.captions {
        texts.extend(read_prompts(path)?);
    }
    let mut texts = evenly(texts, count.saturating_sub(1).max(1));
    texts.push(String::new());
    Ok(texts)
}

/// The number of texts or pictures that `network` is calibrated on, if `nsamples` are asked for.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn count(config: &RunConfig, network: Network, nsamples: usize) -> Result<usize> {
    match network {
        Network::Vae => Ok(config.calibration.prompts.load()?.len().min(nsamples)),
        Network::Unet | Network::TextEncoder | Network::TextEncoder2 => Ok(texts(config, nsamples)?.len()),
    }
}

/// `count` of `items`, evenly.
pub(super) fn evenly<T: Clone>(items: Vec<T>, count: usize) -> Vec<T> {
    let all = items.len();
    if all <= count { items } else { (0..count).map(|k| items[k * all / count].clone()).collect() }
}
