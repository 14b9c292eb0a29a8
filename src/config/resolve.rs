//! Resolution: the settings of each layer of a model, from the rules of a config.

use std::collections::BTreeSet;

use squeeze_base::error::{Error, Result};
use squeeze_base::pattern::NamePattern;
use squeeze_codebook::{Grouping, Misfit, PaletteOptions, PruneOptions, Sparsity};

use super::finding::{Finding, Section, Severity, Why};
use super::layer_info::LayerInfo;
use super::mistake::{Written, nearest};
use super::rules::{Decided, RuleIndex, Rules};
use super::run_config::RunConfig;
use super::sections::{PalettizeSection, PruneSection};
use super::vectors;
use super::words::SolverKind;

/// The settings of each layer, the effect of each rule, and the findings.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolution {
    /// One for each layer, in the order given.
    pub layers: Vec<LayerResolution>,
    /// The effect of each rule, section by section in the order in which rules are tried.
    pub rules: Vec<RuleUse>,
    /// Errors first, then warnings, then notes.
    pub findings: Vec<Finding>,
}

/// The settings of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerResolution {
    /// The layer's name.
    pub name: String,
    /// How it is pruned.
    pub prune: Choice<PruneOptions>,
    /// How it is palettized. A group size that `on_misfit` has changed is given as changed.
    pub palettize: Choice<PaletteOptions>,
}

/// Settings, or the reason for which there are none.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice<S> {
    /// The layer gets these settings.
    Apply(S),
    /// The layer is left alone.
    Leave(Why),
}

impl<S> Choice<S> {
    /// The settings, if the layer gets any.
    pub fn settings(&self) -> Option<&S> {
        match self {
            Choice::Apply(settings) => Some(settings),
            Choice::Leave(_) => None,
        }
    }
}

/// The effect of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleUse {
    /// The rule's section.
    pub section: Section,
    /// The rule in words: `` `conv_out` `` of `module_name_configs`, a type, `global_config`; an
    /// entry of `layers`.
    pub rule: String,
    /// Layers that it matches.
    pub matched: usize,
    /// Layers whose settings it decides.
    pub decided: usize,
}

impl Resolution {
    /// Adds a warning that was found after the rules were applied, and logs it.
    pub(crate) fn add(&mut self, warning: Option<Finding>) {
        let Some(warning) = warning else { return };
        tracing::warn!("{}", warning.mistake());
        let warnings = self.findings.partition_point(|finding| finding.severity() >= Severity::Warning);
        self.findings.insert(warnings, warning);
    }

    /// The resolution, if none of its findings is an error.
    ///
    /// # Errors
    /// [`Error::Config`] with all findings that are errors.
    pub fn checked(self) -> Result<Resolution> {
        let errors = self.findings.iter().filter(|finding| finding.severity() == Severity::Error);
        let mistakes: Vec<_> = errors.map(Finding::mistake).collect();
        if mistakes.is_empty() { Ok(self) } else { Err(Error::Config { mistakes }) }
    }
}

impl RunConfig {
    /// Gives each of a model's layers its settings, by coremltools' order of rules (see [`Rules`]).
    ///
    /// Patterns that match nothing, groups that do not divide the channels and the like are
    /// findings. Warnings are logged too. [`Resolution::checked`] turns findings that are errors
    /// into an [`Error`].
    #[must_use]
    pub fn resolve(&self, layers: &[LayerInfo]) -> Resolution {
        let RunConfig { prune, palettize, remarks, .. } = self;
        let mut findings = remarks.0.clone();
        let mut rules = Vec::new();
        let pruned = match prune {
            Some(section) => resolve_prune(section, layers, &mut rules, &mut findings),
            None => layers.iter().map(|_| Choice::Leave(Why::NoSection)).collect(),
        };
        let palettized = match palettize {
            Some(section) => resolve_palettize((Section::Palettize, section), layers, &pruned, &mut rules, &mut findings),
            None => layers.iter().map(|_| Choice::Leave(Why::NoSection)).collect(),
        };
        self.resolved(layers, (pruned, palettized), rules, findings)
    }

    /// Gives each layer of the networks of `section`, of the text encoders or the VAE, its
    /// settings, as [`resolve`](Self::resolve) does for the UNet's. Where the config has no such
    /// section, every layer is left alone.
    #[must_use]
    pub fn resolve_networks(&self, section: Section, layers: &[LayerInfo]) -> Resolution {
        let of_section = match section {
            Section::TextEncoders => self.text_encoders.as_ref(),
            Section::Vae => self.vae.as_ref().map(|section| &section.network),
            Section::Prune | Section::Palettize => None,
        };
        let left = || layers.iter().map(|_| Choice::Leave(Why::NoSection)).collect::<Vec<_>>();
        let (mut rules, mut findings) = (Vec::new(), Vec::new());
        let palettized = match of_section {
            Some(of) => resolve_palettize((section, &of.palettize), layers, &left(), &mut rules, &mut findings),
            None => layers.iter().map(|_| Choice::Leave(Why::NoSection)).collect(),
        };
        self.resolved(layers, (left(), palettized), rules, findings)
    }

    fn resolved(
        &self,
        layers: &[LayerInfo],
        (pruned, palettized): (Vec<Choice<PruneOptions>>, Vec<Choice<PaletteOptions>>),
        rules: Vec<RuleUse>,
        mut findings: Vec<Finding>,
    ) -> Resolution {
        findings.extend(not_joint(self.solver == SolverKind::Joint, layers, &palettized));
        // A stable sort keeps the order of the config and of the model among equals.
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity()));
        for finding in findings.iter().filter(|finding| finding.severity() == Severity::Warning) {
            tracing::warn!("{}", finding.mistake());
        }
        let layers = layers.iter().zip(pruned).zip(palettized);
        let layers = layers.map(|((layer, prune), palettize)| LayerResolution { name: layer.name.clone(), prune, palettize });
        Resolution { layers: layers.collect(), rules, findings }
    }
}

fn resolve_prune(
    section: &PruneSection,
    layers: &[LayerInfo],
    uses: &mut Vec<RuleUse>,
    findings: &mut Vec<Finding>,
) -> Vec<Choice<PruneOptions>> {
    let PruneSection { layers: stages, algorithm: _, rules } = section;
    check_stages(stages, layers, uses, findings);
    let inside =
        |layer: &LayerInfo| layer.stage.as_ref().is_some_and(|stage| stages.iter().any(|listed| listed.value.matches(stage)));
    let in_scope: Vec<bool> = layers.iter().map(inside).collect();
    let decided = check_rules(Section::Prune, rules, layers, &in_scope, uses, findings);
    let choose = |((layer, inside), rule): ((&LayerInfo, &bool), &RuleIndex)| {
        if !inside {
            return Choice::Leave(Why::OutsideLayers);
        }
        let settings = match rules.settings(*rule) {
            Some(settings) => *settings,
            None => return Choice::Leave(Why::NoSettings(describe(rules, *rule))),
        };
        match settings.sparsity {
            Sparsity::NOfM(ratio) if !divides(ratio.m, layer.columns()) => {
                findings.push(Finding::RatioMisfit { layer: layer.name.clone(), columns: layer.columns(), ratio });
                Choice::Leave(Why::Misfit)
            }
            Sparsity::NOfM(_) | Sparsity::Unstructured(_) => Choice::Apply(settings),
        }
    };
    let choices: Vec<_> = layers.iter().zip(&in_scope).zip(&decided).map(choose).collect();
    left_alone(Section::Prune, layers, &choices, findings);
    choices
}

fn resolve_palettize(
    (name, section): (Section, &PalettizeSection),
    layers: &[LayerInfo],
    pruned: &[Choice<PruneOptions>],
    uses: &mut Vec<RuleUse>,
    findings: &mut Vec<Finding>,
) -> Vec<Choice<PaletteOptions>> {
    let PalettizeSection { rules, on_misfit, weight_threshold } = section;
    let decided = check_rules(name, rules, layers, &vec![true; layers.len()], uses, findings);
    let choose = |((layer, rule), pruned): ((&LayerInfo, &RuleIndex), &Choice<PruneOptions>)| {
        let settings = match rules.settings(*rule) {
            Some(settings) => *settings,
            None => return Choice::Leave(Why::NoSettings(describe(rules, *rule))),
        };
        if layer.elements() <= *weight_threshold {
            return Choice::Leave(Why::Small { weight_threshold: *weight_threshold });
        }
        // A caller's shape without such a dimension counts as one channel.
        let channels = layer.shape.get(settings.axis).copied().unwrap_or(1);
        let count = usize::try_from(channels).unwrap_or(1).max(1);
        let misfit = settings.grouping.group_size().and_then(|size| Some((size, on_misfit.outcome(count, size)?)));
        let settings = match misfit {
            None => settings,
            Some((group_size, becomes)) => {
                findings.push(Finding::GroupMisfit { layer: layer.name.clone(), channels, group_size, becomes });
                let Misfit::SmallerGroup(group_size) = becomes else { return Choice::Leave(Why::Misfit) };
                PaletteOptions { grouping: Grouping::PerGroupedChannel { group_size }, ..settings }
            }
        };
        if settings.vector_length == 1 {
            return Choice::Apply(settings);
        }
        let columns = usize::try_from(layer.columns()).unwrap_or(1).max(1);
        let share = pruned.settings().map_or(0.0, |options| options.sparsity.share(columns));
        vectors::fit(settings, layer, share, *on_misfit, findings).map_or(Choice::Leave(Why::Misfit), Choice::Apply)
    };
    let choices: Vec<_> = layers.iter().zip(&decided).zip(pruned).map(choose).collect();
    left_alone(name, layers, &choices, findings);
    choices
}

/// The layers whose palettes the joint solver makes after pruning.
fn not_joint(is_joint: bool, layers: &[LayerInfo], choices: &[Choice<PaletteOptions>]) -> Option<Finding> {
    let is_left =
        |choice: &Choice<PaletteOptions>| choice.settings().is_some_and(|settings| !squeeze_solver::finds_jointly(settings));
    let left = layers.iter().zip(choices).filter(|(_, choice)| is_joint && is_left(choice));
    let layers: Vec<String> = left.map(|(layer, _)| layer.name.clone()).collect();
    (!layers.is_empty()).then_some(Finding::NotJoint { layers })
}

fn divides(part: usize, whole: i64) -> bool {
    i64::try_from(part).is_ok_and(|part| whole.checked_rem(part) == Some(0))
}

/// The one stage that some models lack, whatever their size: the default of `prune.layers` names
/// it.
const MID_BLOCK: &str = "mid_block";

fn check_stages(stages: &[Written<NamePattern>], layers: &[LayerInfo], uses: &mut Vec<RuleUse>, findings: &mut Vec<Finding>) {
    let names: BTreeSet<&String> = layers.iter().filter_map(|layer| layer.stage.as_ref()).collect();
    for Written { value: pattern, place } in stages {
        let matched = layers.iter().filter(|layer| layer.stage.as_ref().is_some_and(|stage| pattern.matches(stage))).count();
        uses.push(RuleUse { section: Section::Prune, rule: format!("layers `{pattern}`"), matched, decided: matched });
        if matched == 0 && pattern.matches(MID_BLOCK) {
            findings.push(Finding::NoMidBlock { pattern: pattern.to_string(), place: place.clone() });
        } else if matched == 0 {
            let stages = names.iter().map(|name| (*name).clone()).collect();
            findings.push(Finding::NoStage { pattern: pattern.to_string(), place: place.clone(), stages });
        }
    }
}

/// The number of patterns without a match for which the nearest name is searched.
const FEW: usize = 32;

/// Counts the layers that each rule matches and decides, and reports the rules that decide none.
/// Returns for each layer the rule that decides.
fn check_rules<S>(
    section: Section,
    rules: &Rules<S>,
    layers: &[LayerInfo],
    in_scope: &[bool],
    uses: &mut Vec<RuleUse>,
    findings: &mut Vec<Finding>,
) -> Vec<RuleIndex> {
    let Decided { matched: by_pattern, by: decided } = rules.decide_all(layers);
    let decides = |rule: RuleIndex| decided.iter().zip(in_scope).filter(|(by, inside)| **by == rule && **inside).count();
    let Rules { global_config: _, module_type_configs, module_name_configs } = rules;
    for (index, (Written { value: pattern, place }, _)) in module_name_configs.iter().enumerate() {
        let rule = RuleIndex::Name(index);
        let matched: Vec<RuleIndex> = by_pattern[index].iter().map(|layer| decided[*layer]).collect();
        uses.push(RuleUse { section, rule: describe(rules, rule), matched: matched.len(), decided: decides(rule) });
        let (pattern, place) = (pattern.to_string(), place.clone());
        let by: BTreeSet<RuleIndex> = matched.iter().copied().collect();
        if matched.is_empty() {
            // The search for the nearest name is slow, and a config with many such patterns is
            // meant for another model.
            let few = findings.iter().filter(|finding| matches!(finding, Finding::NoLayer { .. })).count() < FEW;
            let names = layers.iter().map(|layer| layer.name.as_str());
            let nearest = if few { nearest(&literal(&pattern), names).map(str::to_owned) } else { None };
            findings.push(Finding::NoLayer { section, pattern, place, nearest });
        } else if !by.contains(&rule) {
            let name = |by: &RuleIndex| match by {
                RuleIndex::Name(index) => Some(module_name_configs[*index].0.value.to_string()),
                RuleIndex::Type(_) | RuleIndex::Global => None,
            };
            findings.push(Finding::Shadowed { section, pattern, place, by: by.iter().filter_map(name).collect() });
        } else if decides(rule) == 0 {
            findings.push(Finding::OutOfReach { pattern, place });
        }
    }
    for (module_type, _) in module_type_configs {
        let rule = RuleIndex::Type(*module_type);
        let matched = layers.iter().filter(|layer| layer.module_type == *module_type).count();
        uses.push(RuleUse { section, rule: describe(rules, rule), matched, decided: decides(rule) });
        if matched == 0 {
            findings.push(Finding::NoLayerOfType { section, module_type: *module_type });
        }
    }
    let rule = RuleIndex::Global;
    uses.push(RuleUse { section, rule: describe(rules, rule), matched: layers.len(), decided: decides(rule) });
    decided
}

/// A pattern without its escapes, which can be compared with names.
fn literal(pattern: &str) -> String {
    pattern.replace(r"\d+", "0").replace(".*", "").replace('\\', "")
}

fn describe<S>(rules: &Rules<S>, rule: RuleIndex) -> String {
    match rule {
        RuleIndex::Name(index) => {
            format!("module_name_configs `{}`", rules.module_name_configs[index].0.value)
        }
        RuleIndex::Type(module_type) => format!("module_type_configs `{module_type}`"),
        RuleIndex::Global => "global_config".to_owned(),
    }
}

/// Lists the layers that are left alone, by reason. Layers that do not fit have findings of their
/// own.
fn left_alone<S>(section: Section, layers: &[LayerInfo], choices: &[Choice<S>], findings: &mut Vec<Finding>) {
    /// The most `null` rules that are listed one by one. A recipe with a rule for each layer would
    /// otherwise make as many findings as the model has layers.
    const LISTED: usize = 8;
    let nulls =
        choices.iter().filter_map(|choice| if let Choice::Leave(Why::NoSettings(rule)) = choice { Some(rule) } else { None });
    let nulls: BTreeSet<&String> = nulls.collect();
    let each = Why::NoSettings(format!("each of {} rules", nulls.len()));
    let mut groups: Vec<(&Why, Vec<String>)> = Vec::new();
    for (layer, choice) in layers.iter().zip(choices) {
        let why = match choice {
            Choice::Apply(_) | Choice::Leave(Why::Misfit) => continue,
            Choice::Leave(Why::NoSettings(_)) if nulls.len() > LISTED => &each,
            Choice::Leave(why) => why,
        };
        match groups.iter_mut().find(|(other, _)| *other == why) {
            Some((_, names)) => names.push(layer.name.clone()),
            None => groups.push((why, vec![layer.name.clone()])),
        }
    }
    findings.extend(groups.into_iter().map(|(why, layers)| Finding::LeftAlone { section, why: why.clone(), layers }));
    if choices.iter().all(|choice| choice.settings().is_none()) {
        findings.push(Finding::Idle { section });
    }
}
