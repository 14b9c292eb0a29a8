//! The types of which the declaration of a config key consists.

use serde_json::Value as Json;

use super::tree::{Node, Position, Value};

/// A config key. Reading, flags, the tables of `docs/config.md` and the JSON schema all follow from
/// this declaration. See [`keys`](super::keys) for the list.
#[derive(Debug)]
pub(super) struct Key<T: 'static> {
    pub name: &'static str,
    pub kind: Kind<T>,
    pub default: Preset,
    /// Sentences in Markdown. The first one is the flag's help too.
    pub doc: &'static str,
    pub flag: Option<Flag>,
    /// A name that the key had once. It is still accepted, with a warning.
    pub formerly: Option<&'static str>,
}

/// The values that a key takes.
#[derive(Debug)]
pub(super) struct Kind<T: 'static> {
    /// Reads a value. A refusal continues the key's name: "must be …".
    pub read: fn(&Node) -> Result<T, String>,
    /// The values in words, for the docs.
    pub values: fn() -> String,
    /// The values as a JSON schema.
    pub schema: fn() -> Json,
    /// How a flag's argument becomes a value.
    pub argument: Argument,
}

/// How a flag's argument becomes a value.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// As text, whatever it looks like.
    Text,
    /// As a number; as text where it is none, which reading then refuses.
    Number,
    /// As true or false. Without an argument the flag is true.
    Switch,
    /// As an item of a list. The flag can be repeated: together its arguments are the list.
    Item,
}

/// The value of a key that a config does not give.
#[derive(Debug)]
pub(super) enum Preset {
    /// None. The text says what happens then, in Markdown.
    Absent(&'static str),
    Boolean(bool),
    Integer(i128),
    Number(f64),
    Text(&'static str),
    Texts(&'static [&'static str]),
    /// A default that another module declares.
    Of(fn() -> Value),
}

/// A flag of the command line that edits a key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flag {
    /// Without the dashes.
    pub name: &'static str,
    /// The name of the argument in the help text.
    pub argument: &'static str,
    pub reach: Reach,
    /// Keys beside it that the flag removes, and whose flags exclude this one.
    pub replaces: &'static [&'static str],
    /// Keys beside it that return to their defaults where the flag changes the value in effect.
    pub resets: &'static [&'static str],
    /// A key beside it that the flag gives this value.
    pub implies: Option<(&'static str, &'static str)>,
}

/// Which part of a config a flag edits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reach {
    /// The key's section, which is added where there is none.
    Section,
    /// The key's section, which must be there.
    PresentSection,
    /// Every rule of the section that is not `null`. A section is added where there is none.
    Rules,
}

impl Flag {
    pub(super) const fn new(name: &'static str, argument: &'static str) -> Self {
        Flag { name, argument, reach: Reach::Section, replaces: &[], resets: &[], implies: None }
    }

    pub(super) const fn of_rules(name: &'static str, argument: &'static str) -> Self {
        Flag { reach: Reach::Rules, ..Flag::new(name, argument) }
    }

    pub(super) const fn replaces(self, keys: &'static [&'static str]) -> Self {
        Flag { replaces: keys, ..self }
    }

    pub(super) const fn resets(self, keys: &'static [&'static str]) -> Self {
        Flag { resets: keys, ..self }
    }
}

/// A section of a config.
#[derive(Debug)]
pub(super) struct Section {
    pub name: &'static str,
    pub doc: &'static str,
    pub keys: &'static [&'static dyn Declared],
    /// The settings that its rules give to layers, if it has rules.
    pub settings: Option<&'static Section>,
    /// The sections in it.
    pub sections: &'static [&'static Section],
}

impl Section {
    /// Every key that it may have, nested sections included.
    pub(super) fn known(&self) -> impl Iterator<Item = &'static str> {
        let rules = self.settings.iter().flat_map(|_| RULES).map(|(name, _)| name);
        let sections = self.sections.iter().map(|section| section.name);
        self.keys.iter().map(|key| key.name()).chain(rules).chain(sections)
    }

    /// Whether `name` is a key that was renamed.
    pub(super) fn was_known(&self, name: &str) -> bool {
        self.keys.iter().any(|key| key.formerly() == Some(name))
    }
}

/// The three keys by which a section's settings reach layers, in the order of coremltools'
/// `OptimizationConfig`.
pub(super) const RULES: [(&str, &str); 3] = [
    (
        "global_config",
        "The settings of every layer that no other rule names. The default settings where no rule is given; `null` where only others are.",
    ),
    ("module_type_configs", "Settings by type of layer, `Conv2d` or `Linear`. They go before `global_config`."),
    (
        "module_name_configs",
        "Settings by regular expressions for whole layer names. They go before the other two, and the first one that matches decides.",
    ),
];

/// A key of whatever type, for docs, schema and flags.
pub(super) trait Declared: std::fmt::Debug + Sync {
    fn name(&self) -> &'static str;
    fn doc(&self) -> &'static str;
    fn default(&self) -> &Preset;
    fn values(&self) -> String;
    fn schema(&self) -> Json;
    fn flag(&self) -> Option<&Flag>;
    fn formerly(&self) -> Option<&'static str>;
    /// The value that a flag's argument stands for; an item of the value if that is a list.
    fn argument(&self, text: &str) -> Value;
    /// Whether each argument of the flag is an item of a list.
    fn is_list(&self) -> bool;
    /// Whether the flag needs no argument.
    fn is_switch(&self) -> bool;
}

impl<T: std::fmt::Debug> Declared for Key<T> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn doc(&self) -> &'static str {
        self.doc.trim()
    }

    fn default(&self) -> &Preset {
        &self.default
    }

    fn values(&self) -> String {
        (self.kind.values)()
    }

    fn schema(&self) -> Json {
        (self.kind.schema)()
    }

    fn flag(&self) -> Option<&Flag> {
        self.flag.as_ref()
    }

    fn formerly(&self) -> Option<&'static str> {
        self.formerly
    }

    fn argument(&self, text: &str) -> Value {
        match self.kind.argument {
            Argument::Text | Argument::Item => Value::Text(text.to_owned()),
            Argument::Switch => text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Boolean),
            Argument::Number => match (text.parse(), text.parse()) {
                (Ok(integer), _) => Value::Integer(integer),
                (Err(_), Ok(number)) => Value::Number(number),
                (Err(_), Err(_)) => Value::Text(text.to_owned()),
            },
        }
    }

    fn is_list(&self) -> bool {
        match self.kind.argument {
            Argument::Item => true,
            Argument::Text | Argument::Number | Argument::Switch => false,
        }
    }

    fn is_switch(&self) -> bool {
        match self.kind.argument {
            Argument::Switch => true,
            Argument::Text | Argument::Number | Argument::Item => false,
        }
    }
}

impl<T> Key<T> {
    /// The value where a config does not give one.
    pub(super) fn default_value(&self) -> T {
        let value = self.default.value().expect("keys without a default are read as options");
        let node = Node { value, position: Position::START };
        (self.kind.read)(&node).expect("a test reads the default of every key")
    }
}

impl Preset {
    /// The default as a config would give it; nothing where there is none.
    pub(super) fn value(&self) -> Option<Value> {
        let text = |text: &&str| Value::Text((*text).to_owned());
        let node = |value| Node { value, position: Position::START };
        match self {
            Preset::Absent(_) => None,
            Preset::Boolean(value) => Some(Value::Boolean(*value)),
            Preset::Integer(value) => Some(Value::Integer(*value)),
            Preset::Number(value) => Some(Value::Number(*value)),
            Preset::Text(value) => Some(text(value)),
            Preset::Texts(values) => Some(Value::List(values.iter().map(text).map(node).collect())),
            Preset::Of(value) => Some(value()),
        }
    }
}
