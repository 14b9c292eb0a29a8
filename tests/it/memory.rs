//! Small memories: tensors that wait on the host, plans of GPUs, a device that has no memory left.

use std::path::Path;

use sdxl_squeeze::calibration::{Calls, Samples, calibrate, encoder_bytes};
use sdxl_squeeze::checkpoint::{TensorSource, Weights};
use sdxl_squeeze::compress::{self, Calibration, Gatherer, Job, Machine, Model, Workspace, plan_of_run};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::container::CompressedWeight;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::unet::{PartName, UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::plan::{Card, CarriesIn, Drawing, Memory, Plan};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::recipe::{LayerRecipes, Recipe, RunOptions, Sequencing};
use sdxl_squeeze::synth::Preset;
use sdxl_squeeze::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::support::{emoji, repo, tiny};

/// The tiny model with a few samples, to be compressed in several ways.
struct Small {
    placement: Placement,
    folder: PipelineFolder,
    weights: Weights,
    samples: Samples,
    layers: LayerRecipes,
    timesteps: Vec<f64>,
}

impl Small {
    fn on(placement: Placement) -> Self {
        let folder = PipelineFolder::open(tiny()).unwrap();
        let weights = folder.unet_weights().unwrap();
        let mut config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
        (config.calibration.calibration_nsamples, config.calibration.steps) = (4, Some(2));
        let samples = calibrate(&folder, &weights, &config.calibration, &RunOptions::on(placement), &Silent).unwrap();
        let layers = Recipe::new(&config, &folder.unet).unwrap().layers;
        Small { placement, folder, weights, samples, layers, timesteps: (0..1000).map(f64::from).collect() }
    }

    fn plan(&self, sequencing: Sequencing) -> Plan {
        let memory = Memory::new(8 << 30, self.placement.kind, self.placement.device);
        Plan::new(&self.folder.unet, &self.layers, sequencing, self.samples.shape(), memory, &|_| 4).unwrap()
    }

    /// Compresses with weights from `source`, in `out`.
    fn compress(&self, plan: &Plan, source: &(dyn TensorSource + Sync), out: &Path) -> Result<Workspace> {
        let job = Job {
            model: Model { chain: &self.folder.unet, source },
            layers: &self.layers,
            plan,
            calibration: Calibration { samples: &self.samples, weights: &[], timesteps: &self.timesteps },
            machine: Machine { devices: &self.placement.device.into(), kind: self.placement.kind },
        };
        let mut store = Workspace::open(out, &Default::default(), true)?;
        compress::compress(&job, Gatherer::default(), &mut store, &Silent)?;
        Ok(store)
    }

    fn all(&self, store: &Workspace) -> Vec<CompressedWeight> {
        self.layers.keys().filter_map(|layer| store.weight(layer).unwrap()).collect()
    }
}

#[test]
fn what_is_away_from_the_device_changes_no_byte() {
    waiting_changes_no_byte(Placement::CPU);
}

/// Compresses with all carries and Hessians on the device, and with all of them on the host.
pub(crate) fn waiting_changes_no_byte(placement: Placement) {
    let (small, out) = (Small::on(placement), tempfile::tempdir().unwrap());
    let source = small.weights.narrow_source(placement);
    for (number, sequencing) in [Sequencing::Stage, Sequencing::Sublayer { dense_target: true }].into_iter().enumerate() {
        let here = small.plan(sequencing);
        assert_eq!((here.carries, here.hessians_wait, here.host_bytes), (CarriesIn::Memory, false, 0));
        let mut away = Plan { carries: CarriesIn::Host, hessians_wait: true, ..here.clone() };
        // Parts leave the device, too, while their layers are solved.
        away.schedule.stops.iter_mut().filter(|stop| stop.part != PartName::InputBlock).for_each(|stop| stop.unloads = true);
        let run = |plan: &Plan, name: &str| {
            small.all(&small.compress(plan, &source, &out.path().join(format!("{number}-{name}"))).unwrap())
        };
        let (here, away) = (run(&here, "here"), run(&away, "away"));
        assert!(here.len() > 50 && here == away, "{sequencing:?}");
    }
}

/// A source on a device that has no memory for the tensors of one part.
struct Exhausted<'a> {
    source: &'a (dyn TensorSource + Sync),
    part: &'a str,
}

impl TensorSource for Exhausted<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        if name.starts_with(self.part) {
            return Err(tch::TchError::Torch("CUDA out of memory. Tried to allocate 2.00 GiB.\nstack".into()).into());
        }
        self.source.tensor(name, shape)
    }
}

#[test]
fn a_device_without_memory_ends_a_run_that_goes_on_later_with_the_same_bytes() {
    let (small, out) = (Small::on(Placement::CPU), tempfile::tempdir().unwrap());
    let source = small.weights.narrow_source(Placement::CPU);
    let plan = small.plan(Sequencing::Stage);
    let whole = small.all(&small.compress(&plan, &source, &out.path().join("whole")).unwrap());
    let path = out.path().join("ended");
    let error = small.compress(&plan, &Exhausted { source: &source, part: "up_blocks.0" }, &path).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }) && !error.is_bad_input(), "{error}");
    let text = error.to_string();
    for part in ["the Hessians of `up_blocks.0`", "2.00 GiB; ", "--memory-budget", "--resume"] {
        assert!(text.contains(part), "{text}");
    }
    let left = Workspace::open(&path, &Default::default(), true).unwrap();
    let finished = left.reports().count();
    assert!(finished > 10 && finished < whole.len(), "{finished} layers");
    assert!(left.reports().all(|(report, _)| !report.name.starts_with("up_blocks")));
    drop(left);
    assert!(small.all(&small.compress(&plan, &source, &path).unwrap()) == whole, "other bytes");
}

/// A GPU with `budget` bytes, in a host with `host` free bytes for what waits.
fn gpu(budget: u64, host: u64) -> Memory {
    Memory { host, ..Memory::new(budget, Kind::Half, Device::Cuda(0)) }
}

/// Full-size SDXL at 512 pixels with a config's samples.
fn plan_of_sdxl(config: &str, count: usize, memory: Memory) -> Result<Plan> {
    let unet = UnetChain::new(UnetConfig::parse(Preset::SdxlBase.unet_config()).unwrap());
    let config = RunConfig::read(&repo(&format!("configs/{config}.yaml"))).unwrap();
    let recipe = Recipe::new(&config, &unet).unwrap();
    let calls = Calls { count, batch: 2, height: 64, width: 64, text: 77 };
    plan_of_run(&unet, &config, &recipe, Some(calls), memory, &|_| 2)
}

#[test]
fn what_does_not_fit_a_card_waits_on_the_host_and_then_in_files() {
    let plan = |gib: u64, host: u64| plan_of_sdxl("squeeze-s40-4bit-gs16", 384, gpu(gib << 30, host << 30)).unwrap();
    let large = plan(70, 200);
    assert_eq!((large.carries, large.host_bytes, large.disk.carries), (CarriesIn::Memory, 0, 0));
    let small = plan(8, 200);
    assert_eq!((small.carries, small.disk.carries), (CarriesIn::Host, 0));
    assert!(small.host_bytes >= small.carry_bytes && small.host_bytes < 2 * small.carry_bytes, "{}", small.host_bytes);
    assert!(small.peak_bytes <= 8 << 30 && small.drawing_bytes <= 8 << 30);
    assert!(large.unloads() == 0 && small.unloads() > 0);
    assert!(large.work.carried_bytes == 0.0 && small.work.carried_bytes > 0.0);
    assert_eq!(large.passes(), small.passes());
    let files = plan(8, 2);
    assert_eq!((files.carries, files.host_bytes), (CarriesIn::Files, 0));
    assert!(files.disk.carries > 0);
}

#[test]
fn encoding_and_drawing_have_to_fit_a_card_too() {
    let memory = gpu(8 << 30, 100 << 30);
    let encoders = encoder_bytes(&PipelineFolder::open(&emoji()).unwrap(), memory.element_bytes).unwrap();
    let size = |name: &str| std::fs::metadata(emoji().join(name).join("model.safetensors")).unwrap().len();
    let files = size("text_encoder") + size("text_encoder_2");
    assert!(encoders > files / 2 && encoders < 2 * files + (1 << 20), "{encoders} bytes, {files} in files");
    let plan = |encoders: u64| plan_of_sdxl("dense-4bit", 8, memory.with_encoders(encoders));
    // Without samples there is nothing to draw.
    assert_eq!(plan(1 << 40).unwrap().drawing_bytes, 0);
    let plan = |encoders: u64| plan_of_sdxl("tutorial-s40-4bit-gs16", 8, memory.with_encoders(encoders));
    let (small, large) = (plan(0).unwrap().drawing_bytes, plan(6 << 30).unwrap().drawing_bytes);
    assert!(small > 3 << 30 && small < 5 << 30 && large > 6 << 30, "{small} and {large}");
    let refused = plan(8 << 30).unwrap_err();
    assert!(refused.is_bad_input(), "{refused}");
    assert!(refused.to_string().contains("8.000 GiB of memory are too little to encode prompts and draw"), "{refused}");
}

#[test]
fn hessians_wait_where_this_saves_passes_or_memory() {
    let unet = UnetChain::new(UnetConfig::parse(Preset::SdxlBase.unet_config()).unwrap());
    let config = RunConfig::read(&repo("configs/squeeze-s40-4bit-gs16.yaml")).unwrap();
    let recipes = Recipe::new(&config, &unet).unwrap().layers;
    let calls = Calls { count: 32, batch: 2, height: 64, width: 64, text: 77 };
    let plan =
        |gib: u64, host: u64| Plan::new(&unet, &recipes, Sequencing::Stage, Some(calls), gpu(gib << 30, host << 30), &|_| 2);
    assert!(!plan(70, 200).unwrap().hessians_wait);
    let mut saves = 0;
    for gib in 8..16 {
        let (without, with) = (plan(gib, 0), plan(gib, 200));
        let Ok(with) = with else { continue };
        assert!(with.peak_bytes <= gib << 30 && (with.host_bytes > 0) == (with.hessians_wait || with.carries == CarriesIn::Host));
        match without {
            Ok(without) => {
                assert!(!without.hessians_wait && with.passes() + with.unloads() <= without.passes() + without.unloads());
                saves += usize::from(with.passes() < without.passes() && with.hessians_wait);
            }
            Err(_) => saves += usize::from(with.hessians_wait),
        }
    }
    assert!(saves > 0);
    let plan = |gib: u64, host: u64| plan_of_sdxl("tutorial-s40-4bit-gs16", 128, gpu(gib << 30, host << 30));
    // What is too little is refused with the least that does.
    for host in [0, 200] {
        let refused = plan(1, host).unwrap_err();
        let text = refused.to_string();
        assert!(refused.is_bad_input() && text.contains("are too little for stage"), "{text}");
        let least = text.split("; ").last().unwrap().split(" would do").next().unwrap();
        let least = sdxl_squeeze::memory::parse_size(least).unwrap() + (1 << 20);
        let memory = gpu(least, host << 30);
        match plan_of_sdxl("tutorial-s40-4bit-gs16", 128, memory) {
            Ok(plan) => assert!(plan.peak_bytes <= least),
            // Then it is the drawing of samples that takes more.
            Err(why) => {
                assert!(why.to_string().contains("too little to encode prompts and draw calibration samples in"), "{why}")
            }
        }
    }
}

/// Whole runs that were measured on an H100, and the speed of that card as `plan` measures it.
#[test]
fn the_predicted_time_is_that_of_an_h100_to_a_quarter() {
    let card = Card { products: 3.2e14, fp32_products: 2.55e13, start: 5e-6, copies: 5e9, hashing: 1.2e9 };
    let check = |what: &str, plan: &Plan, drawing: Drawing, measured: f64| {
        let seconds = card.seconds(plan, &drawing);
        assert!((0.75..1.25).contains(&(seconds / measured)), "{what}: {seconds:.1} s, measured {measured} s");
    };
    let memory = gpu(70 << 30, 100 << 30);
    let tutorial = plan_of_sdxl("tutorial-s40-4bit-gs16", 128, memory).unwrap();
    check("tutorial", &tutorial, Drawing { calls: 140, batches: 20, encoded: 8 }, 34.6);
    let default = plan_of_sdxl("squeeze-s40-4bit-gs16", 384, memory).unwrap();
    check("default", &default, Drawing { calls: 960, batches: 120, encoded: 1048 }, 139.9);
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let config = RunConfig::read(&repo("configs/emoji/squeeze-s40-4bit-gs16.yaml")).unwrap();
    let recipe = Recipe::new(&config, &folder.unet).unwrap();
    let calls = Calls { count: 384, batch: 2, height: 16, width: 16, text: 77 };
    let memory = Memory::new(70 << 30, Kind::Float, Device::Cuda(0));
    let bundled = plan_of_run(&folder.unet, &config, &recipe, Some(calls), memory, &|_| 2).unwrap();
    check("bundled", &bundled, Drawing { calls: 48 * 30, batches: 30, encoded: 48 }, 12.4);
}
