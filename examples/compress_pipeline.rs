//! Compresses the UNet of a pipeline as a config says.
//!
//! ```sh
//! cargo run --release --example compress_pipeline -- \
//!     models/emoji-sdxl configs/emoji/tutorial-4bit-gs16.yaml unet.squeezed.safetensors
//! ```
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use sdxl_squeeze::compress::{Prepared, run};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::recipe::RunOptions;
use sdxl_squeeze::{Error, Result};

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, config, out] = &arguments[..] else {
        return Err(Error::Argument("usage: compress_pipeline MODEL_DIR CONFIG.yaml OUT.safetensors".into()));
    };

    let folder = PipelineFolder::open(model)?;
    let config = RunConfig::read(config)?;
    let options = RunOptions::of(&config)?;
    // Everything that can be checked before the first computation is checked here.
    let prepared = Prepared::new(&folder, &config, false, &options, out)?;
    println!("planned: {} bytes", prepared.plan().payload_bytes);

    let report = run(&prepared, None, &Silent)?;
    println!("written: {} bytes, {:.2} bits a weight", report.bytes, report.bits_per_weight);
    for note in &report.notes {
        println!("note: {note}");
    }
    Ok(())
}
