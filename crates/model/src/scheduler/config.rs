//! `scheduler/scheduler_config.json`: the sampler and its settings.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use regex::{Captures, Regex};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use squeeze_base::shorten::shorten;

use super::Scheduler;
use super::ddim::Ddim;
use super::dpm::DpmSolver;
use super::euler::Euler;
use super::noise::NoiseSchedule;
use crate::checkpoint::ConfigFile;

/// A sampler that is implemented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulerKind {
    /// Euler's method (Karras et al. 2022; `EulerDiscreteScheduler`).
    Euler,
    /// DDIM, deterministic (Song et al. 2021; `DDIMScheduler`).
    Ddim,
    /// DPM-Solver++ 2M (Lu et al. 2022; `DPMSolverMultistepScheduler`).
    DpmSolverMultistep,
}

impl SchedulerKind {
    const ALL: [SchedulerKind; 3] = [SchedulerKind::Euler, SchedulerKind::Ddim, SchedulerKind::DpmSolverMultistep];

    /// The class name in diffusers.
    #[must_use]
    pub fn class(self) -> &'static str {
        match self {
            SchedulerKind::Euler => "EulerDiscreteScheduler",
            SchedulerKind::Ddim => "DDIMScheduler",
            SchedulerKind::DpmSolverMultistep => "DPMSolverMultistepScheduler",
        }
    }
}

/// A sampler picked by name.
///
/// The names are [`NAMES`](Self::NAMES) and diffusers' class names, in upper or lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerChoice {
    /// The sampler.
    pub kind: SchedulerKind,
    /// Whether the name asks for Karras's sigmas; otherwise the config decides.
    pub karras: bool,
}

const CHOICES: [(&str, SchedulerKind, bool); 5] = [
    ("euler", SchedulerKind::Euler, false),
    ("euler-karras", SchedulerKind::Euler, true),
    ("ddim", SchedulerKind::Ddim, false),
    ("dpmpp-2m", SchedulerKind::DpmSolverMultistep, false),
    ("dpmpp-2m-karras", SchedulerKind::DpmSolverMultistep, true),
];

impl SchedulerChoice {
    /// The short names.
    pub const NAMES: [&'static str; 5] = [CHOICES[0].0, CHOICES[1].0, CHOICES[2].0, CHOICES[3].0, CHOICES[4].0];
}

impl FromStr for SchedulerChoice {
    type Err = Error;

    /// # Errors
    /// [`Error::Argument`] with the known names and the nearest of them.
    fn from_str(name: &str) -> Result<Self> {
        let classes = SchedulerKind::ALL.map(|kind| (kind.class(), kind, false));
        if let Some((_, kind, karras)) = CHOICES.iter().chain(&classes).find(|choice| choice.0.eq_ignore_ascii_case(name)) {
            return Ok(SchedulerChoice { kind: *kind, karras: *karras });
        }
        let likeness = |known: &str| strsim::jaro_winkler(&name.to_lowercase(), &known.to_lowercase());
        let known = CHOICES.iter().chain(&classes).map(|choice| choice.0);
        let nearest = known.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there are known names");
        let names = Self::NAMES.join(", ");
        Err(Error::Argument(format!("unknown scheduler `{}`: did you mean `{nearest}`? (known: {names})", shorten(name))))
    }
}

/// A sampler's config, as it is in the file.
///
/// A config of any diffusers class can be read, so that a pipeline whose sampler is not implemented
/// can be used with another sampler. Keys are checked when the sampler is made.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    path: PathBuf,
    class: String,
    entries: Map<String, Value>,
}

/// The parameters of the classes that diffusers treats as compatible. A class ignores the ones that
/// it does not have.
const COMPATIBLE_KEYS: [&str; 43] = [
    "algorithm_type",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "num_train_timesteps",
    "predict_x0",
    "prediction_type",
    "rescale_betas_zero_snr",
    "rho",
    "sample_max_value",
    "set_alpha_to_one",
    "shift_terminal",
    "sigma_data",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "thresholding",
    "time_shift_type",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
];

impl SchedulerConfig {
    /// Reads `path`, a config of any class.
    ///
    /// # Errors
    /// If the file cannot be read, is larger than 16 MiB, is not a JSON object, or does not name
    /// its class.
    pub fn read(path: &Path) -> Result<Self> {
        let text = input::read_text(path, Limit::MODEL_CONFIG)?;
        let text = quote_non_finite(path, &text)?;
        let mut entries = match serde_json::from_str(&text) {
            Ok(Value::Object(entries)) => entries,
            Ok(_) => return Err(Error::bad_file(path, "not a JSON object")),
            Err(source) => return Err(Error::Json { path: path.to_owned(), source }),
        };
        // diffusers lists the keys whose values are only its defaults, and does not pass these on
        // to another class.
        let mut file = ConfigFile::from_entries(path, entries.clone());
        for key in file.or("_use_default_values", Vec::<String>::new())? {
            entries.remove(&key);
        }
        Ok(SchedulerConfig { path: path.to_owned(), class: file.required("_class_name")?, entries })
    }

    /// A config that is in memory; `path` names it in errors.
    ///
    /// # Errors
    /// If it does not name its class.
    pub fn from_entries(path: &Path, entries: Map<String, Value>) -> Result<Self> {
        let class = ConfigFile::from_entries(path, entries.clone()).required("_class_name")?;
        Ok(SchedulerConfig { path: path.to_owned(), class, entries })
    }

    /// The entries, as they are in the file.
    #[must_use]
    pub fn entries(&self) -> &Map<String, Value> {
        &self.entries
    }

    /// Sigma of every training timestep: the noise relative to the picture.
    ///
    /// # Errors
    /// If the config describes no noise schedule.
    pub fn sigmas(&self) -> Result<Vec<f64>> {
        let mut file = ConfigFile::from_entries(&self.path, self.entries.clone());
        let signal = NoiseSchedule::read(&mut file)?.positive_signal(&file)?;
        Ok(super::noise::sigmas(&signal)?.into_iter().map(f64::from).collect())
    }

    /// The number of timesteps that the model was trained on: timesteps are 0 to this number less
    /// 1.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] if `num_train_timesteps` is out of range.
    pub fn train_timesteps(&self) -> Result<usize> {
        NoiseSchedule::count(&mut ConfigFile::from_entries(&self.path, self.entries.clone()))
    }

    /// The sampler's class name in diffusers.
    #[must_use]
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The config for the sampler called `name` (see [`SchedulerChoice`]), as by diffusers'
    /// `from_config`.
    ///
    /// The new class takes the keys that it has from this file; its other keys get the defaults of
    /// the new class. A name with `karras` also sets `use_karras_sigmas`; other names leave that
    /// key as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sampler.
    pub fn with_override(&self, name: &str) -> Result<Self> {
        let choice: SchedulerChoice = name.parse()?;
        let mut config = SchedulerConfig { class: choice.kind.class().to_owned(), ..self.clone() };
        if choice.karras {
            config.entries.insert("use_karras_sigmas".to_owned(), Value::Bool(true));
        }
        Ok(config)
    }

    /// The sampler, set to take `steps` steps.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] if the class or the value of a key is not implemented, naming it;
    /// [`Error::Argument`] if `steps` is not between 1 and the training timesteps, or the class
    /// cannot take so many with this spacing.
    pub fn scheduler(&self, steps: usize) -> Result<Box<dyn Scheduler>> {
        let mut file = ConfigFile::from_entries(&self.path, self.entries.clone());
        let kind = SchedulerKind::ALL.into_iter().find(|kind| kind.class() == self.class).ok_or_else(|| {
            let known = SchedulerKind::ALL.map(SchedulerKind::class).join(", ");
            let names = SchedulerChoice::NAMES.join(", ");
            file.error("_class_name", format!("= \"{}\" is not supported ({known} are; pick {names} instead)", self.class))
        })?;
        let noise = NoiseSchedule::read(&mut file)?;
        if !(1..=noise.len()).contains(&steps) {
            return Err(Error::Argument(format!("cannot take {steps} steps: the model has timesteps for 1 to {}", noise.len())));
        }
        let scheduler: Box<dyn Scheduler> = match kind {
            SchedulerKind::Euler => Box::new(Euler::new(&mut file, &noise, steps)?),
            SchedulerKind::Ddim => Box::new(Ddim::new(&mut file, &noise, steps)?),
            SchedulerKind::DpmSolverMultistep => Box::new(DpmSolver::new(&mut file, &noise, steps)?),
        };
        file.ignore(&COMPATIBLE_KEYS);
        file.finish();
        Ok(scheduler)
    }
}

/// Turns Python's `-Infinity`, `Infinity` and `NaN`, which are not JSON, into strings.
///
/// diffusers writes `"lambda_min_clipped": -Infinity` into every config of DPM-Solver.
fn quote_non_finite(path: &Path, text: &str) -> Result<String> {
    let token = Regex::new(r#""(?:[^"\\]|\\.)*"|-?Infinity|NaN"#).map_err(|why| Error::bad_file(path, why.to_string()))?;
    let quote = |captures: &Captures| {
        let token = &captures[0];
        if token.starts_with('"') { token.to_owned() } else { format!("\"{token}\"") }
    };
    Ok(token.replace_all(text, quote).into_owned())
}
