//! `sdxl-squeeze export`.

use std::path::PathBuf;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::{Error, Result, export};

use super::progress::Reporter;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A container
    #[arg(value_name = "FILE.safetensors")]
    path: PathBuf,
    /// What to write: diffusers
    #[arg(long, value_name = "FORMAT")]
    to: String,
    /// The pipeline that the UNet belongs to: its other parts are copied
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: Args, reporter: &Reporter) -> Result<()> {
    if args.to != "diffusers" {
        return Err(Error::Argument(format!("unknown format `{}` (known: diffusers)", args.to)));
    }
    export::diffusers(&Container::open(&args.path)?, &args.model, &args.out, reporter)?;
    super::print(&format!("{}\n", args.out.display()))
}
