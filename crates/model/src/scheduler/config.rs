//! `scheduler/scheduler_config.json`: the sampler and its settings.

use std::path::{Path, PathBuf};

use regex::{Captures, Regex};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};

use super::Scheduler;
use super::ddim::Ddim;
use super::ddpm::Ddpm;
use super::dpm::DpmSolver;
use super::dpm_sde::DpmSolverSde;
use super::edm::{EdmDpmSolver, EdmEuler};
use super::euler::Euler;
use super::euler_ancestral::EulerAncestral;
use super::heun::Heun;
use super::kind::{SchedulerChoice, SchedulerKind};
use super::lcm::Lcm;
use super::noise::NoiseSchedule;
use super::plms::Plms;
use super::spacing::SpacingKind;
use super::tcd::Tcd;
use super::unipc::UniPc;
use crate::checkpoint::ConfigFile;

/// A sampler's config, as it is in the file.
///
/// A config of any diffusers class can be read, so that a pipeline whose sampler is not implemented
/// can be used with another sampler. Keys are checked when the sampler is made.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    path: PathBuf,
    class: String,
    entries: Map<String, Value>,
    /// The share of noise that each step of DDIM or TCD adds.
    eta: f64,
}

/// The parameters of the classes that diffusers treats as compatible. A class ignores the ones that
/// it does not have.
const COMPATIBLE_KEYS: [&str; 46] = [
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
    "noise_sampler_seed",
    "num_train_timesteps",
    "original_inference_steps",
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
    "timestep_scaling",
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
        Ok(SchedulerConfig { path: path.to_owned(), class: file.required("_class_name")?, entries, eta: 0.0 })
    }

    /// A config that is in memory; `path` names it in errors.
    ///
    /// # Errors
    /// If it does not name its class.
    pub fn from_entries(path: &Path, entries: Map<String, Value>) -> Result<Self> {
        let class = ConfigFile::from_entries(path, entries.clone()).required("_class_name")?;
        Ok(SchedulerConfig { path: path.to_owned(), class, entries, eta: 0.0 })
    }

    /// The entries, as they are in the file.
    #[must_use]
    pub fn entries(&self) -> &Map<String, Value> {
        &self.entries
    }

    /// The file's entries, ready to be taken.
    fn file(&self) -> ConfigFile {
        ConfigFile::from_entries(&self.path, self.entries.clone())
    }

    /// Takes the keys that describe training, with the defaults of the class. Those of a class that
    /// is not implemented are Euler's.
    fn noise(&self, file: &mut ConfigFile) -> Result<NoiseSchedule> {
        NoiseSchedule::read(file, SchedulerKind::of_class(&self.class).unwrap_or(SchedulerKind::Euler).training())
    }

    /// The noise relative to the picture at each of `timesteps` (in [`Scheduler::timesteps`]'s
    /// units).
    ///
    /// # Errors
    /// If the config describes no noise schedule.
    pub fn sigmas(&self, timesteps: &[f64]) -> Result<Vec<f64>> {
        let mut file = self.file();
        if self.times_are_logarithms(&mut file)? {
            return Ok(timesteps.iter().map(|timestep| (4.0 * timestep).exp()).collect());
        }
        let signal = self.noise(&mut file)?.positive_signal(&file)?;
        let table = super::noise::sigmas(&signal)?;
        let at = |timestep: &f64| f64::from(table[(timestep.max(0.0) as usize).min(table.len() - 1)]);
        Ok(timesteps.iter().map(at).collect())
    }

    /// ᾱ of every timestep that the model was trained on: the share of the picture (as a variance)
    /// in the noisy latents (`alphas_cumprod` in diffusers). Where the last timestep is pure noise
    /// ([`ends_in_pure_noise`](Self::ends_in_pure_noise)), its share is 2⁻²⁴, as in diffusers.
    ///
    /// # Errors
    /// If the config describes no noise schedule.
    pub fn signal(&self) -> Result<Vec<f32>> {
        let mut file = self.file();
        self.noise(&mut file)?.positive_signal(&file)
    }

    /// Whether nothing of the picture is left at the last timestep (`rescale_betas_zero_snr`).
    ///
    /// # Errors
    /// If the config describes no noise schedule.
    pub fn ends_in_pure_noise(&self) -> Result<bool> {
        Ok(self.noise(&mut self.file())?.ends_in_pure_noise())
    }

    /// Whether timesteps are ln(σ) / 4: those of the EDM samplers, and of Euler's continuous ones.
    fn times_are_logarithms(&self, file: &mut ConfigFile) -> Result<bool> {
        let continuous = |file: &mut ConfigFile| -> Result<bool> {
            let timestep_type: Option<String> = file.optional("timestep_type")?;
            let prediction: Option<String> = file.optional("prediction_type")?;
            Ok(timestep_type.as_deref() == Some("continuous") && prediction.as_deref() == Some("v_prediction"))
        };
        match SchedulerKind::of_class(&self.class) {
            Some(kind) if kind.is_edm() => Ok(true),
            Some(SchedulerKind::Euler) => continuous(file),
            _ => Ok(false),
        }
    }

    /// The number of timesteps that the model was trained on: timesteps are 0 to this number less
    /// 1.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] if `num_train_timesteps` is out of range.
    pub fn train_timesteps(&self) -> Result<usize> {
        NoiseSchedule::count(&mut self.file())
    }

    /// Every timestep that the model was trained on, in the units of [`Scheduler::timesteps`]. EDM
    /// models were trained on all noise levels between two; as many as `num_train_timesteps` are
    /// taken of them.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] if the keys that describe training are out of range.
    pub fn training_timesteps(&self) -> Result<Vec<f64>> {
        let count = self.train_timesteps()?;
        let mut file = self.file();
        if !self.times_are_logarithms(&mut file)? {
            return Ok((0..count).map(|timestep| timestep as f64).collect());
        }
        if SchedulerKind::of_class(&self.class).is_some_and(SchedulerKind::is_edm) {
            return Ok(self.scheduler(count)?.timesteps().to_vec());
        }
        let signal = self.noise(&mut file)?.positive_signal(&file)?;
        Ok(super::noise::sigmas(&signal)?.into_iter().map(|sigma| 0.25 * f64::from(sigma).ln()).collect())
    }

    /// The sampler's class name in diffusers.
    #[must_use]
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The config for another class of diffusers, which takes the keys that it has from this file.
    /// The class is checked when the sampler is made.
    #[must_use]
    pub fn with_class(&self, class: &str) -> Self {
        SchedulerConfig { class: class.to_owned(), ..self.clone() }
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
        let mut config = self.with_class(choice.kind.class());
        if choice.karras {
            config.entries.insert("use_karras_sigmas".to_owned(), Value::Bool(true));
        }
        if choice.variant {
            let (key, value) = match choice.kind {
                SchedulerKind::Pndm => ("skip_prk_steps", Value::Bool(true)),
                _ => ("algorithm_type", Value::from("sde-dpmsolver++")),
            };
            config.entries.insert(key.to_owned(), value);
        }
        Ok(config)
    }

    /// The config with another sampler, another spacing and another η, each where it is given.
    ///
    /// # Errors
    /// As [`with_override`](Self::with_override), [`with_spacing`](Self::with_spacing) and
    /// [`with_eta`](Self::with_eta).
    pub fn with_choices(&self, name: Option<&str>, spacing: Option<SpacingKind>, eta: f64) -> Result<Self> {
        let mut config = self.clone();
        if let Some(name) = name {
            config = config.with_override(name)?;
        }
        if let Some(spacing) = spacing {
            config = config.with_spacing(spacing)?;
        }
        config.with_eta(eta)
    }

    /// The config with another `timestep_spacing`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the class has no spacing to choose.
    pub fn with_spacing(&self, spacing: SpacingKind) -> Result<Self> {
        if SchedulerKind::of_class(&self.class).is_some_and(|kind| !kind.is_spaced()) {
            return Err(Error::Argument(format!("{} has timesteps of its own, without a `timestep_spacing`", self.class)));
        }
        let mut config = self.clone();
        config.entries.insert("timestep_spacing".to_owned(), Value::from(spacing.name()));
        Ok(config)
    }

    /// The config with another η, the share of noise that each step adds: 0 is none, 1 all. It is
    /// an argument of diffusers' pipelines, 0 by default, and no key of the file.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not between 0 and 1, or the class takes none.
    pub fn with_eta(&self, eta: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&eta) {
            return Err(Error::Argument(format!("an eta of {eta} is not between 0 and 1")));
        }
        if eta > 0.0 && SchedulerKind::of_class(&self.class).is_some_and(|kind| !kind.has_eta()) {
            return Err(Error::Argument(format!("{} takes no eta; DDIM and TCD do", self.class)));
        }
        Ok(SchedulerConfig { eta, ..self.clone() })
    }

    /// What the UNet predicts: `epsilon`, `v_prediction` or `sample`, as in diffusers; with `edm_`
    /// before it for a UNet whose inputs and outputs EDM's samplers scale in their own way.
    #[must_use]
    pub fn prediction(&self) -> &str {
        let is_edm = SchedulerKind::of_class(&self.class).is_some_and(SchedulerKind::is_edm);
        match self.text("prediction_type").unwrap_or("epsilon") {
            "epsilon" if is_edm => "edm_epsilon",
            "v_prediction" if is_edm => "edm_v_prediction",
            "sample" if is_edm => "edm_sample",
            other => other,
        }
    }

    /// The value of a text key; `None` if it is absent or no text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.entries.get(key).and_then(Value::as_str)
    }

    /// The sampler, set to take `steps` steps.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] if the class or the value of a key is not implemented, naming it;
    /// [`Error::Argument`] if `steps` is not between 1 and the training timesteps, or the class
    /// cannot take so many with this spacing.
    pub fn scheduler(&self, steps: usize) -> Result<Box<dyn Scheduler>> {
        let mut file = self.file();
        let kind = SchedulerKind::of_class(&self.class).ok_or_else(|| {
            let known = SchedulerKind::ALL.map(SchedulerKind::class).join(", ");
            let names = SchedulerChoice::NAMES.join(", ");
            file.error("_class_name", format!("= \"{}\" is not supported ({known} are; pick {names} instead)", self.class))
        })?;
        let train = NoiseSchedule::count(&mut self.file())?;
        let noise = if kind.is_edm() { None } else { Some(self.noise(&mut file)?) };
        if !(1..=train).contains(&steps) {
            return Err(Error::Argument(format!("cannot take {steps} steps: the model has timesteps for 1 to {train}")));
        }
        let scheduler: Box<dyn Scheduler> = match (kind, &noise) {
            (SchedulerKind::EdmEuler, _) => Box::new(EdmEuler::new(&mut file, steps)?),
            (SchedulerKind::EdmDpmSolverMultistep, _) => Box::new(EdmDpmSolver::new(&mut file, steps)?),
            (_, None) => return Err(Error::internal("a sampler without its noise schedule")),
            (SchedulerKind::Euler, Some(noise)) => Box::new(Euler::new(&mut file, noise, steps)?),
            (SchedulerKind::EulerAncestral, Some(noise)) => Box::new(EulerAncestral::new(&mut file, noise, steps)?),
            (SchedulerKind::Heun, Some(noise)) => Box::new(Heun::new(&mut file, noise, steps)?),
            (SchedulerKind::Ddim, Some(noise)) => Box::new(Ddim::new(&mut file, noise, steps, self.eta)?),
            (SchedulerKind::Ddpm, Some(noise)) => Box::new(Ddpm::new(&mut file, noise, steps)?),
            (SchedulerKind::DpmSolverMultistep, Some(noise)) => Box::new(DpmSolver::new(&mut file, noise, steps)?),
            (SchedulerKind::DpmSolverSde, Some(noise)) => Box::new(DpmSolverSde::new(&mut file, noise, steps)?),
            (SchedulerKind::UniPc, Some(noise)) => Box::new(UniPc::new(&mut file, noise, steps)?),
            (SchedulerKind::Pndm, Some(noise)) => Box::new(Plms::new(&mut file, noise, steps)?),
            (SchedulerKind::Lcm, Some(noise)) => Box::new(Lcm::new(&mut file, noise, steps)?),
            (SchedulerKind::Tcd, Some(noise)) => Box::new(Tcd::new(&mut file, noise, steps, self.eta)?),
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
