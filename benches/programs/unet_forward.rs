//! Times single forwards of a UNet on the inputs in a file of `tests/golden/make_unet_forward.py`,
//! and compares the output with the one in the file.
//!
//! ```sh
//! unet_forward MODEL_DIR INPUTS.safetensors [--low-memory] [--repeat N] [--device D]
//! ```
//!
//! Prints one line of JSON: seconds to load, seconds of each forward, peak resident bytes, and the
//! relative error.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use sdxl_squeeze::device::{Placement, parse_device};
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::{Error, Result};
use serde_json::json;
use tch::{Kind, Tensor};

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let low_memory = take_flag(&mut args, "--low-memory");
    let repeat = take_value(&mut args, "--repeat").and_then(|n| n.parse().ok()).unwrap_or(1);
    let device = parse_device(&take_value(&mut args, "--device").unwrap_or("cpu".into()))?;
    let [model, inputs] = &args[..] else {
        let usage = "usage: unet_forward MODEL_DIR INPUTS.safetensors [--low-memory] [--repeat N] [--device D]";
        return Err(Error::Argument(usage.into()));
    };
    let placement = Placement { device, kind: Kind::Float };
    let tensors: BTreeMap<String, Tensor> = Tensor::read_safetensors(inputs)?.into_iter().collect();
    let input = |name: &str| tensors[name].to_device(device).to_kind(Kind::Float);
    let conditioning = Conditioning {
        encoder_hidden_states: input("encoder_hidden_states"),
        text_embeds: input("text_embeds"),
        time_ids: input("time_ids"),
        timestep_cond: None,
    };
    let timestep = input("timestep").double_value(&[]);

    let start = Instant::now();
    let folder = PipelineFolder::open(Path::new(model))?;
    let weights = folder.unet_weights()?;
    let source = weights.source(placement);
    let unet = if low_memory {
        Unet::one_at_a_time(folder.unet.clone(), source)?
    } else {
        Unet::resident(folder.unet.clone(), source, &Silent)?
    };
    let load = start.elapsed().as_secs_f64();
    let mut forwards = Vec::new();
    let mut error = f64::NAN;
    for _ in 0..repeat {
        let start = Instant::now();
        let output = unet.forward(&input("sample"), timestep, &conditioning, &mut Unobserved)?;
        // Reading a value waits until the device is done.
        error = (&output - input("output")).norm().double_value(&[]) / input("output").norm().double_value(&[]);
        forwards.push(start.elapsed().as_secs_f64());
    }
    println!(
        "{}",
        json!({"load_s": load, "forward_s": forwards, "peak_bytes": sdxl_squeeze::memory::peak(), "relative_error": error})
    );
    Ok(())
}

fn take_flag(args: &mut Vec<String>, name: &str) -> bool {
    let before = args.len();
    args.retain(|arg| arg != name);
    args.len() < before
}

fn take_value(args: &mut Vec<String>, name: &str) -> Option<String> {
    let at = args.iter().position(|arg| arg == name)?;
    args.remove(at);
    (at < args.len()).then(|| args.remove(at))
}
