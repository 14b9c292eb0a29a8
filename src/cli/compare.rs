//! `sdxl-squeeze compare`.

use std::path::PathBuf;

use sdxl_squeeze::calibration::PromptSet;
use sdxl_squeeze::compare::{Entry, compare};
use sdxl_squeeze::config::read_prompts;
use sdxl_squeeze::output::write_file;
use sdxl_squeeze::report;
use sdxl_squeeze::{Error, Result};

use super::compress::{LimitArgs, OverrideArgs};
use super::progress::Reporter;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The runs to compare
    #[arg(value_name = "CONFIG.yaml", required = true)]
    configs: Vec<PathBuf>,
    /// The folder for report.html, report.json, the contact sheet and the containers
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Prompts to judge on, one a line; none of them may be calibrated on
    #[arg(long, value_name = "FILE")]
    judge: PathBuf,
    /// Seed of the first judged picture; each further one has the next
    #[arg(long, value_name = "N", default_value_t = 231)]
    judge_seed: u64,
    /// UNet calls that the UNet's error is measured on
    #[arg(long, value_name = "N", default_value_t = 48)]
    held_out: usize,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

pub fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let mut entries = Vec::new();
    let mut place = None;
    for path in &args.configs {
        let (config, folder) = args.overrides.clone().resolve(path)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        place = Some((folder, args.limits.options(&config)?));
        entries.push(Entry { name, config });
    }
    let Some((folder, options)) = place else { return Err(Error::Argument("there is nothing to compare".into())) };
    let calibration = &entries[0].config.calibration;
    let judged = PromptSet {
        prompts: read_prompts(&args.judge)?,
        seed: args.judge_seed,
        steps: calibration.steps,
        guidance: calibration.guidance,
        size: folder.picture_size(calibration.size)?,
    };
    std::fs::create_dir_all(&args.out).map_err(Error::write(&args.out))?;
    let found = compare(&folder, &entries, judged, args.held_out, &options, &args.out, reporter)?;
    let written = report::write(&found, &args.out)?;
    write_file(&args.out.join("table.md"), |out| out.write_all(report::table::markdown(&found).as_bytes()))?;
    super::print(&format!("{}\n{}\n", report::table::plain(&found), written.html.display()))
}
