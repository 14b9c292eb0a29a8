//! Times forwards of a UNet in each dtype, and in fp32 with TF32 allowed, and compares their
//! predictions with that in fp32.
//!
//! ```sh
//! dtypes MODEL_DIR [--device D] [--size PIXELS] [--rows N] [--repeat N]
//! ```
//!
//! Prints a line of JSON for each dtype: the seconds of each forward, the first of which is slower,
//! and the relative error of the prediction at three timesteps.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use sdxl_squeeze::calibration::Sample;
use sdxl_squeeze::device::{Placement, parse_device};
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use sdxl_squeeze::{Error, Result, allow_tf32};
use serde_json::json;
use tch::{Device, Kind, Tensor};

const TIMESTEPS: [f64; 3] = [900.0, 500.0, 100.0];

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let device = parse_device(&take_value(&mut args, "--device").unwrap_or("cpu".into()))?;
    let mut number = |name: &str, usual: i64| take_value(&mut args, name).and_then(|n| n.parse().ok()).unwrap_or(usual);
    let (size, rows, repeat) = (number("--size", 512), number("--rows", 16), number("--repeat", 3));
    let [model] = &args[..] else {
        return Err(Error::Argument("usage: dtypes MODEL_DIR [--device D] [--size PIXELS] [--rows N] [--repeat N]".into()));
    };
    let folder = PipelineFolder::open(Path::new(model))?;
    let conditioning = {
        let encoder = PromptEncoder::load(&folder, Placement { device, kind: Kind::Float })?;
        let prompts = vec!["a red fox in the snow, a photograph"; rows as usize];
        let guidances = Guidance::encode_all(&encoder, &folder, &prompts, None, 1.0, (size, size))?;
        let all: Vec<&Conditioning> = guidances.iter().map(|guidance| &guidance.conditioning).collect();
        Conditioning::join(&all)?.ok_or_else(|| Error::Argument("there are no rows".into()))?
    };
    let latent = size / folder.vae.scale();
    let sample = noise(&[rows, folder.unet.config().in_channels, latent, latent], 1, Kind::Float)?.f_to_device(device)?;
    let call = Sample { sample, timestep: 0.0, conditioning };
    let mut exact = Vec::new();
    for (dtype, kind, tf32) in [
        ("f32", Kind::Float, false),
        ("f32, with TF32", Kind::Float, true),
        ("f16", Kind::Half, false),
        ("bf16", Kind::BFloat16, false),
    ] {
        if !allow_tf32(tf32) {
            return Err(Error::Failed("this libtorch does not take the setting of TF32".into()));
        }
        let weights = folder.unet_weights()?;
        let unet = Unet::resident(folder.unet.clone(), weights.source(Placement { device, kind }), &Silent)?;
        let call = call.placed(Placement { device, kind })?;
        let (mut seconds, mut errors) = (Vec::new(), Vec::new());
        for (at, timestep) in TIMESTEPS.into_iter().enumerate() {
            for turn in 0..repeat {
                let start = Instant::now();
                let output = unet.predict(&call.sample, timestep, &call.conditioning)?;
                let output = output.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
                seconds.push(start.elapsed().as_secs_f64());
                if exact.len() == at {
                    exact.push(output.shallow_clone());
                }
                if turn == 0 {
                    errors.push(norm(&output.f_sub(&exact[at])?)? / norm(&exact[at])?);
                }
            }
        }
        println!("{}", json!({"dtype": dtype, "seconds": seconds, "relative_errors": errors, "notes": unet.beyond_half()}));
    }
    Ok(())
}

fn norm(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.f_norm()?.f_double_value(&[])?)
}

fn take_value(args: &mut Vec<String>, name: &str) -> Option<String> {
    let at = args.iter().position(|arg| arg == name)?;
    args.remove(at);
    (at < args.len()).then(|| args.remove(at))
}
