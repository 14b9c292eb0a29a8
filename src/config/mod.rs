//! The config of a run: a YAML file with the sections `model`, `calibration`, `prune`, `palettize`,
//! `joint` and `budget`, in coremltools' words where it has them, and the keys `solver`,
//! `sequencing` and `target`. Every key is declared once, in `keys.rs`.
//!
//! A file is parsed into a tree in which every value knows its place, the command line's flags edit
//! that tree, and it is then read to the end, so that all mistakes of file and flags are reported
//! at once. Once a model's layers are known, [`RunConfig::resolve`] gives each of them its
//! settings.

mod edit;
mod effort;
mod fields;
mod finding;
mod key;
mod keys;
mod kinds;
mod limits;
mod mistake;
mod prompts;
pub mod reference;
mod resolve;
mod rules;
mod sections;
mod settings;
mod tree;

use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

pub use crate::error::{Mistake, Place};
pub use edit::{ConfigFlag, Edit, flags};
pub use finding::{Finding, Section, Severity, Why};
pub use mistake::Written;
pub use prompts::read_prompts;
pub use resolve::{Choice, LayerInfo, LayerResolution, Resolution, RuleUse};
pub use rules::{RuleIndex, Rules};
pub use sections::{
    BudgetSection, BudgetTarget, CalibrationSection, ModelSection, Pace, PalettizeSection, Prompts, PruneSection, SolverKind,
    Target, TimestepWeighting,
};

use crate::codebook::{Effort, PruneMethod};
use crate::error::{Error, Result};
use crate::input::{self, Limit};
use fields::Fields;
use mistake::Mistakes;
use tree::Value;

/// Everything that decides the result of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    /// The model, and where it is computed. A run refuses a folder, devices or a dtype that differ.
    pub model: ModelSection,
    /// The calibration samples.
    pub calibration: CalibrationSection,
    /// How masks, weights and palettes are found.
    pub solver: SolverKind,
    /// Which inputs a layer is compressed for.
    pub sequencing: Pace,
    /// Which outputs a compressed layer is fitted to.
    pub target: Target,
    /// Effort of the joint solver: the section `joint`.
    #[serde(rename = "joint", serialize_with = "effort::write")]
    pub effort: Effort,
    /// Pruning; `None` prunes nothing.
    pub prune: Option<PruneSection>,
    /// Palettization; `None` palettizes nothing.
    pub palettize: Option<PalettizeSection>,
    /// The size that the result keeps to; `None` leaves it to the sections above.
    pub budget: Option<BudgetSection>,
    /// Warnings about the way in which the config is written.
    #[serde(skip)]
    pub remarks: Remarks,
}

/// Warnings about the way in which a config is written, which is no part of its meaning: any two
/// are equal.
#[derive(Debug, Clone, Default)]
pub struct Remarks(pub Vec<Finding>);

impl PartialEq for Remarks {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Default for RunConfig {
    /// `palettize: {}`: palettes of 4 bits for every weight, found by the joint solver, and no
    /// pruning.
    fn default() -> Self {
        let (solver, sequencing) = (SolverKind::Joint, Pace::of(SolverKind::Joint));
        RunConfig {
            model: ModelSection::default(),
            calibration: CalibrationSection::default(),
            solver,
            sequencing,
            target: Target::of(solver, sequencing),
            effort: Effort::default(),
            prune: None,
            palettize: Some(PalettizeSection::default()),
            budget: None,
            remarks: Remarks::default(),
        }
    }
}

impl RunConfig {
    /// Whether calibration is needed, unless no layer is left that needs it.
    pub fn is_calibrated(&self) -> bool {
        self.solver == SolverKind::Joint || self.prune.as_ref().is_some_and(|section| section.algorithm == PruneMethod::SparseGpt)
    }

    /// Reads a config.
    ///
    /// # Errors
    /// As [`read_edited`](Self::read_edited).
    pub fn read(path: &Path) -> Result<RunConfig> {
        RunConfig::read_edited(path, &[])
    }

    /// Reads a config that flags of the command line edit.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file of at most 1 MiB;
    /// [`Error::Config`] with all mistakes of file and flags.
    pub fn read_edited(path: &Path, edits: &[Edit]) -> Result<RunConfig> {
        let bytes = input::read(path, Limit::RUN_CONFIG).map_err(|error| renamed(path).unwrap_or(error))?;
        RunConfig::parse_edited(path, &bytes, edits)
    }

    /// Reads a config from memory; `path` names it in mistakes.
    ///
    /// # Errors
    /// As [`parse_edited`](Self::parse_edited).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<RunConfig> {
        RunConfig::parse_edited(path, bytes, &[])
    }

    /// Reads a config from memory that flags of the command line edit; `path` names it in mistakes.
    ///
    /// # Errors
    /// [`Error::Config`] with all mistakes. A mistake of YAML's syntax is the only one that is
    /// reported.
    pub fn parse_edited(path: &Path, bytes: &[u8], edits: &[Edit]) -> Result<RunConfig> {
        let mut mistakes = Mistakes::new(path, edits.iter().map(Edit::shown).collect());
        let config = match tree::parse(bytes) {
            Ok(tree::Node { value: Value::Null, position }) => {
                mistakes.add(position, "the config is empty; it needs `prune`, `palettize` or both");
                RunConfig::default()
            }
            Ok(mut root) => {
                edit::apply(&mut root, edits, &mut mistakes);
                RunConfig::from_tree(&root, &mut mistakes)
            }
            Err((position, problem)) => {
                mistakes.add(position, problem);
                RunConfig::default()
            }
        };
        Ok(RunConfig { remarks: Remarks(mistakes.into_remarks()?), ..config })
    }

    fn from_tree(root: &tree::Node, mistakes: &mut Mistakes<'_>) -> RunConfig {
        use keys::root::*;
        use keys::{budget, calibration, joint, model, palettize, prune};
        let fields = Fields::new(SECTION.name, &SECTION, root, mistakes);
        let prune = fields.section(&prune::SECTION, mistakes).map(|fields| PruneSection::read(&fields, mistakes));
        let solver = fields.get(&SOLVER, mistakes).unwrap_or_else(|| SolverKind::that_can(prune.as_ref()));
        let sequencing = fields.get(&SEQUENCING, mistakes).unwrap_or_else(|| Pace::of(solver));
        let target = fields.get(&TARGET, mistakes).unwrap_or_else(|| Target::of(solver, sequencing));
        let model = fields.section(&model::SECTION, mistakes).map(|fields| ModelSection::read(&fields, mistakes));
        let calibration =
            fields.section(&calibration::SECTION, mistakes).map(|fields| CalibrationSection::read(&fields, mistakes));
        let effort = fields.section(&joint::SECTION, mistakes).map(|fields| effort::read(&fields, mistakes));
        let palettize = fields.section(&palettize::SECTION, mistakes).map(|fields| PalettizeSection::read(&fields, mistakes));
        let budget = fields.section(&budget::SECTION, mistakes).map(|fields| BudgetSection::read(&fields, mistakes));
        let config = RunConfig {
            model: model.unwrap_or_default(),
            calibration: calibration.unwrap_or_default(),
            solver,
            sequencing,
            target,
            effort: effort.unwrap_or_default(),
            prune,
            palettize,
            budget: budget.flatten(),
            remarks: Remarks::default(),
        };
        let rules = [
            (budget::SECTION.name, config.check_budget()),
            (SOLVER.name, config.check_solver()),
            (TARGET.name, config.check_target()),
        ];
        for (key, rule) in rules {
            if let (Err(problem), Some(node)) = (rule, fields.given(key)) {
                mistakes.add(node.position, problem);
            }
        }
        config
    }

    /// Checks that the solver can choose masks by the algorithm of `prune`.
    fn check_solver(&self) -> Result<(), String> {
        let magnitude = self.prune.as_ref().is_some_and(|section| section.algorithm == PruneMethod::Magnitude);
        if self.solver == SolverKind::Joint && magnitude {
            return Err("`solver: joint` chooses masks as sparse_gpt does, which `prune` must name as its `algorithm`, \
                        not magnitude"
                .into());
        }
        Ok(())
    }

    /// Checks that there is something to spend a budget on.
    fn check_budget(&self) -> Result<(), String> {
        if self.budget.is_some() && (self.solver != SolverKind::Joint || self.palettize.is_none()) {
            return Err("a budget needs `solver: joint` and a `palettize` section".into());
        }
        Ok(())
    }

    /// Checks that layers can be fitted to the outputs that `target` names.
    fn check_target(&self) -> Result<(), String> {
        if self.target == Target::Dense && (self.solver != SolverKind::Joint || self.sequencing != Pace::Sublayer) {
            return Err("`target: dense` needs `solver: joint` and `sequencing: sublayer`".into());
        }
        Ok(())
    }

    /// The config as YAML with every default spelt out. It parses to an equal config.
    pub fn to_yaml(&self) -> String {
        let options = serde_yaml::ser_options! { compact_list_indent: false, prefer_block_scalars: false };
        let yaml = serde_yaml::to_string_with_options(self, options)
            .expect("a config consists of text, numbers, lists and mappings with text as keys");
        let version = env!("CARGO_PKG_VERSION");
        format!("# The config as resolved by sdxl-squeeze {version}, with all defaults and flags.\n{yaml}")
    }
}

/// The error about a config that is read under a former name: the `joint-*` ones of `configs/`,
/// which run the sequential solver, are called `tutorial-*`.
fn renamed(path: &Path) -> Option<Error> {
    let missing = std::fs::symlink_metadata(path).is_err_and(|why| why.kind() == ErrorKind::NotFound);
    let recipe = path.file_name()?.to_str()?.strip_prefix("joint-")?;
    let present = path.with_file_name(format!("tutorial-{recipe}"));
    (missing && present.is_file()).then(|| {
        let (path, present) = (path.display(), present.display());
        Error::Argument(format!("{path} has been renamed: it is {present} now, as it runs the sequential solver"))
    })
}
