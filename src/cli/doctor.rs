//! `sdxl-squeeze doctor`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::compare::Shipped;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::device::{cuda_devices, free_memory, total_memory};
use sdxl_squeeze::libtorch::{self, Libtorch};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::plan::{Plan, free_disk};
use sdxl_squeeze::{Error, Result, memory, number, shipped};
use serde::Serialize;
use tch::Device;

use super::edits::{Edits, model_of};
use super::limits::LimitArgs;
use super::version::VERSION;
use super::{compress, failure, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The run to check: a file, or the name of a config in the program [default: squeeze-3bits
    /// with --model, else emoji/squeeze-s40-4bit-gs16 with the bundled model]
    #[arg(long, value_name = "FILE.yaml|NAME")]
    config: Option<PathBuf>,
    /// The folder that the run would write to
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    edits: Edits,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Something that a run needs, as it was found.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    status: Status,
    found: String,
    /// What to do where the status is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// A run would do, and be slower or smaller than it could be.
    Note,
    /// A run would fail.
    Fail,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Check { check, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn note(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Check { check, status: Status::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Check { check, status: Status::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn failed(check: &'static str, error: &Error, remedy: &str) -> Self {
        Check::fail(check, failure::chain(error), remedy)
    }
}

pub(super) fn run(args: Args) -> Result<()> {
    let mut checks = vec![Check::ok("program", VERSION), of_libtorch(&Libtorch::loaded())];
    checks.extend(gpus());
    checks.extend([threads(), processor(), of_memory(memory::available()), of_folder(&args.out)]);
    checks.extend(of_run(&args));
    if args.json {
        stdout::print_json(&checks)?;
    } else {
        stdout::print(&lines(&checks))?;
    }
    match checks.iter().filter(|check| check.status == Status::Fail).count() {
        0 => Ok(()),
        failed => Err(Error::Failed(format!("a run would fail: see the {failed} of {} checks above that failed", checks.len()))),
    }
}

fn lines(checks: &[Check]) -> String {
    let line = |Check { check, status, found, remedy }: &Check| {
        let status = match status {
            Status::Ok => "ok",
            Status::Note => "note",
            Status::Fail => "FAIL",
        };
        let remedy = remedy.as_ref().map_or(String::new(), |remedy| format!("{:17}{remedy}\n", ""));
        format!("{status:<6}{check:<11}{found}\n{remedy}")
    };
    checks.iter().map(line).collect()
}

fn of_libtorch(loaded: &Libtorch) -> Check {
    const NAME: &str = "libtorch";
    let version = loaded.version.as_deref().unwrap_or("of unknown version");
    let place = loaded.library.as_deref().map_or(String::new(), |path| format!(" in {}", path.display()));
    let found = format!("{version}{place}");
    if loaded.is_other_release() {
        let remedy =
            format!("this program is compiled for {0}: install torch=={0}, or compile the program anew", libtorch::RELEASE);
        return Check::fail(NAME, found, remedy);
    }
    Check::ok(NAME, found)
}

fn gpus() -> Vec<Check> {
    const NAME: &str = "GPU";
    const NONE: &str = "runs compute on the CPU, where SDXL's calibration takes hours: record samples on another machine, or give \
                        --calibration-nsamples 8 --steps 8 (docs/usage.md)";
    if tch::utils::has_mps() {
        return vec![Check::ok(NAME, "Apple's, for --device mps, which has not been tried on a Mac")];
    }
    match cuda_devices() {
        Ok(count) => (0..count).map(gpu).collect(),
        Err(why) => vec![Check::note(NAME, format!("none: {why}"), NONE)],
    }
}

fn gpu(index: usize) -> Check {
    let device = Device::Cuda(index);
    match (free_memory(device), total_memory(device)) {
        (Some(free), Some(total)) => {
            Check::ok("GPU", format!("cuda:{index}, {} of {} free", number::size(free), number::size(total)))
        }
        _ => Check::note("GPU", format!("cuda:{index}, of unknown memory"), "give --memory-budget where a run asks for it"),
    }
}

fn threads() -> Check {
    const NAME: &str = "threads";
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (solver, torch) = (rayon::current_num_threads(), tch::get_num_threads().max(1) as usize);
    let found = format!("{solver} of the solver, {torch} of libtorch, {cores} cores");
    if solver.min(torch) < cores {
        return Check::note(NAME, found, "RAYON_NUM_THREADS and OMP_NUM_THREADS set fewer threads than there are cores");
    }
    Check::ok(NAME, found)
}

/// The instructions of the processor that the solver has code for.
fn processor() -> Check {
    const NAME: &str = "processor";
    #[cfg(target_arch = "x86_64")]
    {
        let wide = std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma");
        let widest = wide && std::arch::is_x86_feature_detected!("avx512f");
        match (wide, widest) {
            (_, true) => Check::ok(NAME, "x86-64 with AVX-512"),
            (true, false) => Check::ok(NAME, "x86-64 with AVX2 and FMA"),
            (false, false) => Check::note(NAME, "x86-64 without AVX2 and FMA", "the solver is several times slower here"),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    match std::env::consts::ARCH {
        // NEON is a part of the architecture.
        "aarch64" => Check::ok(NAME, "AArch64 with NEON"),
        other => Check::note(NAME, other, "the solver has no vector code for this processor"),
    }
}

fn of_memory(available: Option<u64>) -> Check {
    const NAME: &str = "memory";
    /// The tutorial's recipe on SDXL in fp16, with few samples.
    const SDXL: u64 = 5 << 30;
    match available {
        None => Check::note(NAME, "how much is free cannot be told on this system", "give --memory-budget with each run"),
        Some(free) if free < SDXL => Check::note(
            NAME,
            format!("{} free", number::size(free)),
            "SDXL takes 5 GiB and more; `sdxl-squeeze plan` says how much a config takes",
        ),
        Some(free) => Check::ok(NAME, format!("{} free", number::size(free))),
    }
}

/// The folder that results are written to: it can be written, and how much is free.
fn of_folder(out: &Path) -> Check {
    const NAME: &str = "disk";
    let existing = out.ancestors().find(|folder| folder.exists()).filter(|folder| !folder.as_os_str().is_empty());
    let existing = existing.unwrap_or(Path::new("."));
    let shown = existing.canonicalize().unwrap_or_else(|_| existing.to_owned());
    let shown = shown.display();
    if !existing.is_dir() {
        return Check::fail(NAME, format!("{shown} is no folder"), "name another folder with --out");
    }
    #[cfg(unix)]
    {
        use rustix::fs::{Access, access};
        if let Err(why) = access(existing, Access::WRITE_OK | Access::EXEC_OK) {
            return Check::fail(NAME, format!("{shown} cannot be written: {why}"), "name another folder with --out");
        }
    }
    Check::ok(NAME, free_disk(existing).map_or(format!("{shown}"), |free| format!("{} free in {shown}", number::size(free))))
}

/// The config, the model and the run that they make.
fn of_run(args: &Args) -> Vec<Check> {
    let config = match config(args) {
        Ok(config) => config,
        Err(error) => return vec![Check::failed("config", &error, "`sdxl-squeeze configs` lists the configs in the program")],
    };
    let folder = match model_of(&config) {
        Ok(folder) => folder,
        Err(error) => {
            let remedy = format!("give --model DIR|FILE; --model {} is the bundled model", shipped::BUNDLED);
            return vec![Check::failed("model", &error, &remedy)];
        }
    };
    let mut checks = parts(&folder);
    if checks.is_empty() {
        let parameters: u64 = folder.unet.tensors().into_iter().flatten().map(|tensor| tensor.numel()).sum();
        let found = format!("{}, a UNet of {} parameters", folder.root().display(), number::count(parameters));
        checks.push(Check::ok("model", found));
    }
    let planned = args.limits.options(&config).and_then(|options| {
        let plan = compress::planned(&folder, &config, &options, &args.out)?;
        Ok((plan, options.memory_budget()?))
    });
    checks.push(match planned {
        Ok((plan, budget)) => Check::ok("run", of_plan(plan.as_ref(), budget)),
        Err(error) => Check::failed("run", &error, "`sdxl-squeeze plan` shows what a run takes with other configs and flags"),
    });
    checks
}

fn config(args: &Args) -> Result<RunConfig> {
    let edits = &args.edits;
    match &args.config {
        Some(path) => edits.config(path),
        None if edits.first_of(&["model"]).is_some() => edits.shipped_with(Shipped::BASE.config(), None),
        None => edits.config(Path::new("emoji/squeeze-s40-4bit-gs16")),
    }
}

/// The parts of a pipeline that cannot be read.
fn parts(folder: &PipelineFolder) -> Vec<Check> {
    let text = folder.text_encoders.iter();
    let text = text.flat_map(|part| [folder.text_weights(part).err(), folder.tokenizer(part).err()]);
    let errors = [folder.unet_weights().err(), folder.vae_weights().err()].into_iter().chain(text);
    let remedy = "fetch the model anew, with all of its files";
    errors.flatten().map(|error| Check::failed("model", &error, remedy)).collect()
}

fn of_plan(plan: Option<&Plan>, budget: u64) -> String {
    let Some(plan) = plan else { return "would do".to_owned() };
    let [peak, budget, disk] = [plan.peak_bytes, budget, plan.disk.peak()].map(number::size);
    format!("would do: {peak} of {budget} of memory, {disk} on the disk")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_release_of_libtorch_fails() {
        let of = |version: Option<&str>| of_libtorch(&Libtorch { library: None, version: version.map(str::to_owned) });
        assert_eq!(of(Some("2.11.0+cu130")).status, Status::Ok);
        assert_eq!(of(None).status, Status::Ok);
        let other = of(Some("2.10.0"));
        assert!(other.status == Status::Fail && other.remedy.unwrap().contains("torch==2.11.0"));
    }

    #[test]
    fn little_and_unknown_memory_is_a_note() {
        assert_eq!(of_memory(Some(8 << 30)).status, Status::Ok);
        assert_eq!(of_memory(Some(1 << 30)).status, Status::Note);
        assert!(of_memory(None).remedy.unwrap().contains("--memory-budget"));
    }

    #[test]
    fn a_folder_that_cannot_be_written_fails() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(of_folder(&folder.path().join("new/deep")).status, Status::Ok);
        assert_eq!(of_folder(Path::new("new")).status, Status::Ok);
        std::fs::write(folder.path().join("file"), b"").unwrap();
        let file = of_folder(&folder.path().join("file/deep"));
        assert!(file.status == Status::Fail && file.found.contains("is no folder"), "{file:?}");
    }
}
