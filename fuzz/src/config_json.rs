//! Reads the config of a UNet, a VAE, a text encoder or a sampler, and computes what follows from
//! it: the tensors, the scale of latents, or the timesteps.

use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::model::scheduler::{SchedulerChoice, SchedulerConfig};
use sdxl_squeeze::model::text::{ClipText, TextConfig};
use sdxl_squeeze::model::unet::{UnetChain, UnetConfig};
use sdxl_squeeze::model::vae::{VaeConfig, VaeEncoder};

use crate::choices::Choices;
use crate::scratch;

/// Runs one input. Its first byte chooses the kind of config, and the other bytes are the file.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let whose = choices.below(4);
    let path = scratch::file("config.json", choices.rest());
    match whose {
        0 => {
            if let Ok(config) = UnetConfig::read(&path) {
                // The program lists the tensors of every UNet whose config it has read.
                if let Ok(tensors) = UnetChain::new(config).tensors() {
                    assert!(tensors.iter().all(|tensor| tensor.shape.iter().all(|n| *n > 0)));
                }
            }
        }
        1 => {
            let Ok(file) = ConfigFile::read(&path) else { return };
            if let Ok(config) = TextConfig::parse(file) {
                let _ = ClipText::tensors(&config);
            }
        }
        2 => {
            if let Ok(config) = VaeConfig::read(&path) {
                assert!(config.scale() > 0);
                let _ = VaeEncoder::tensors(&config);
            }
        }
        _ => {
            let Ok(config) = SchedulerConfig::read(&path) else { return };
            let _ = config.sigmas(&[-1.0, 0.0, 0.5, 500.0, 999.0, f64::MAX, f64::NAN]);
            for steps in [1, 4, 30] {
                let _ = config.scheduler(steps);
            }
            for name in SchedulerChoice::NAMES {
                if let Ok(config) = config.with_override(name) {
                    let _ = config.scheduler(4);
                }
            }
        }
    }
}
