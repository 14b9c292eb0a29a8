//! The config of a run: a YAML file of four sections, `model`, `calibration`, `prune` and `palettize`, in coremltools' own words
//! where it has them, and the keys `solver`, `granularity`, `target` and `budget`.
//!
//! A file is first parsed into a tree whose values know their places and then walked to the end, so that all its mistakes
//! are found at once. Once a model's layers are known, [`RunConfig::resolve`] says what becomes of each.

mod effort;
mod emit;
mod fields;
mod finding;
mod limits;
mod mistake;
mod overrides;
mod prompts;
mod resolve;
mod rules;
mod sections;
mod settings;
mod tree;

use std::path::Path;

pub use finding::{Finding, Section, Severity, Why};
pub use mistake::{Mistake, Place, Written};
pub use overrides::Overrides;
pub use prompts::{check_prompt, read_prompts};
pub use resolve::{Choice, LayerInfo, LayerResolution, Resolution, RuleUse};
pub use rules::{RuleIndex, Rules};
pub use sections::{
    BudgetSection, BudgetTarget, CalibrationSection, ModelSection, Pace, PalettizeSection, Prompts, PruneSection, SolverKind,
    Target, TimestepWeighting,
};

use crate::codebook::{Effort, PruneMethod};
use crate::error::{Error, Result};
use crate::input::{self, Limit};
use emit::Yaml;
use fields::{Fields, word};
use mistake::Mistakes;
use tree::Value;

/// Everything that decides what a run does.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunConfig {
    /// The model and where it is computed.
    pub model: ModelSection,
    /// The calibration samples.
    pub calibration: CalibrationSection,
    /// How masks, weights and palettes are found.
    pub solver: SolverKind,
    /// When a stage's layers learn of each other: the key `granularity`.
    pub pace: Pace,
    /// What a layer's outputs are to be close to.
    pub target: Target,
    /// How hard the joint solver tries: the section `joint`.
    pub effort: Effort,
    /// Pruning; `None` prunes nothing.
    pub prune: Option<PruneSection>,
    /// Palettization; `None` palettizes nothing.
    pub palettize: Option<PalettizeSection>,
    /// How many bytes the result may have; `None`: what the sections above make.
    pub budget: Option<BudgetSection>,
}

impl RunConfig {
    /// Whether calibration is needed, unless no layer is left that needs it.
    pub fn is_calibrated(&self) -> bool {
        self.solver == SolverKind::Joint || self.prune.as_ref().is_some_and(|section| section.algorithm == PruneMethod::SparseGpt)
    }

    /// Reads a config.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file of at most 1 MiB; [`Error::Config`] with all mistakes of the file.
    pub fn read(path: &Path) -> Result<RunConfig> {
        RunConfig::parse(path, &input::read(path, Limit::RUN_CONFIG)?)
    }

    /// Reads a config from memory; `path` names it in mistakes.
    ///
    /// # Errors
    /// [`Error::Config`] with all mistakes. After a mistake of YAML's syntax nothing more is found.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<RunConfig> {
        let mut mistakes = Mistakes::new(path);
        let config = match tree::parse(bytes) {
            Ok(tree::Node { value: Value::Null, position }) => {
                mistakes.add(position, "the config is empty; it needs `prune`, `palettize` or both");
                RunConfig::default()
            }
            Ok(root) => RunConfig::from_tree(&root, &mut mistakes),
            Err((position, why)) => {
                mistakes.add(position, why);
                RunConfig::default()
            }
        };
        let mistakes = mistakes.into_sorted();
        if mistakes.is_empty() { Ok(config) } else { Err(Error::Config { mistakes }) }
    }

    fn from_tree(root: &tree::Node, mistakes: &mut Mistakes<'_>) -> RunConfig {
        let mut sections = Fields::new("the config", root, mistakes);
        let solver = sections.get("solver", mistakes, |node| word(node, SolverKind::WORDS));
        let pace = sections.get("granularity", mistakes, |node| word(node, Pace::WORDS));
        let target = sections.get("target", mistakes, |node| word(node, Target::WORDS));
        let prune = section(&mut sections, "prune", mistakes, PruneSection::read);
        let solver = solver.unwrap_or_else(|| SolverKind::that_can(prune.as_ref()));
        let pace = pace.unwrap_or_else(|| Pace::of(solver));
        let config = RunConfig {
            model: section(&mut sections, "model", mistakes, ModelSection::read).unwrap_or_default(),
            calibration: section(&mut sections, "calibration", mistakes, CalibrationSection::read).unwrap_or_default(),
            solver,
            pace,
            target: target.unwrap_or_else(|| Target::of(solver, pace)),
            effort: section(&mut sections, "joint", mistakes, effort::read).unwrap_or_default(),
            prune,
            palettize: section(&mut sections, "palettize", mistakes, PalettizeSection::read),
            budget: section(&mut sections, "budget", mistakes, BudgetSection::read).flatten(),
        };
        if let (Err(problem), Some(node)) = (config.check_budget(), sections.given("budget")) {
            mistakes.add(node.position, problem);
        }
        if let (Err(problem), Some(node)) = (config.check_solver(), sections.given("solver")) {
            mistakes.add(node.position, format!("`solver: joint` {problem}"));
        }
        if let (Err(problem), Some(node)) = (config.check_target(), sections.given("target")) {
            mistakes.add(node.position, format!("`target: dense` {problem}"));
        }
        sections.finish(mistakes);
        config
    }

    /// Whether the solver can do what the sections say.
    fn check_solver(&self) -> Result<(), String> {
        let magnitude = self.prune.as_ref().is_some_and(|section| section.algorithm == PruneMethod::Magnitude);
        if self.solver == SolverKind::Joint && magnitude {
            return Err("chooses masks as sparse_gpt does, which `prune` must name as its `algorithm`, not magnitude".into());
        }
        Ok(())
    }

    /// Whether there is what a budget can be spent on.
    fn check_budget(&self) -> Result<(), String> {
        if self.budget.is_some() && (self.solver != SolverKind::Joint || self.palettize.is_none()) {
            return Err("a budget needs `solver: joint` and a `palettize` section".into());
        }
        Ok(())
    }

    /// Whether layers can aim at what the sections say.
    fn check_target(&self) -> Result<(), String> {
        if self.target == Target::Dense && (self.solver != SolverKind::Joint || self.pace != Pace::Sublayer) {
            return Err("needs `solver: joint` and `granularity: sublayer`".into());
        }
        Ok(())
    }

    /// The config as YAML with every default spelt out; it parses to an equal config.
    pub fn to_yaml(&self) -> String {
        let RunConfig { model, calibration, solver, pace, target, effort, prune, palettize, budget } = self;
        let mut yaml = Yaml::default();
        yaml.line(concat!(
            "# The config as resolved by sdxl-squeeze ",
            env!("CARGO_PKG_VERSION"),
            ", with all defaults and flags."
        ));
        yaml.block("model", |yaml| model.write(yaml));
        yaml.block("calibration", |yaml| calibration.write(yaml));
        yaml.entry("solver", solver.name());
        yaml.entry("granularity", pace.name());
        yaml.entry("target", target.name());
        yaml.block("joint", |yaml| effort::write(effort, yaml));
        match prune {
            Some(section) => yaml.block("prune", |yaml| section.write(yaml)),
            None => yaml.entry("prune", "null"),
        }
        match palettize {
            Some(section) => yaml.block("palettize", |yaml| section.write(yaml)),
            None => yaml.entry("palettize", "null"),
        }
        match budget {
            Some(section) => yaml.block("budget", |yaml| section.write(yaml)),
            None => yaml.entry("budget", "null"),
        }
        yaml.into_text()
    }
}

/// A section, if it is there and not `null`.
fn section<T>(
    sections: &mut Fields<'_>,
    key: &'static str,
    mistakes: &mut Mistakes<'_>,
    read: impl FnOnce(&mut Fields<'_>, &mut Mistakes<'_>) -> T,
) -> Option<T> {
    let mut fields = Fields::new(key, sections.given(key)?, mistakes);
    let section = read(&mut fields, mistakes);
    fields.finish(mistakes);
    Some(section)
}
