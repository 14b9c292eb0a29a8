//! Writes the UNet of a container as a Core ML package for iOS 18, without a Mac.
//!
//! ```sh
//! cargo run --release --example export_coreml -- unet.squeezed.safetensors unet.mlpackage
//! ```
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{self, Layout, Options};
use sdxl_squeeze::pipeline::UnetWeights;
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::{Error, Result};

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [path, out] = &arguments[..] else {
        return Err(Error::Argument("usage: export_coreml FILE.safetensors OUT.mlpackage".into()));
    };

    let container = Container::open(path)?;
    let weights = UnetWeights::from(&container);
    let chain = weights.chain()?;
    // Apple's layout for the Neural Engine; both halves of guidance in one call.
    let options = Options { layout: Layout::SplitEinsum, batch: 2, ..Options::new(chain.config()) };
    let written = coreml::write(weights, &options, out, &Silent)?;
    println!("{}: {} bytes, {} compressed weights", out.display(), written.bytes, written.compressed);
    Ok(())
}
