//! `sdxl-squeeze plan`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::calibration::{Calls, PromptSet, defaults, encoder_bytes, expected_calls, hint, settings};
use sdxl_squeeze::compress::{NetworkPlan, PreparedNetwork, plan_of_run};
use sdxl_squeeze::config::{BudgetSection, CalibrationSection, RunConfig, read_prompts};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::text::CLIP_LENGTH;
use sdxl_squeeze::model::unet::{UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{DenseUnet, ImageChannels, PipelineFolder, UnetFolder};
use sdxl_squeeze::plan::{Card, CarriesIn, Drawing, Memory, Plan, TuningPlan, measured_rate};
use sdxl_squeeze::recipe::{Recipe, RunOptions};
use sdxl_squeeze::synth::Preset;
use sdxl_squeeze::{Error, Result, number};
use tch::Device;

use super::edits::{Edits, model_of};
use super::limits::LimitArgs;
use super::opened::Opened;
use super::{stdout, table};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The runs to plan
    #[arg(value_name = "CONFIG.yaml", required = true)]
    configs: Vec<PathBuf>,
    /// Plan for an architecture instead of a model: sdxl-base, sdxl-refiner, sdxl-inpainting,
    /// sdxl-edit, lcm-sdxl, ssd-1b, vega, koala-700m or koala-1b
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    architecture: Option<Preset>,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// A UNet to plan for.
struct Target {
    chain: UnetChain,
    calls: Calls,
    /// Calls for each picture.
    each: usize,
    /// How the samples are drawn, in a sentence; `None` if they are not drawn.
    drawn: Option<Result<String>>,
    /// How much is drawn and encoded, as far as it is known.
    drawing: Drawing,
    /// Bytes of the text encoders, as far as they are known.
    encoders: u64,
    /// Bytes of an element in memory, by tensor.
    bytes_of: Box<dyn Fn(&str) -> usize>,
}

pub(super) fn run(args: Args) -> Result<()> {
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for path in &args.configs {
        let config = args.edits.config(path)?;
        let options = args.limits.options(&config)?;
        let networks = planned_networks(&config, &options, args.architecture)?;
        if !config.compresses_unet() {
            let name = path.file_stem().expect("a file that was read has a name").to_string_lossy().into_owned();
            match args.json {
                true => json.push(serde_json::json!({ "config": name, "networks": networks })),
                false => stdout::print(&format!("# {name}\n\n{}\n", of_networks(&networks, options.placement().device)?))?,
            }
            continue;
        }
        let target = match args.architecture {
            Some(preset) => of_architecture(preset, &config)?,
            None => of_model(&config, options.placement())?,
        };
        let recipe = Recipe::new(&config, &target.chain)?;
        if config.compresses_unet() {
            recipe.check_not_empty()?;
        }
        let drawn = target.drawn.filter(|_| recipe.needs_samples()).transpose()?;
        let memory = Memory::new(options.memory_budget()?, options.kind, options.placement().device);
        let memory = memory.with_encoders(target.encoders);
        let plan = plan_of_run(&target.chain, &config, &recipe, Some(target.calls), memory, &target.bytes_of)?;
        let tuning = match &config.tune {
            Some(section) => {
                let plan = TuningPlan::new(
                    &target.chain,
                    section,
                    &recipe.layers,
                    (target.calls, target.each),
                    memory,
                    &target.bytes_of,
                )?;
                Some((section, plan))
            }
            None => None,
        };
        let Placement { device, kind } = options.placement();
        let seconds = match device {
            Device::Cpu => plan.work.seconds(measured_rate(device)?),
            _ => Card::measure(device, kind)?.seconds(&plan, &target.drawing),
        };
        let name = path.file_stem().expect("a file that was read has a name").to_string_lossy().into_owned();
        if args.json {
            let mut row = serde_json::json!({ "config": name, "expected_seconds": seconds, "plan": plan });
            if let Some(search) = config.budget.as_ref().and_then(|budget| budget.search.as_ref()) {
                row["most_solves"] = serde_json::json!(search.solves);
            }
            if !networks.is_empty() {
                row["networks"] = serde_json::json!(networks);
            }
            if let Some((_, tuning)) = tuning {
                row["tuning"] = serde_json::json!(tuning);
            }
            json.push(row);
        } else {
            let counts_drawing = device != Device::Cpu && target.drawing.calls > 0;
            let time = Time { seconds, counts_drawing };
            stdout::print(&detail(&name, &recipe, &plan, time, drawn.as_deref()))?;
            if let Some(budget) = &config.budget {
                stdout::print(&format!("{}\n\n", of_budget(budget, &plan)))?;
            }
            if !networks.is_empty() {
                stdout::print(&format!("{}\n", of_networks(&networks, device)?))?;
            }
            if let Some((section, tuning)) = tuning {
                stdout::print(&format!("{}; its time is not counted above\n\n", tuning.text(section)))?;
            }
        }
        rows.push((name, plan, seconds));
    }
    if args.json {
        return stdout::print_json(&json);
    }
    if rows.len() > 1 {
        stdout::print(&summary(&rows))?;
    }
    Ok(())
}

/// The plans of the networks beside the UNet that `config` compresses. Of an architecture alone
/// nothing is known of them.
fn planned_networks(config: &RunConfig, options: &RunOptions, architecture: Option<Preset>) -> Result<Vec<NetworkPlan>> {
    if config.text_encoders.is_none() && config.vae.is_none() {
        return Ok(Vec::new());
    }
    if architecture.is_some() {
        return Err(Error::Argument(
            "--architecture plans the UNet alone; text encoders and VAE (`text_encoders`, `vae`) are planned with --model".into(),
        ));
    }
    let folder = model_of(config)?;
    let networks = PreparedNetwork::all(&folder, config, options, Path::new(""))?;
    networks.iter().map(PreparedNetwork::plan).collect()
}

/// A table of the networks beside the UNet.
fn of_networks(networks: &[NetworkPlan], device: Device) -> Result<String> {
    let rate = measured_rate(device)?;
    let mut rows = table::new(&["network", "layers", "bytes", "in fp16", "peak memory", "on the disk", "TFLOP", "time"]);
    for NetworkPlan { network, layers, payload_bytes, dense_bytes, peak_bytes, disk, work } in networks {
        rows.add_row([
            network.to_string(),
            layers.to_string(),
            number::count(*payload_bytes),
            number::count(*dense_bytes),
            number::size(*peak_bytes),
            number::size(disk.peak()),
            number::fixed(2e-12 * work.multiply_adds(), 2),
            number::time(work.seconds(rate)),
        ]);
    }
    Ok(format!(
        "{}\n(memory and time by estimate; the time does not count drawing latents for the VAE)\n",
        table::right_aligned(rows, 1)
    ))
}

/// A sentence on how a budget changes the plan.
fn of_budget(budget: &BudgetSection, plan: &Plan) -> String {
    let choosing = "choosing them takes one more pass over the samples, and a trial of several settings for every layer";
    let Some(bytes) = budget.bytes(plan) else {
        let solves = budget.search.as_ref().map_or(1, |search| search.solves);
        return format!(
            "the budget gives each layer settings of its own; {choosing}. The size that reaches the target is searched for: the run \
             compresses to up to {solves} sizes and draws the prompts that each is judged on. Time and disk above are those of one \
             of them, at the size of the config as it is; a second container is on the disk meanwhile"
        );
    };
    format!(
        "the budget gives each layer settings of its own, so that all take {} ({} bytes) instead of the {} above; {choosing}",
        number::size(bytes),
        number::count(bytes),
        number::size(plan.payload_bytes)
    )
}

fn of_architecture(preset: Preset, config: &RunConfig) -> Result<Target> {
    // SDXL is published in fp16.
    Ok(of_unet(UnetConfig::parse(preset.unet_config())?, config, Box::new(|_| 2)))
}

/// A UNet of which no pipeline is known.
fn of_unet(unet: UnetConfig, config: &RunConfig, bytes_of: Box<dyn Fn(&str) -> usize>) -> Target {
    let [height, width] = config.calibration.size.map_or(unet.sample_size, |(height, width)| [height / 8, width / 8]);
    // Every preset predicts all of the latents' channels.
    let channels = ImageChannels::of(unet.in_channels, unet.out_channels);
    let calls = Calls {
        count: config.calibration.calibration_nsamples,
        batch: channels
            .map_or(1, |channels| channels.rows(&unet, config.calibration.guidance.unwrap_or(CalibrationSection::GUIDANCE))),
        height,
        width,
        text: CLIP_LENGTH,
    };
    Target {
        chain: UnetChain::new(unet),
        calls,
        each: config.calibration.steps.unwrap_or(CalibrationSection::STEPS),
        drawn: None,
        drawing: Drawing::default(),
        encoders: 0,
        bytes_of,
    }
}

/// A UNet alone. A config that needs more is refused, as a run would refuse it.
fn of_alone(alone: UnetFolder, config: &RunConfig, placement: Placement) -> Result<Target> {
    if let Some(what) = Recipe::new(config, &alone.chain)?.needs_pipeline(config) {
        DenseUnet::from(&alone).pipeline(what)?;
    }
    let UnetFolder { chain, weights, .. } = alone;
    let bytes_of = move |name: &str| weights.narrow_bytes(name, placement).expect("the folder's tensors were checked");
    Ok(of_unet(chain.config().clone(), config, Box::new(bytes_of)))
}

fn of_model(config: &RunConfig, placement: Placement) -> Result<Target> {
    let folder = match Opened::of(config)? {
        Opened::Unet(alone) => return of_alone(*alone, config, placement),
        Opened::Pipeline(folder) => *folder,
    };
    let weights = folder.unet_weights()?;
    let mut calls = expected_calls(&folder, &config.calibration)?;
    let mut drawn = None;
    let mut drawing = Drawing::default();
    if let Some(captions) = &config.calibration.captions {
        // A plan can be made before they are there.
        drawing.encoded += read_prompts(captions).map_or(0, |lines| lines.len().min(config.calibration.captions_nsamples)) as u64;
    }
    if config.calibration.samples.is_none() {
        let set = settings(&folder, &config.calibration)?;
        // A plan can be made before the prompts are there.
        if let (Ok(prompts), Ok(each)) = (config.calibration.prompts.load(), set.calls()) {
            calls.count = calls.count.min(prompts.len().saturating_mul(set.used_calls()?));
            let prompts = prompts.len().min(calls.count);
            drawing.calls = prompts.saturating_mul(each) as u64;
            drawing.batches = calls.drawn_batches(prompts).saturating_mul(each) as u64;
            drawing.encoded += prompts as u64;
        }
        drawn = Some(of_drawing(&set, &folder, config));
    }
    let encoders = encoder_bytes(&folder, placement.kind.elt_size_in_bytes() as u64)?;
    let bytes_of = move |name: &str| weights.narrow_bytes(name, placement).expect("`unet_weights` has checked every tensor");
    let each = settings(&folder, &config.calibration)?.calls()?;
    Ok(Target { chain: folder.unet, calls, each, drawn, drawing, encoders, bytes_of: Box::new(bytes_of) })
}

/// A sentence on how calibration draws its samples: the sampler, its steps and the guidance, and
/// what a distilled model's own are chosen by.
fn of_drawing(set: &PromptSet, folder: &PipelineFolder, config: &RunConfig) -> Result<String> {
    let calls = set.calls()?;
    let calls = if calls == set.steps { String::new() } else { format!(" ({calls} calls of the UNet)") };
    let calls = match set.used_calls()? {
        used if used == set.calls()? => calls,
        used => format!("{calls}, of whose calls the last {used} give samples (denoising_start {})", set.denoising_start),
    };
    let rescale = if set.guidance_rescale > 0.0 { format!(" rescaled by {}", set.guidance_rescale) } else { String::new() };
    let skip = if set.reading.clip_skip > 0 { format!(", clip_skip {}", set.reading.clip_skip) } else { String::new() };
    let reading = if set.reading.long_prompts { skip + ", long prompts in pieces" } else { skip };
    let section = &config.calibration;
    let defaults = defaults(folder);
    let hint = hint(&defaults, section).map_or(String::new(), |hint| format!("; {hint}"));
    let why = match (defaults.why, section.steps, section.guidance) {
        (None, _, _) | (_, Some(_), Some(_)) => String::new(),
        (Some(why), None, None) => format!("; steps and guidance are the model's own: {why}"),
        (Some(why), None, Some(_)) => format!("; the steps are the model's own: {why}"),
        (Some(why), Some(_), None) => format!("; the guidance is the model's own: {why}"),
    };
    Ok(format!(
        "drawn by {} in {} steps{calls} at guidance {}{rescale}{reading}{why}{hint}",
        set.scheduler.class(),
        set.steps,
        set.guidance
    ))
}

/// What the peak of a GPU's memory leaves out, if anything.
fn waiting(plan: &Plan) -> String {
    let mut text = String::new();
    if plan.host_bytes > 0 {
        let hessians = if plan.hessians_wait { ", where Hessians wait" } else { "" };
        text += &format!(", and {} of the host's{hessians}", number::size(plan.host_bytes));
    }
    if plan.drawing_bytes > 0 {
        text += &format!(" ({} at least to encode prompts and draw samples)", number::size(plan.drawing_bytes));
    }
    text
}

/// The time of a run.
struct Time {
    seconds: f64,
    /// Whether the drawing of samples is counted.
    counts_drawing: bool,
}

fn detail(name: &str, recipe: &Recipe, plan: &Plan, time: Time, drawn: Option<&str>) -> String {
    let mut text = format!("# {name}\n\n");
    let mut rules = table::new(&["rule", "matches", "decides"]);
    for rule in &recipe.resolution.rules {
        rules.add_row([
            format!("{:?}: {}", rule.section, rule.rule).to_lowercase(),
            rule.matched.to_string(),
            rule.decided.to_string(),
        ]);
    }
    text += &table::right_aligned(rules, 1);
    text += "\n\n";
    let heads =
        ["stage", "layers", "pruned", "palettized", "weights", "stored", "in memory", "Hessians", "passes", "peak", "TFLOP"];
    let mut stages = table::new(&heads);
    for stage in &plan.stages {
        stages.add_row([
            stage.name.clone(),
            stage.layers.to_string(),
            stage.pruned.to_string(),
            stage.palettized.to_string(),
            number::count(stage.elements),
            number::size(stage.stored_bytes),
            number::size(stage.resident_bytes),
            number::size(stage.hessian_bytes),
            stage.passes.to_string(),
            number::size(stage.peak_bytes),
            number::fixed(2e-12 * stage.work.multiply_adds(), 2),
        ]);
    }
    text += &table::right_aligned(stages, 1);
    for finding in &recipe.resolution.findings {
        text += &format!("\nnote: {finding}");
    }
    let work = plan.work;
    let tera = |multiply_adds: f64| number::fixed(2e-12 * multiply_adds, 1);
    text += &match plan.calls {
        None => "\n\nno calibration: no layer needs it".to_owned(),
        Some(Calls { count, batch, height, width, .. }) => {
            let carries = match plan.carries {
                CarriesIn::Files => "files",
                CarriesIn::Host => "the host's memory",
                CarriesIn::Memory | CarriesIn::Nowhere => "memory",
            };
            format!(
                "\n\n{count} samples of {batch} x {height}x{width} latents{}; {} of carries between stages, in {carries}\n{} TFLOP: {} forwards, {} Hessians, {} factors, {} sweeps and errors",
                drawn.map_or(String::new(), |drawn| format!(", {drawn}")),
                number::size(plan.carry_bytes),
                tera(work.multiply_adds()),
                tera(work.forward),
                tera(work.hessians),
                tera(work.factors),
                tera(work.sweeps),
            )
        }
    };
    text += &format!(
        "\nsize {} ({} bytes), {:.3} bits a compressed weight, {} of them zero; peak memory {}{}; about {} on this machine, calibration runs {}counted\n{}\n\n",
        number::size(plan.payload_bytes),
        number::count(plan.payload_bytes),
        8.0 * plan.compressed_bytes as f64 / plan.compressed_elements.max(1) as f64,
        number::percent(plan.sparsity),
        number::size(plan.peak_bytes),
        waiting(plan),
        number::time(time.seconds),
        if time.counts_drawing { "" } else { "not " },
        plan.disk.text(),
    );
    text
}

fn summary(rows: &[(String, Plan, f64)]) -> String {
    let mut table = table::new(&["config", "bytes", "GiB", "sparsity", "bits", "peak memory", "passes", "time"]);
    for (name, plan, seconds) in rows {
        table.add_row([
            name.clone(),
            number::count(plan.payload_bytes),
            number::fixed(plan.payload_bytes as f64 / f64::from(1 << 30), 3),
            number::percent(plan.sparsity),
            number::fixed(8.0 * plan.compressed_bytes as f64 / plan.compressed_elements.max(1) as f64, 3),
            number::size(plan.peak_bytes),
            plan.stages.iter().map(|stage| stage.passes).sum::<usize>().to_string(),
            number::time(*seconds),
        ]);
    }
    format!("{}\n", table::right_aligned(table, 1))
}
