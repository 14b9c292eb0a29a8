//! Which settings hold for which layer, by coremltools' order of rules.

use serde::{Serialize, Serializer};
use squeeze_base::pattern::NamePattern;
use squeeze_base::shorten::shorten;
use squeeze_codebook::LayerKind;

use super::fields::{Fields, entries};
use super::layer_info::LayerInfo;
use super::mistake::{Mistakes, Written, nearest};
use super::settings::Settings;
use super::tree::{Node, Value};

/// The rules of a section, as coremltools' `OptimizationConfig.get_module_config` applies them: the
/// first pattern of `module_name_configs` that matches the whole of a layer's name, else the
/// layer's type in `module_type_configs`, else `global_config`. A rule without settings (`null` in
/// the file) leaves its layers alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules<S> {
    /// For every layer that no other rule names.
    pub global_config: Option<S>,
    /// By type; at most one rule for each type.
    pub module_type_configs: Vec<(LayerKind, Option<S>)>,
    /// By name, in the order of the file.
    pub module_name_configs: Vec<(Written<NamePattern>, Option<S>)>,
}

/// The position of a rule in [`Rules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleIndex {
    /// This one of `module_name_configs`.
    Name(usize),
    /// `module_type_configs` for this type.
    Type(LayerKind),
    /// `global_config`.
    Global,
}

/// Rules applied to a model's layers.
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

    /// Finds the rule that decides for each of a model's layers: the first pattern that matches its
    /// name, else the rule of its type, else `global_config`. Every pattern is compared with every
    /// name once, since there may be thousands of both.
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
        // The first pattern that matches decides, so the patterns overwrite each other from the
        // last on.
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
            RuleIndex::Name(index) => self.module_name_configs[index].1.as_ref(),
            RuleIndex::Type(module_type) => {
                let mut rules = self.module_type_configs.iter();
                let rule = rules.find(|(listed, _)| *listed == module_type);
                rule.expect("a type decides only where it has a rule").1.as_ref()
            }
            RuleIndex::Global => self.global_config.as_ref(),
        }
    }

    /// Every rule that is not `null`.
    pub(super) fn all_settings(&self) -> impl Iterator<Item = &S> {
        let Rules { global_config, module_type_configs, module_name_configs } = self;
        let types = module_type_configs.iter().filter_map(|(_, settings)| settings.as_ref());
        let names = module_name_configs.iter().filter_map(|(_, settings)| settings.as_ref());
        global_config.iter().chain(types).chain(names)
    }

    /// Every rule that is not `null`, to be changed.
    pub fn settings_mut(&mut self) -> impl Iterator<Item = &mut S> {
        let Rules { global_config, module_type_configs, module_name_configs } = self;
        let types = module_type_configs.iter_mut().filter_map(|(_, settings)| settings.as_mut());
        let names = module_name_configs.iter_mut().filter_map(|(_, settings)| settings.as_mut());
        global_config.iter_mut().chain(types).chain(names)
    }
}

/// Reads the three keys of a section. Without any of them, `global_config` has its defaults. With
/// rules for types or names only, the other layers are left alone, as in coremltools.
pub(super) fn read<S: Settings>(section: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Rules<S> {
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
    let types = types.map_or(Vec::new(), |node| entries(&format!("{name}.module_type_configs"), node, mistakes));
    for entry in types {
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
    let mut names = names.map_or(Vec::new(), |node| entries(&format!("{name}.module_name_configs"), node, mistakes));
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

/// Writes the three keys of a section's rules.
pub(super) fn write<T: Settings, S: Serializer>(rules: &Rules<T>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys<'a, T: Settings> {
        #[serde(serialize_with = "write_settings")]
        global_config: &'a Option<T>,
        #[serde(serialize_with = "as_mapping")]
        module_type_configs: &'a [(LayerKind, Option<T>)],
        #[serde(serialize_with = "as_mapping")]
        module_name_configs: &'a [(Written<NamePattern>, Option<T>)],
    }
    let Rules { global_config, module_type_configs, module_name_configs } = rules;
    Keys { global_config, module_type_configs, module_name_configs }.serialize(serializer)
}

fn write_settings<T: Settings, S: Serializer>(settings: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    settings.as_ref().map(Settings::written).serialize(serializer)
}

fn as_mapping<K: Serialize, T: Settings, S: Serializer>(rules: &[(K, Option<T>)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(rules.iter().map(|(key, settings)| (key, settings.as_ref().map(Settings::written))))
}

/// A rule's settings; `null` is a rule to leave layers alone.
fn settings<S: Settings>(name: &str, node: &Node, mistakes: &mut Mistakes<'_>) -> Option<S> {
    if let Value::Null = node.value {
        return None;
    }
    let fields = Fields::new(name, S::SECTION, node, mistakes);
    Some(S::read(&fields, mistakes))
}

/// The most patterns of a section. SDXL has 794 layers.
const PATTERNS: usize = 4096;

/// The complaint about a number of patterns that is too large.
pub(super) fn too_many(patterns: usize) -> Option<String> {
    (patterns > PATTERNS).then(|| format!("has {patterns} patterns; at most {PATTERNS}"))
}

/// Compiles a pattern, or says in one line why it cannot be.
pub(super) fn pattern(written: &str) -> Result<NamePattern, String> {
    NamePattern::parse(written).map_err(|why| {
        let why = why.to_string();
        // The regex crate points at the place in several lines, of which the last one has the
        // reason.
        let last = why.lines().last().unwrap_or(&why).trim().trim_start_matches("error: ");
        let reason = last.rsplit_once("regular expression: ").map_or(last, |(_, reason)| reason);
        format!("`{}` is not a regular expression: {reason}", shorten(written))
    })
}
