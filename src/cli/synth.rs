//! `sdxl-squeeze synth`.

use std::path::PathBuf;
use std::time::Instant;

use sdxl_squeeze::Result;
use sdxl_squeeze::device::parse_dtype;
use sdxl_squeeze::number;
use sdxl_squeeze::synth::{Preset, synthesize, synthesize_single_file};

use super::paths::Paths;
use super::progress::Reporter;
use super::stdout;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The architecture: sdxl-base, sdxl-refiner, sdxl-inpainting, sdxl-edit, lcm-sdxl, ssd-1b,
    /// vega, koala-700m, koala-1b or tiny
    #[arg(long, value_name = "NAME")]
    preset: String,
    /// The new folder, or with --single-file the new file
    #[arg(long, value_name = "DIR|FILE")]
    out: PathBuf,
    /// Write one checkpoint in LDM's names (.safetensors) with the weights that the folder would
    /// have
    #[arg(long)]
    single_file: bool,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Dtype of the weights: f32, f16 or bf16
    #[arg(long, value_name = "DTYPE", default_value = "f16")]
    dtype: String,
}

pub(super) fn run(args: Args, overwrite: bool, reporter: &Reporter) -> Result<()> {
    let start = Instant::now();
    let preset: Preset = args.preset.parse()?;
    Paths::default().writes("--out", Some(&args.out).filter(|_| args.single_file).map(PathBuf::as_path)).check_new(overwrite)?;
    let write = if args.single_file { synthesize_single_file } else { synthesize };
    write(preset, &args.out, args.seed, parse_dtype(&args.dtype)?, reporter)?;
    let peak = sdxl_squeeze::memory::peak().map_or(String::new(), |peak| format!(", peak memory {}", number::size(peak)));
    stdout::print(&format!("{}: {} in {}{peak}\n", args.out.display(), args.preset, number::time(start.elapsed().as_secs_f64())))
}
