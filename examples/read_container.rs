//! Lists the compressed weights of a container and decodes one of them.
//!
//! ```sh
//! cargo run --release --example read_container -- unet.squeezed.safetensors
//! ```
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::{Error, Result};

fn main() -> Result<()> {
    let usage = || Error::Argument("usage: read_container FILE.safetensors".into());
    let path = std::env::args_os().nth(1).map(PathBuf::from).ok_or_else(usage)?;

    // Opening checks the hashes of all data, which reads the whole file once.
    let container = Container::open(&path)?;
    for layer in container.layers() {
        let palette = match layer.bits {
            Some(bits) => format!("{bits}-bit palettes"),
            None => "no palettes".to_owned(),
        };
        println!("{} {:?}: {:.1} % pruned, {palette}, {} bytes", layer.name, layer.shape, 100.0 * layer.sparsity, layer.bytes);
    }

    let name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let values = container.decode(name)?;
    let zeros = values.iter().filter(|value| value.to_f32() == 0.0).count();
    println!("decoded {name}: {} values in fp16, {zeros} of them zero", values.len());
    Ok(())
}
