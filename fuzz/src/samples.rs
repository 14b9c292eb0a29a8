//! Reads calibration samples for a small UNet.

use std::sync::OnceLock;

use sdxl_squeeze::calibration::Samples;
use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::model::unet::UnetConfig;
use serde_json::Value;

use crate::choices::Choices;
use crate::layout::{self, DTYPES, Tensor};
use crate::scratch;

/// The config of a small UNet with 4 latent channels and text states of 40 numbers. Its added
/// embedding has 80 numbers: 32 of pooled text and 8 for each of 6 time ids.
fn config() -> &'static UnetConfig {
    static CONFIG: OnceLock<UnetConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let text = include_str!("../../tests/golden/base-like/unet/config.json");
        let Ok(Value::Object(entries)) = serde_json::from_str(text) else { panic!("the config is an object") };
        UnetConfig::parse(ConfigFile::from_entries("config.json".as_ref(), entries)).expect("the config is a UNet's")
    })
}

/// Runs one input: a file, or decisions for building samples with few faults.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let file = match choices.below(4) {
        0 => choices.rest().to_vec(),
        _ => made(&mut choices),
    };
    let path = scratch::file("samples.safetensors", &file);
    let wanted = usize::from(file.first().copied().unwrap_or(0)) % 5;
    let Ok(samples) = Samples::read(&path, config(), wanted) else { return };
    assert!(samples.calls.len() <= wanted);
    for call in &samples.calls {
        assert_eq!(call.sample.size()[1], config().in_channels);
        assert!(call.timestep.is_finite());
        for tensor in [&call.sample, &call.conditioning.encoder_hidden_states, &call.conditioning.text_embeds] {
            assert!(tensor.isfinite().all().int64_value(&[]) == 1, "what was read has numbers that are none");
        }
    }
    let _ = samples.shape();
}

fn made(choices: &mut Choices) -> Vec<u8> {
    let [n, b, h, w, s] = [0; 5].map(|_| choices.below(4) as u64);
    let shapes: [(&str, &[u64]); 5] = [
        ("sample", &[n, b, 4, h, w]),
        ("timestep", &[n]),
        ("encoder_hidden_states", &[n, b, s, 40]),
        ("text_embeds", &[n, b, 32]),
        ("time_ids", &[n, b, 6]),
    ];
    let mut tensors = Vec::new();
    for (name, shape) in shapes {
        let mut shape = shape.to_vec();
        if choices.rarely(16) {
            let at = choices.below(shape.len());
            shape[at] = choices.number();
        }
        if choices.rarely(32) {
            shape.insert(choices.below(shape.len()), 1);
        }
        let (dtype, bits) = if choices.rarely(8) { choices.of(&DTYPES) } else { ("F16", 16) };
        let bytes = shape.iter().try_fold(bits, |product, n| product.checked_mul(*n)).map_or(0, |bits| bits / 8);
        // Only some bytes of the data come from the input, because most values do not matter to the
        // reader.
        let mut data = vec![0x3c; bytes.min(1 << 14) as usize];
        let some = choices.bytes(usize::from(choices.clone().byte() % 16));
        data.iter_mut().zip(some).for_each(|(byte, new)| *byte = new);
        if !choices.rarely(32) {
            tensors.push(Tensor::new(name, dtype, &shape, data));
        }
    }
    if choices.rarely(16) {
        tensors.push(Tensor::any(choices, &["sample", "more"]));
    }
    layout::file(None, &tensors)
}
