//! Flags of the command line that change a config.

use std::path::{Path, PathBuf};

use super::RunConfig;
use super::fields::named;
use super::limits;
use super::mistake::{Mistake, Place};
use super::rules::Rules;
use super::sections::{BudgetSection, BudgetTarget, Pace, PalettizeSection, Prompts, PruneSection, SolverKind, Target};
use crate::codebook::{Grouping, OnMisfit, PaletteOptions, PruneOptions, Sparsity};
use crate::error::{Error, Result};
use crate::shorten::shorten;

/// What the command line says in place of the file; `None` leaves the config as it is. Values are as typed and are checked by
/// [`RunConfig::apply`], by the rules that hold for files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `--model`
    pub model: Option<PathBuf>,
    /// `--device`
    pub device: Option<String>,
    /// `--dtype`
    pub dtype: Option<String>,
    /// `--prompts`: a file of prompts. They are run even if the config names a file of samples.
    pub prompts: Option<PathBuf>,
    /// `--samples`: a safetensors file of samples.
    pub samples: Option<PathBuf>,
    /// `--calibration-nsamples`
    pub calibration_nsamples: Option<i64>,
    /// `--steps`
    pub steps: Option<i64>,
    /// `--guidance`
    pub guidance: Option<f64>,
    /// `--seed`
    pub seed: Option<u64>,
    /// `--height`
    pub height: Option<i64>,
    /// `--width`
    pub width: Option<i64>,
    /// `--solver`: sequential or joint.
    pub solver: Option<String>,
    /// `--granularity`: stage or sublayer.
    pub granularity: Option<String>,
    /// `--target`: current or dense.
    pub target: Option<String>,
    /// `--target-size`
    pub target_size: Option<String>,
    /// `--target-bits`
    pub target_bits: Option<f64>,
    /// `--captions`
    pub captions: Option<PathBuf>,
    /// `--target-sparsity`, for every rule of `prune` that is not null. Adds the section where there is none.
    pub target_sparsity: Option<f64>,
    /// `--n-m-ratio`, such as `2:4`; likewise.
    pub n_m_ratio: Option<String>,
    /// `--n-bits`, for every rule of `palettize` that is not null. Adds the section where there is none.
    pub n_bits: Option<i64>,
    /// `--group-size`; likewise, and it makes the granularity `per_grouped_channel`.
    pub group_size: Option<i64>,
    /// `--on-misfit`
    pub on_misfit: Option<String>,
}

/// Collects the values that pass and the mistakes of those that do not.
#[derive(Debug, Default)]
struct Flags {
    mistakes: Vec<Mistake>,
}

impl Flags {
    fn mistake(&mut self, flag: &str, value: impl std::fmt::Display, problem: impl Into<String>) {
        let value = shorten(&value.to_string());
        self.mistakes.push(Mistake { place: Place::Flag(format!("{flag} {value}")), problem: problem.into() });
    }

    /// Checks the value of a flag, if it is given, and hands it to `set`, which may refuse it too.
    fn set<T: std::fmt::Display + Clone, U>(
        &mut self,
        flag: &str,
        value: &Option<T>,
        check: impl FnOnce(T) -> Result<U, String>,
        set: impl FnOnce(U) -> Result<(), String>,
    ) {
        let Some(value) = value else { return };
        if let Err(problem) = check(value.clone()).and_then(set) {
            self.mistake(flag, value, problem);
        }
    }

    /// A path must be text, since configs are.
    fn path(&mut self, flag: &str, path: &Option<PathBuf>, set: impl FnOnce(PathBuf)) {
        let Some(path) = path else { return };
        match path.to_str() {
            Some(text) if !text.trim().is_empty() => set(path.clone()),
            Some(_) => self.mistake(flag, "''", "must not be empty"),
            None => self.mistake(flag, path.display(), "is not UTF-8, and could not be written into the config as resolved"),
        }
    }
}

impl RunConfig {
    /// Lets flags override the config. Settings of layers go into `global_config` and into every type and name rule that is not
    /// `null`: a layer that the config leaves alone stays alone. Another solver brings the granularity and the target that go with it, and
    /// another granularity its target, unless these have flags too.
    ///
    /// # Errors
    /// [`Error::Config`] with every flag whose value cannot be; then the config is as it was.
    pub fn apply(&mut self, overrides: &Overrides) -> Result<()> {
        let Overrides {
            model,
            device,
            dtype,
            prompts,
            samples,
            calibration_nsamples,
            steps,
            guidance,
            seed,
            height,
            width,
            solver,
            granularity,
            target,
            captions,
            target_size,
            target_bits,
            target_sparsity,
            n_m_ratio,
            n_bits,
            group_size,
            on_misfit,
        } = overrides;
        let mut changed = self.clone();
        let mut flags = Flags::default();

        let section = &mut changed.model;
        flags.path("--model", model, |path| section.path = Some(path));
        flags.set("--device", device, |name| limits::device(&name), |name| put(&mut section.device, name));
        flags.set("--dtype", dtype, |name| limits::dtype(&name), |name| put(&mut section.dtype, name));

        let section = &mut changed.calibration;
        if prompts.is_some() && samples.is_some() {
            flags.mistake("--prompts", path_text(prompts), "and --samples exclude each other");
        }
        flags.path("--prompts", prompts, |path| {
            section.prompts = Prompts::File(path);
            section.samples = None;
        });
        flags.path("--samples", samples, |path| section.samples = Some(path));
        flags.path("--captions", captions, |path| section.captions = Some(path));
        let nsamples = &mut section.calibration_nsamples;
        flags.set("--calibration-nsamples", calibration_nsamples, |n| limits::count(n.into()), |n| put(nsamples, n));
        flags.set("--steps", steps, |n| limits::count(n.into()), |n| put(&mut section.steps, n));
        flags.set("--guidance", guidance, limits::not_negative, |guidance| put(&mut section.guidance, guidance));
        flags.set("--seed", seed, Ok, |seed| put(&mut section.seed, seed));
        let mut size = (section.size.map(|(height, _)| height), section.size.map(|(_, width)| width));
        flags.set("--height", height, |n| limits::pixels(n.into()), |n| put(&mut size.0, Some(n)));
        flags.set("--width", width, |n| limits::pixels(n.into()), |n| put(&mut size.1, Some(n)));
        match (height, width) {
            (Some(height), None) if section.size.is_none() => flags.mistake("--height", height, "needs --width too"),
            (None, Some(width)) if section.size.is_none() => flags.mistake("--width", width, "needs --height too"),
            _ => section.size = size.0.zip(size.1),
        }

        let prune = &mut changed.prune;
        if let (Some(share), Some(_)) = (target_sparsity, n_m_ratio) {
            flags.mistake("--target-sparsity", format!("{share:?}"), "and --n-m-ratio exclude each other");
        }
        let shown = target_sparsity.map(|share| format!("{share:?}"));
        let share = |_| target_sparsity.map_or(Ok(0.0), limits::target_sparsity);
        flags.set("--target-sparsity", &shown, share, |share| {
            each_pruned(prune, |settings| put(&mut settings.sparsity, Sparsity::Unstructured(share)))
        });
        flags.set(
            "--n-m-ratio",
            n_m_ratio,
            |text| limits::n_m_text(&text),
            |pair| {
                each_pruned(prune, |settings| {
                    limits::whole_groups(pair, settings.block)?;
                    put(&mut settings.sparsity, Sparsity::NOfM(pair))
                })
            },
        );

        let palettize = &mut changed.palettize;
        flags.set(
            "--n-bits",
            n_bits,
            |n| limits::n_bits(n.into()),
            |n_bits| each_palettized(palettize, |settings| put(&mut settings.bits, n_bits)),
        );
        flags.set(
            "--group-size",
            group_size,
            |n| limits::count(n.into()),
            |group_size| {
                each_palettized(palettize, |settings| put(&mut settings.grouping, Grouping::PerGroupedChannel { group_size }))
            },
        );
        flags.set(
            "--on-misfit",
            on_misfit,
            |word| named(&word, &OnMisfit::ALL.map(|policy| (policy.name(), policy))),
            |on_misfit| match palettize {
                Some(section) => put(&mut section.on_misfit, on_misfit),
                None => Err("has no `palettize` section to change".into()),
            },
        );

        // What is changed brings what goes with it, unless that has a flag too.
        let was = (changed.solver, changed.pace);
        flags.set("--solver", solver, |word| named(&word, SolverKind::WORDS), |solver| put(&mut changed.solver, solver));
        if let (Err(problem), Some(solver)) = (changed.check_solver(), solver) {
            flags.mistake("--solver", solver, problem);
        }
        if changed.solver != was.0 {
            changed.pace = Pace::of(changed.solver);
        }
        flags.set("--granularity", granularity, |word| named(&word, Pace::WORDS), |pace| put(&mut changed.pace, pace));
        if (changed.solver, changed.pace) != was {
            changed.target = Target::of(changed.solver, changed.pace);
        }
        flags.set("--target", target, |word| named(&word, Target::WORDS), |target| put(&mut changed.target, target));
        if let (Err(problem), Some(target)) = (changed.check_target(), target) {
            flags.mistake("--target", target, problem);
        }

        if let (Some(_), Some(bits)) = (target_size, target_bits) {
            flags.mistake("--target-bits", bits, "and --target-size exclude each other");
        }
        let mut aim = |target| {
            match &mut changed.budget {
                Some(budget) => budget.target = target,
                none => *none = Some(BudgetSection::of(target)),
            }
            changed.check_budget()
        };
        flags.set("--target-size", target_size, |text| limits::bytes(&text), |bytes| aim(BudgetTarget::Size(bytes)));
        flags.set("--target-bits", target_bits, limits::target_bits, |bits| aim(BudgetTarget::Bits(bits)));

        if flags.mistakes.is_empty() {
            *self = changed;
            Ok(())
        } else {
            Err(Error::Config { mistakes: flags.mistakes })
        }
    }
}

fn path_text(path: &Option<PathBuf>) -> String {
    path.as_deref().map(Path::display).map(|path| path.to_string()).unwrap_or_default()
}

fn put<T>(place: &mut T, value: T) -> Result<(), String> {
    *place = value;
    Ok(())
}

fn each_pruned(
    section: &mut Option<PruneSection>,
    set: impl FnMut(&mut PruneOptions) -> Result<(), String>,
) -> Result<(), String> {
    each("prune", &mut section.get_or_insert_default().rules, set)
}

fn each_palettized(
    section: &mut Option<PalettizeSection>,
    set: impl FnMut(&mut PaletteOptions) -> Result<(), String>,
) -> Result<(), String> {
    each("palettize", &mut section.get_or_insert_default().rules, set)
}

fn each<S>(section: &str, rules: &mut Rules<S>, mut set: impl FnMut(&mut S) -> Result<(), String>) -> Result<(), String> {
    let mut any = false;
    for settings in rules.settings_mut() {
        set(settings)?;
        any = true;
    }
    if any { Ok(()) } else { Err(format!("changes nothing: every rule of `{section}` is null")) }
}
