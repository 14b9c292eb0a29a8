//! `sdxl-squeeze verify`.

use std::path::PathBuf;

use sdxl_squeeze::Result;
use sdxl_squeeze::container::verify;

use sdxl_squeeze::number::{count, size as bytes};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A container
    #[arg(value_name = "FILE.safetensors")]
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let found = verify(&args.path)?;
    if args.json {
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&found).unwrap_or_default()));
    }
    super::print(&format!(
        "{}: whole, every hash holds\n{} compressed weights of {} elements, {:.3} bits each, {:.2} % zero; {} tensors in fp16; {}\n",
        args.path.display(),
        found.weights,
        count(found.weight_elements),
        found.bits_per_weight,
        100.0 * found.sparsity,
        found.tensors,
        bytes(found.bytes),
    ))
}
