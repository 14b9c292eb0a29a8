//! Draws a picture, with the UNet of a pipeline or of a container.
//!
//! ```sh
//! cargo run --release --example generate -- models/emoji-sdxl "a picture of an owl!" owl.png
//! ```
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};

use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::{GenerateRequest, PipelineFolder, PromptOptions, generate};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::{Error, Result};

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, prompt, out, container) = match &arguments[..] {
        [model, prompt, out] => (model, prompt, out, None),
        [model, prompt, out, container] => (model, prompt, out, Some(PathBuf::from(container))),
        _ => return Err(Error::Argument("usage: generate MODEL_DIR PROMPT OUT.png [CONTAINER]".into())),
    };

    let folder = PipelineFolder::open(Path::new(model))?;
    let request = GenerateRequest {
        prompt: prompt.clone(),
        negative_prompt: None,
        seed: 231,
        steps: 30,
        guidance: 4.0,
        size: None,
        original_size: None,
        target_size: None,
        guidance_rescale: 0.0,
        scheduler: None,
        timestep_spacing: None,
        eta: 0.0,
        low_memory: false,
        unet: container,
        unverified: false,
        prompts: PromptOptions::default(),
        image: None,
    };
    let generated = generate(&folder, &request, Placement::CPU, &Silent)?;
    generated.picture.write_png(Path::new(out), &[])?;
    let (height, width) = generated.size;
    println!("{out}: {width}x{height} pixels, {}", generated.scheduler);
    Ok(())
}
