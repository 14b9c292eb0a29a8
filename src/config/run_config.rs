//! A whole config, and the rules about several of its sections.

use serde::Serialize;
use squeeze_codebook::{Effort, Grid, PruneMethod};

use super::effort;
use super::fields::Fields;
use super::finding::Finding;
use super::mistake::Mistakes;
use super::sections::{
    BudgetSection, CalibrationSection, ModelSection, NetworkSection, PalettizeSection, PruneSection, VaeSection,
};
use super::tree::Node;
use super::tune::TuneSection;
use super::words::{SequencingWord, SolverKind, Target};

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
    pub sequencing: SequencingWord,
    /// Which outputs a compressed layer is fitted to.
    pub target: Target,
    /// Effort of the joint solver: the section `joint`.
    #[serde(rename = "joint", serialize_with = "effort::write")]
    pub effort: Effort,
    /// Pruning; `None` prunes nothing.
    pub prune: Option<PruneSection>,
    /// Palettization; `None` palettizes nothing.
    pub palettize: Option<PalettizeSection>,
    /// Palettization of the text encoders; `None` leaves them as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoders: Option<NetworkSection>,
    /// Palettization of the VAE; `None` leaves it as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<VaeSection>,
    /// The size that the result keeps to; `None` leaves it to the sections above.
    pub budget: Option<BudgetSection>,
    /// Training after the layers are compressed; `None` trains nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tune: Option<TuneSection>,
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
        let (solver, sequencing) = (SolverKind::Joint, SequencingWord::of(SolverKind::Joint));
        RunConfig {
            model: ModelSection::default(),
            calibration: CalibrationSection::default(),
            solver,
            sequencing,
            target: Target::of(solver, sequencing),
            effort: Effort::default(),
            prune: None,
            palettize: Some(PalettizeSection::default()),
            text_encoders: None,
            vae: None,
            budget: None,
            tune: None,
            remarks: Remarks::default(),
        }
    }
}

/// The first words of [`RunConfig::to_yaml`].
pub const RESOLVED_BY: &str = "# The config as resolved by sdxl-squeeze";

impl RunConfig {
    /// Whether calibration is needed, unless no layer is left that needs it.
    #[must_use]
    pub fn is_calibrated(&self) -> bool {
        self.solver == SolverKind::Joint
            || self.prune.as_ref().is_some_and(|section| section.algorithm == PruneMethod::SparseGpt)
            || self.feeds_back()
    }

    /// Whether the UNet is compressed: it is not where the config has sections for other networks
    /// alone.
    #[must_use]
    pub fn compresses_unet(&self) -> bool {
        let of_others = self.text_encoders.is_some() || self.vae.is_some();
        self.prune.is_some() || self.palettize.is_some() || !of_others
    }

    /// Whether a layer is rounded to fixed values with error feedback.
    fn feeds_back(&self) -> bool {
        self.palettize.as_ref().is_some_and(|section| section.quantizers().any(|quantizer| quantizer.feedback))
    }

    /// The fixed values of a rule, if there is such a rule.
    fn fixed_values(&self) -> Option<Grid> {
        self.palettize.as_ref().and_then(|section| section.quantizers().next()).map(|quantizer| quantizer.grid)
    }

    /// Reads a tree to its end. Mistakes are added to `mistakes`, with defaults in their places.
    pub(super) fn from_tree(root: &Node, mistakes: &mut Mistakes<'_>) -> RunConfig {
        use super::keys::root::*;
        use super::keys::{budget, calibration, joint, model, palettize, prune, text_encoders, tune, vae};
        let fields = Fields::new(SECTION.name, &SECTION, root, mistakes);
        let prune = fields.section(&prune::SECTION, mistakes).map(|fields| PruneSection::read(&fields, mistakes));
        let palettize = fields.section(&palettize::SECTION, mistakes).map(|fields| PalettizeSection::read(&fields, mistakes));
        let fixed = palettize.as_ref().and_then(|section| section.quantizers().next()).map(|quantizer| quantizer.grid);
        let solver = fields
            .get(&SOLVER, mistakes)
            .unwrap_or_else(|| SolverKind::that_can(prune.as_ref().map(|section| section.algorithm), fixed));
        let sequencing = fields.get(&SEQUENCING, mistakes).unwrap_or_else(|| SequencingWord::of(solver));
        let target = fields.get(&TARGET, mistakes).unwrap_or_else(|| Target::of(solver, sequencing));
        let model = fields.section(&model::SECTION, mistakes).map(|fields| ModelSection::read(&fields, mistakes));
        let calibration =
            fields.section(&calibration::SECTION, mistakes).map(|fields| CalibrationSection::read(&fields, mistakes));
        let effort = fields.section(&joint::SECTION, mistakes).map(|fields| effort::read(&fields, mistakes));
        let budget = fields.section(&budget::SECTION, mistakes).map(|fields| BudgetSection::read(&fields, mistakes));
        let tune = fields.section(&tune::SECTION, mistakes).map(|fields| TuneSection::read(&fields, mistakes));
        let text = fields.section(&text_encoders::SECTION, mistakes);
        let text_encoders = text.map(|fields| NetworkSection::of_text_encoders(&fields, mistakes));
        let vae = fields.section(&vae::SECTION, mistakes).map(|fields| VaeSection::read(&fields, mistakes));
        let config = RunConfig {
            model: model.unwrap_or_default(),
            calibration: calibration.unwrap_or_default(),
            solver,
            sequencing,
            target,
            effort: effort.unwrap_or_default(),
            prune,
            palettize,
            text_encoders,
            vae,
            budget: budget.flatten(),
            tune,
            remarks: Remarks::default(),
        };
        let rules = [
            (budget::SECTION.name, config.check_budget()),
            (SOLVER.name, config.check_solver()),
            (TARGET.name, config.check_target()),
            (prune::SECTION.name, config.check_feedback()),
            (tune::SECTION.name, config.check_tune()),
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
        match self.fixed_values() {
            Some(grid) if self.solver == SolverKind::Joint => Err(format!(
                "`solver: joint` finds the values of its palettes; `values: {}` needs `solver: sequential`",
                grid.name()
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Checks that no layer is pruned where errors are fed back.
    fn check_feedback(&self) -> Result<(), String> {
        if self.prune.is_some() && self.feeds_back() {
            return Err("`prune` and `feedback: true` exclude each other".into());
        }
        Ok(())
    }

    /// Checks that there are palettes to be trained.
    fn check_tune(&self) -> Result<(), String> {
        match (&self.tune, self.fixed_values()) {
            (Some(_), Some(grid)) => Err(format!("`tune` trains the entries of palettes, which `values: {}` fixes", grid.name())),
            (Some(_) | None, _) => Ok(()),
        }
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
        if self.target == Target::Dense && (self.solver != SolverKind::Joint || self.sequencing != SequencingWord::Sublayer) {
            return Err("`target: dense` needs `solver: joint` and `sequencing: sublayer`".into());
        }
        Ok(())
    }

    /// The config as JSON with every default spelt out.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("a config consists of text, numbers, lists and mappings with text as keys")
    }

    /// The config as YAML with every default spelt out. It parses to an equal config.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        let options = serde_yaml::ser_options! { compact_list_indent: false, prefer_block_scalars: false };
        let yaml = serde_yaml::to_string_with_options(self, options)
            .expect("a config consists of text, numbers, lists and mappings with text as keys");
        let version = env!("CARGO_PKG_VERSION");
        format!("{RESOLVED_BY} {version}, with all defaults and flags.\n{yaml}")
    }
}
