//! Which settings hold for which layer, by coremltools' order of rules.

use super::emit::{self, Yaml};
use super::fields::{Fields, entries};
use super::mistake::{Mistakes, Written, nearest};
use super::resolve::LayerInfo;
use super::settings::Settings;
use super::tree::{Node, Value};
use crate::codebook::LayerKind;
use crate::error::Error;
use crate::pattern::NamePattern;
use crate::shorten::shorten;

/// The rules of a section, as coremltools' `OptimizationConfig.get_module_config` applies them: the first pattern of
/// `module_name_configs` that matches the whole of a layer's name, else the layer's type in `module_type_configs`, else
/// `global_config`. Where the one that is found is `None` (`null` in the file), the layer is left alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules<S> {
    /// For every layer that no other rule names.
    pub global_config: Option<S>,
    /// By type; at most one rule for each type.
    pub module_type_configs: Vec<(LayerKind, Option<S>)>,
    /// By name, in the order of the file.
    pub module_name_configs: Vec<(Written<NamePattern>, Option<S>)>,
}

/// A rule: where in [`Rules`] it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleIndex {
    /// This one of `module_name_configs`.
    Name(usize),
    /// `module_type_configs` for this type.
    Type(LayerKind),
    /// `global_config`.
    Global,
}

/// What rules make of a model's layers.
pub(super) struct Decided {
    /// For each of `module_name_configs`, the layers that it matches.
    pub matched: Vec<Vec<usize>>,
    /// For each layer, the rule that decides.
    pub by: Vec<RuleIndex>,
}

impl<S> Rules<S> {
    /// `global_config` alone.
    pub fn global(settings: S) -> Self {
        Rules { global_config: Some(settings), module_type_configs: Vec::new(), module_name_configs: Vec::new() }
    }

    /// The rule that decides for each of a model's layers: the first pattern that matches its name, else the rule of its type, else
    /// `global_config`. Every pattern is compared with every name once: there may be thousands of both.
    pub(super) fn decide_all(&self, layers: &[LayerInfo]) -> Decided {
        let matching = |pattern: &NamePattern| -> Vec<usize> {
            let names = layers.iter().enumerate().filter(|(_, layer)| pattern.matches(&layer.name));
            names.map(|(index, _)| index).collect()
        };
        let matched: Vec<Vec<usize>> = self.module_name_configs.iter().map(|(pattern, _)| matching(&pattern.value)).collect();
        let by_type = |module_type| match self.module_type_configs.iter().any(|(listed, _)| *listed == module_type) {
            true => RuleIndex::Type(module_type),
            false => RuleIndex::Global,
        };
        let mut by: Vec<RuleIndex> = layers.iter().map(|layer| by_type(layer.module_type)).collect();
        // The first pattern decides, so it comes last here.
        for (index, layers) in matched.iter().enumerate().rev() {
            for layer in layers {
                by[*layer] = RuleIndex::Name(index);
            }
        }
        Decided { matched, by }
    }

    /// The settings of a rule; `None` leaves layers alone.
    pub(super) fn settings(&self, rule: RuleIndex) -> Option<&S> {
        match rule {
            RuleIndex::Name(index) => self.module_name_configs.get(index).and_then(|(_, settings)| settings.as_ref()),
            RuleIndex::Type(module_type) => {
                let listed = self.module_type_configs.iter().find(|(listed, _)| *listed == module_type);
                listed.and_then(|(_, settings)| settings.as_ref())
            }
            RuleIndex::Global => self.global_config.as_ref(),
        }
    }

    /// Every rule that is not `null`.
    pub fn settings_mut(&mut self) -> impl Iterator<Item = &mut S> {
        let Rules { global_config, module_type_configs, module_name_configs } = self;
        let types = module_type_configs.iter_mut().filter_map(|(_, settings)| settings.as_mut());
        let names = module_name_configs.iter_mut().filter_map(|(_, settings)| settings.as_mut());
        global_config.iter_mut().chain(types).chain(names)
    }
}

/// Takes the three keys out of a section. Without any of them, `global_config` has its defaults; with rules for types or
/// names only, the other layers are left alone, as in coremltools.
pub(super) fn read<S: Settings>(section: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Rules<S> {
    let name = section.name().to_owned();
    let global = section.entry("global_config");
    let types = section.given("module_type_configs");
    let names = section.given("module_name_configs");
    let global_config = match global {
        Some(entry) => settings(&format!("{name}.global_config"), entry.value, mistakes),
        None if types.is_none() && names.is_none() => Some(S::default()),
        None => None,
    };
    let mut module_type_configs = Vec::new();
    for entry in types.map(|node| entries(&format!("{name}.module_type_configs"), node, mistakes)).unwrap_or_default() {
        let settings = settings(&format!("{name}.module_type_configs.{}", entry.key), entry.value, mistakes);
        match LayerKind::ALL.into_iter().find(|listed| listed.name() == entry.key) {
            Some(module_type) => module_type_configs.push((module_type, settings)),
            None => {
                let known = LayerKind::ALL.map(LayerKind::name);
                let near = nearest(entry.key, known).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                let known = known.join(" and ");
                mistakes
                    .add(entry.position, format!("unknown module type `{}`: {known} are compressed{near}", shorten(entry.key)));
            }
        }
    }
    let mut module_name_configs = Vec::new();
    let mut names = names.map(|node| entries(&format!("{name}.module_name_configs"), node, mistakes)).unwrap_or_default();
    if let (Some(problem), Some(first)) = (too_many(names.len()), names.first()) {
        mistakes.add(first.position, format!("`{name}.module_name_configs` {problem}"));
        names.clear();
    }
    for entry in names {
        let settings = settings(&format!("{name}.module_name_configs.{}", entry.key), entry.value, mistakes);
        match pattern(entry.key) {
            Ok(value) => module_name_configs.push((Written { value, place: mistakes.place(entry.position) }, settings)),
            Err(why) => mistakes.add(entry.position, why),
        }
    }
    Rules { global_config, module_type_configs, module_name_configs }
}

/// Writes the three keys of a section.
pub(super) fn write<S: Settings>(rules: &Rules<S>, yaml: &mut Yaml) {
    let Rules { global_config, module_type_configs, module_name_configs } = rules;
    let write = |yaml: &mut Yaml, key: &str, settings: &Option<S>| match settings {
        Some(settings) => yaml.block(key, |yaml| settings.write(yaml)),
        None => yaml.entry(key, "null"),
    };
    write(yaml, "global_config", global_config);
    if module_type_configs.is_empty() {
        yaml.entry("module_type_configs", "{}");
    } else {
        yaml.block("module_type_configs", |yaml| {
            module_type_configs.iter().for_each(|(module_type, settings)| write(yaml, module_type.name(), settings));
        });
    }
    if module_name_configs.is_empty() {
        yaml.entry("module_name_configs", "{}");
    } else {
        yaml.block("module_name_configs", |yaml| {
            module_name_configs.iter().for_each(|(pattern, settings)| {
                write(yaml, &emit::text(&pattern.value.to_string()), settings);
            });
        });
    }
}

/// A rule's settings; `null` is a rule to leave layers alone.
fn settings<S: Settings>(name: &str, node: &Node, mistakes: &mut Mistakes<'_>) -> Option<S> {
    if let Value::Null = node.value {
        return None;
    }
    let mut fields = Fields::new(name, node, mistakes);
    let settings = S::read(&mut fields, mistakes);
    fields.finish(mistakes);
    Some(settings)
}

/// The most patterns of a section. SDXL has 794 layers.
const PATTERNS: usize = 4096;

/// What is wrong with so many patterns.
pub(super) fn too_many(patterns: usize) -> Option<String> {
    (patterns > PATTERNS).then(|| format!("has {patterns} patterns; at most {PATTERNS}"))
}

/// A pattern, or what is wrong with it in one line.
pub(super) fn pattern(written: &str) -> Result<NamePattern, String> {
    NamePattern::parse(written).map_err(|why| {
        let why = match why {
            Error::Argument(why) => why,
            other => other.to_string(),
        };
        // The regex crate points at the place over several lines; the last one says what is wrong.
        let last = why.lines().last().unwrap_or_default();
        let reason = last.trim().trim_start_matches("error: ").rsplit("regular expression: ").next().unwrap_or_default();
        format!("`{}` is not a regular expression: {reason}", shorten(written))
    })
}
