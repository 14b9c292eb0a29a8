//! The config of a run: a YAML file with the sections `model`, `calibration`, `prune`, `palettize`,
//! `text_encoders`, `vae`, `joint`, `budget` and `tune`, in coremltools' words where it has them,
//! and the keys `solver`, `sequencing` and `target`. Every key is declared once, in `keys.rs`.
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
mod layer_info;
mod limits;
mod mistake;
mod prompts;
mod read;
pub mod reference;
mod resolve;
mod rules;
mod run_config;
mod sections;
mod settings;
mod tree;
mod tune;
mod unshipped;
mod vectors;
mod without_folders;
mod words;

pub use edit::{ConfigFlag, Edit, flags};
pub use finding::{Finding, Section, Severity, VectorMisfit, Why};
pub use layer_info::LayerInfo;
pub use mistake::Written;
pub use prompts::{Prompts, read_prompts};
pub use resolve::{Choice, LayerResolution, Resolution, RuleUse};
pub use rules::{RuleIndex, Rules};
pub use run_config::{RESOLVED_BY, Remarks, RunConfig};
pub use sections::{
    BudgetSection, BudgetTarget, CalibrationSection, ModelSection, NetworkSection, PalettizeSection, PruneSection, SizeSearch,
    VaeSection,
};
pub use squeeze_base::error::{Mistake, Place};
pub use tune::TuneSection;
pub use without_folders::file_name;
pub use words::{Feed, SequencingWord, SolverKind, Target, TimestepWeighting, TuneWeighting};
