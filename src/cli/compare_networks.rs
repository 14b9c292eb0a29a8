//! `sdxl-squeeze compare-networks`.

use std::path::PathBuf;

use sdxl_squeeze::Result;
use sdxl_squeeze::calibration::{PromptSet, settings};
use sdxl_squeeze::compare::{EmbeddingError, Judging, LatentError, NetworkComparison, PictureError, compare_networks};
use sdxl_squeeze::config::{CalibrationSection, read_prompts};
use sdxl_squeeze::container::Network;
use sdxl_squeeze::device::{Placement, parse_device, parse_dtype};
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder};

use super::beside_model::BesideModel;
use super::paths::Paths;
use super::progress::Reporter;
use super::{bundled, container, stdout, table};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The pipeline, as a folder or a single-file checkpoint
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    #[command(flatten)]
    with: BesideModel,
    /// Prompts to judge on, one a line
    #[arg(long, value_name = "FILE")]
    judge: PathBuf,
    /// Seed of the first picture; each further prompt has the next
    #[arg(long, value_name = "N", default_value_t = Judging::SEED)]
    judge_seed: u64,
    /// Denoising steps [default: 20, or the few of a distilled model]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Guidance scale; 1 turns guidance off [default: 5, or none for a distilled model]
    #[arg(long, value_name = "G")]
    guidance: Option<f64>,
    /// Height in pixels [default: the model's own]
    #[arg(long, value_name = "H", requires = "width")]
    height: Option<i64>,
    /// Width in pixels
    #[arg(long, value_name = "W", requires = "height")]
    width: Option<i64>,
    /// Where to compute: cpu, cuda, cuda:N or mps
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Precision: f32, f16 or bf16 (the VAE always decodes in f32)
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, reporter: &Reporter) -> Result<()> {
    let args = Args { model: bundled::found(args.model)?, ..args };
    let placement = Placement { device: parse_device(&args.device)?, kind: parse_dtype(&args.dtype)? };
    args.with.read_in(Paths::default().model("--model", Some(&args.model))).prompts("--judge", Some(&args.judge)).check()?;
    let files = args.with.files(args.model);
    let is_compressed = files.vae.as_deref().is_some_and(container::is_container);
    // A VAE that is no container is part of both.
    let own = ModelFiles {
        text_encoder: None,
        text_encoder_2: None,
        vae: files.vae.clone().filter(|_| !is_compressed),
        ..files.clone()
    };
    let (own, compressed) = (PipelineFolder::open_files(&own)?, PipelineFolder::open_files(&files)?);
    let section = CalibrationSection {
        steps: args.steps,
        guidance: args.guidance,
        seed: args.judge_seed,
        size: args.height.zip(args.width),
        ..CalibrationSection::default()
    };
    let set = PromptSet { prompts: read_prompts(&args.judge)?, ..settings(&own, &section)? };
    let compared = compare_networks(&own, &compressed, &set, placement, reporter)?;
    if args.json {
        return stdout::print_json(&compared);
    }
    stdout::print(&tables(&compared))
}

fn tables(compared: &NetworkComparison) -> String {
    let percent = |share: f64| format!("{:.3} %", 100.0 * share);
    let mut text = String::new();
    if !compared.embeddings.is_empty() {
        let mut rows = table::new(&["text encoder", "hidden_embeds", "pooled_outputs"]);
        for EmbeddingError { network, hidden_embeds, pooled_outputs } in &compared.embeddings {
            rows.add_row([network.to_string(), percent(*hidden_embeds), pooled_outputs.map_or(String::new(), percent)]);
        }
        text = format!("{}\n\n", table::right_aligned(rows, 1));
    }
    if let Some(LatentError { means, deviations }) = compared.latents {
        let mut rows = table::new(&["VAE's encoder", "means", "standard deviations"]);
        rows.add_row(["latents".to_owned(), percent(means), percent(deviations)]);
        text += &format!("{}\n\n", table::right_aligned(rows, 1));
    }
    let mut rows = table::new(&["compressed", "PSNR, dB", "lowest", "SSIM"]);
    for PictureError { networks, psnr, lowest_psnr, ssim } in &compared.pictures {
        let names: Vec<&str> = networks.iter().copied().map(Network::name).collect();
        rows.add_row([names.join(", "), format!("{psnr:.2}"), format!("{lowest_psnr:.2}"), format!("{ssim:.4}")]);
    }
    let about = "relative errors of the encoders' outputs, of the VAE's on the model's own pictures; pictures by the same UNet against those of the model's own networks";
    format!("{text}{}\n({} prompts; {about})\n", table::right_aligned(rows, 1), compared.prompts)
}
