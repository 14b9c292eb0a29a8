//! Flags of the command line, which edit a config's tree before it is read. A flag's value
//! therefore obeys the rules of the file, and a mistake in it is reported as one in the file.

use std::ffi::{OsStr, OsString};

use serde_json::Value as Json;
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;

use super::finding::Finding;
use super::key::{Declared, Flag, RULES, Reach, Section};
use super::keys::root;
use super::mistake::Mistakes;
use super::run_config::RunConfig;
use super::tree::{Node, Position, Value};

/// A flag that edits a key of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFlag {
    /// Its name without the dashes.
    pub name: &'static str,
    /// The name of its argument in help.
    pub argument: &'static str,
    /// Its help in one line.
    pub help: String,
    /// Whether it is a former name, which is accepted with a warning and not shown in help.
    pub former: bool,
    /// Whether it can be given several times: its arguments are the items of a list.
    pub repeated: bool,
    /// Whether it needs no argument: alone it stands for `true`.
    pub switch: bool,
}

/// A flag with its argument: an edit of a config.
#[derive(Debug, Clone)]
pub struct Edit {
    target: Target,
    /// The flag's name as given, which may be a former one.
    name: &'static str,
    argument: OsString,
}

/// A key that has a flag.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// The section that the key or the rule with the key is in; `None` at the top of the config.
    section: Option<&'static Section>,
    key: &'static dyn Declared,
    flag: &'static Flag,
}

/// Every flag that edits a config, in the order of help.
pub fn flags() -> impl Iterator<Item = ConfigFlag> {
    targets().into_iter().flat_map(|Target { key, flag, .. }| {
        let (argument, repeated, switch) = (flag.argument, key.is_list(), key.is_switch());
        let named = |name, former| ConfigFlag { name, argument, help: help(key), former, repeated, switch };
        [Some(named(flag.name, false)), former_flag(key).map(|name| named(name, true))].into_iter().flatten()
    })
}

/// The first sentence of the key's docs, and the values where there are few.
fn help(key: &dyn Declared) -> String {
    let doc = key.doc();
    let sentence = doc.split_once(". ").map_or(doc.trim_end_matches('.'), |(first, _)| first);
    match key.schema()["enum"].is_array() {
        true => format!("{sentence} ({})", key.values().replace('`', "")),
        false => sentence.to_owned(),
    }
}

fn targets() -> Vec<Target> {
    let mut targets = Vec::new();
    let mut add = |section: Option<&'static Section>, keys: &'static Section| {
        for key in keys.keys {
            // Settings that several sections share have flags for the first of these sections.
            let flag = key.flag().filter(|flag| !targets.iter().any(|other: &Target| other.flag.name == flag.name));
            targets.extend(flag.map(|flag| Target { section, key: *key, flag }));
        }
    };
    for section in root::SECTION.sections.iter().copied() {
        section.settings.iter().for_each(|settings| add(Some(section), settings));
        add(Some(section), section);
    }
    add(None, &root::SECTION);
    targets
}

/// The flag that a renamed key had; its name was the key's.
fn former_flag(key: &'static dyn Declared) -> Option<&'static str> {
    key.formerly()
}

impl Edit {
    /// The edit that `--name argument` makes.
    ///
    /// # Errors
    /// [`Error::Argument`] if no such flag edits a config.
    pub fn new(name: &str, argument: impl Into<OsString>) -> Result<Self> {
        let named = targets().into_iter().find_map(|target| {
            let names = [Some(target.flag.name), former_flag(target.key)];
            names.into_iter().flatten().find(|known| *known == name).map(|name| (target, name))
        });
        let (target, name) = named.ok_or_else(|| Error::Argument(format!("no flag --{} edits a config", shorten(name))))?;
        Ok(Edit { target, name, argument: argument.into() })
    }

    /// The name of its flag, without the dashes.
    #[must_use]
    pub fn flag(&self) -> &'static str {
        self.target.flag.name
    }

    /// The edit as messages show it: `--n-bits 5`.
    pub(super) fn shown(&self) -> String {
        let argument = match self.argument.to_string_lossy() {
            text if text.trim().is_empty() => "''".to_owned(),
            text => shorten(&text),
        };
        format!("--{} {argument}", self.name)
    }

    fn is_in(&self, section: Option<&Section>) -> bool {
        self.target.section.map(|section| section.name) == section.map(|section| section.name)
    }

    /// Whether the flags exclude each other, either because both edit one key, or because one
    /// replaces the key of the other.
    fn excludes(&self, other: &Edit) -> bool {
        let (one, two) = (self.target, other.target);
        let same_key = one.key.name() == two.key.name() && !one.key.is_list();
        other.is_in(one.section) && (same_key || one.flag.replaces.contains(&two.key.name()))
    }
}

/// Applies edits to the tree of a config. Settings of layers go into `global_config` and into every
/// rule for a type or a name that is not `null`: a layer that the config leaves alone stays alone.
pub(super) fn apply(root: &mut Node, edits: &[Edit], mistakes: &mut Mistakes<'_>) {
    let in_effect = in_effect(root, edits);
    for (index, edit) in edits.iter().enumerate() {
        let position = Position::Flag(index);
        let excluded = edits
            .iter()
            .enumerate()
            .find(|(other, second)| *other != index && edit.excludes(second) && (*other > index || !second.excludes(edit)));
        if let Some((_, other)) = excluded {
            mistakes.add(position, format!("--{} and --{} exclude each other; give one", edit.name, other.name));
            continue;
        }
        let Some(argument) = OsStr::to_str(&edit.argument) else {
            mistakes.add(position, "is not UTF-8, and could not be written into the config as resolved");
            continue;
        };
        let Target { section, key, flag } = edit.target;
        if edit.name != flag.name {
            let (old, new) = (format!("--{}", edit.name), format!("--{}", flag.name));
            mistakes.remark(Finding::FormerName { old, new, place: mistakes.place(position) });
        }
        if in_effect[key.name()].as_str() != Some(argument) {
            let has_flag = |name: &str| edits.iter().any(|edit| edit.is_in(section) && edit.target.key.name() == name);
            reset(root, section, flag.resets.iter().copied().filter(|name| !has_flag(name)));
        }
        let value = match key.is_list() {
            false => key.argument(argument),
            true => Value::List(items(edits, index, position)),
        };
        if let Err(problem) = apply_one(root, edit.target, Node { value, position }) {
            mistakes.add(position, problem);
        }
    }
}

/// The list that the flag of edit `last` and its earlier repetitions make.
fn items(edits: &[Edit], last: usize, position: Position) -> Vec<Node> {
    let same = |edit: &&Edit| edit.name == edits[last].name;
    let texts = edits[..=last].iter().filter(same).map(|edit| edit.argument.to_string_lossy());
    texts.map(|text| Node { value: edits[last].target.key.argument(&text), position }).collect()
}

/// The keys at the top of the config as the file alone has them, defaults included. Nothing where
/// no flag asks for them.
fn in_effect(root: &Node, edits: &[Edit]) -> Json {
    if edits.iter().all(|edit| edit.target.flag.resets.is_empty()) {
        return Json::Null;
    }
    // Mistakes of the file are reported when the edited tree is read.
    RunConfig::from_tree(root, &mut Mistakes::new("".as_ref(), Vec::new())).to_json()
}

/// Removes keys, under their former names too, so that they return to their defaults.
fn reset(root: &mut Node, section: Option<&'static Section>, names: impl Iterator<Item = &'static str>) {
    let keys = section.unwrap_or(&root::SECTION).keys;
    let mapping = match section {
        None => Some(root),
        Some(section) => root.child_mut(section.name),
    };
    let Some(mapping) = mapping else { return };
    for name in names {
        mapping.remove(name);
        keys.iter().filter(|key| key.name() == name).filter_map(|key| key.formerly()).for_each(|old| mapping.remove(old));
    }
}

fn apply_one(root: &mut Node, target: Target, value: Node) -> Result<(), String> {
    let Target { section, flag, .. } = target;
    let position = value.position;
    let mapping = match (section, flag.reach) {
        (None, _) => Some(root),
        (Some(section), Reach::PresentSection) => {
            let present = root.child_mut(section.name);
            Some(present.ok_or_else(|| format!("has no `{}` section to change", section.name))?)
        }
        (Some(section), Reach::Section | Reach::Rules) => root.child_or_empty(section.name, position),
    };
    // A config or a section that is no mapping is a mistake that reading reports.
    let Some(mapping) = mapping else { return Ok(()) };
    match flag.reach {
        Reach::Section | Reach::PresentSection => set(mapping, target, &value),
        Reach::Rules => {
            let rules = rules_mut(mapping, position);
            if rules.is_empty() {
                let section = section.expect("rules are in sections").name;
                return Err(format!("changes nothing: every rule of `{section}` is null"));
            }
            rules.into_iter().for_each(|rule| set(rule, target, &value));
        }
    }
    Ok(())
}

fn set(mapping: &mut Node, target: Target, value: &Node) {
    let Target { key, flag, .. } = target;
    flag.replaces.iter().copied().chain(key.formerly()).for_each(|name| mapping.remove(name));
    if let Some((name, word)) = flag.implies {
        mapping.set(name, Node { value: Value::Text(word.to_owned()), position: value.position });
    }
    mapping.set(key.name(), value.clone());
}

/// The rules of a section that are not `null`. `global_config` is added where there is no rule at
/// all.
fn rules_mut(section: &mut Node, position: Position) -> Vec<&mut Node> {
    let [global, types, names] = RULES.map(|(name, _)| name);
    if section.entry_mut(global).is_none() && section.child_mut(types).is_none() && section.child_mut(names).is_none() {
        section.set(global, Node::empty_mapping(position));
    }
    let mut rules = Vec::new();
    for (key, value) in section.entries_mut() {
        match &key.value {
            Value::Text(name) if name == global => rules.push(value),
            Value::Text(name) if name == types || name == names => rules.extend(value.entries_mut().map(|(_, rule)| rule)),
            Value::Null
            | Value::Boolean(_)
            | Value::Integer(_)
            | Value::Number(_)
            | Value::Text(_)
            | Value::List(_)
            | Value::Mapping(_) => {}
        }
    }
    rules.retain(|rule| !matches!(rule.value, Value::Null));
    rules
}
