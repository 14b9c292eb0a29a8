//! A YAML document as a tree in which every node knows where it was written.
//!
//! serde stops at the first mistake. A config is therefore parsed into this tree first, edited by
//! the command line's flags, and only then read key by key, so that all mistakes are reported at
//! once.

use std::fmt::{self, Display};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::{DuplicateKeyPolicy, MergeKeyPolicy, Spanned, options::NonFiniteFloatPolicy};
use squeeze_base::input::Limit;
use squeeze_base::shorten::shorten;

/// The most bytes of a config.
const MAX_BYTES: usize = Limit::RUN_CONFIG.bytes as usize;

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Value,
    pub position: Position,
}

/// Where a node was written. Positions in the file come before flags, and each kind is in its
/// order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Position {
    /// Line and column, both from 1, the column in characters.
    File { line: u64, column: u64 },
    /// The index of the flag among those given.
    Flag(usize),
}

impl Position {
    pub(super) const START: Position = Position::File { line: 1, column: 1 };

    fn of(location: serde_yaml::Location) -> Self {
        // An unknown location is 0:0.
        Position::File { line: location.line().max(1), column: location.column().max(1) }
    }
}

impl Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Position::File { line, .. } => write!(f, "line {line}"),
            Position::Flag(_) => f.write_str("a flag"),
        }
    }
}

impl Node {
    /// A mapping without keys.
    pub(super) fn empty_mapping(position: Position) -> Self {
        Node { value: Value::Mapping(Vec::new()), position }
    }

    fn pairs_mut(&mut self) -> &mut [(Node, Node)] {
        match &mut self.value {
            Value::Mapping(pairs) => pairs,
            Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Text(_) | Value::List(_) => &mut [],
        }
    }

    /// Keys and values of a mapping; nothing where the node is not one.
    pub(super) fn entries_mut(&mut self) -> impl Iterator<Item = (&Node, &mut Node)> {
        self.pairs_mut().iter_mut().map(|(key, value)| (&*key, value))
    }

    /// The value of `key`, `null` or not, if the node is a mapping that has it.
    pub(super) fn entry_mut(&mut self, key: &str) -> Option<&mut Node> {
        self.entries_mut().find(|(name, _)| name.is_text(key)).map(|(_, value)| value)
    }

    /// The value of `key`, unless that is absent or `null`.
    pub(super) fn child_mut(&mut self, key: &str) -> Option<&mut Node> {
        self.entry_mut(key).filter(|value| !matches!(value.value, Value::Null))
    }

    /// The value of `key`, which becomes an empty mapping where it is absent or `null`. `None` if
    /// the node is not a mapping.
    pub(super) fn child_or_empty(&mut self, key: &str, position: Position) -> Option<&mut Node> {
        if self.child_mut(key).is_none() {
            self.set(key, Node::empty_mapping(position));
        }
        self.child_mut(key)
    }

    /// Gives `key` a value in the place of any that it has. Does nothing where the node is not a
    /// mapping, which is a mistake that is reported when the node is read.
    pub(super) fn set(&mut self, key: &str, value: Node) {
        if let Some(present) = self.entry_mut(key) {
            *present = value;
        } else if let Value::Mapping(pairs) = &mut self.value {
            pairs.push((Node { value: Value::Text(key.to_owned()), position: value.position }, value));
        }
    }

    /// Removes `key` from a mapping.
    pub(super) fn remove(&mut self, key: &str) {
        if let Value::Mapping(pairs) = &mut self.value {
            pairs.retain(|(name, _)| !name.is_text(key));
        }
    }

    fn is_text(&self, text: &str) -> bool {
        matches!(&self.value, Value::Text(written) if written == text)
    }
}

/// A YAML value by YAML 1.2's rules. Keys are nodes in the order of the file, repeated ones
/// included.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Boolean(bool),
    Integer(i128),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
}

/// The value as mistakes show it.
impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Boolean(value) => write!(f, "{value}"),
            Value::Integer(value) => write!(f, "{value}"),
            Value::Number(value) => write!(f, "{value:?}"),
            Value::Text(value) => write!(f, "`{}`", shorten(value)),
            Value::List(_) => f.write_str("a list"),
            Value::Mapping(_) => f.write_str("a mapping"),
        }
    }
}

/// Parses one document.
///
/// # Errors
/// The place and the description of the first syntax error; the parser cannot go on after it.
pub(super) fn parse(bytes: &[u8]) -> Result<Node, (Position, String)> {
    if bytes.len() > MAX_BYTES {
        return Err((Position::START, format!("{} bytes are too many for a config", bytes.len())));
    }
    let text =
        std::str::from_utf8(bytes).map_err(|why| (position_of_byte(bytes, why.valid_up_to()), "not UTF-8 text".to_owned()))?;
    let options = serde_yaml::options! {
        budget: serde_yaml::budget! { max_depth: 32, flow_nesting_limit: 32, simple_key_max_lookahead: 1 << 16, max_nodes: 100_000, max_events: 300_000 },
        alias_limits: serde_yaml::alias_limits! { max_total_replayed_events: 10_000, max_replay_stack_depth: 8 },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    serde_yaml::from_str_with_options(text, options).map_err(|why| {
        let position = why.location().map_or(Position::START, Position::of);
        (position, explain(why.without_snippet()))
    })
}

/// The parser's message without the place, which is shown in front of it, and without its advice to
/// programmers.
fn explain(why: &serde_yaml::Error) -> String {
    match why {
        // An error inside an anchored node, reported where an alias refers to it.
        serde_yaml::Error::AliasError { error, .. } => explain(error.without_snippet()),
        serde_yaml::Error::Budget { .. } => "nested too deeply, or too large, for a config".into(),
        serde_yaml::Error::AliasReplayLimitExceeded { .. } | serde_yaml::Error::AliasReplayStackDepthExceeded { .. } => {
            "aliases make it too large for a config".into()
        }
        serde_yaml::Error::MultipleDocuments { .. } => "a config is one YAML document; here a second begins".into(),
        other => {
            let message = other.to_string();
            let line = message.lines().next().unwrap_or("unreadable");
            let problem = line.split_once(" at line ").map_or(line, |(problem, _)| problem);
            format!("not valid YAML: {}", shorten(problem))
        }
    }
}

fn position_of_byte(bytes: &[u8], at: usize) -> Position {
    let before = String::from_utf8_lossy(&bytes[..at]);
    let line = before.matches('\n').count() as u64 + 1;
    let last_line = before.rsplit('\n').next().expect("a split text has at least one part");
    Position::File { line, column: last_line.chars().count() as u64 + 1 }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node { value, position: Position::of(referenced) })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element()? {
            list.push(entry);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut mapping = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            mapping.push(entry);
        }
        Ok(Value::Mapping(mapping))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: impl AsRef<[u8]>) -> (u64, u64, String) {
        let (position, why) = parse(text.as_ref()).unwrap_err();
        let (line, column) = line_and_column(position);
        (line, column, why)
    }

    fn line_and_column(position: Position) -> (u64, u64) {
        let Position::File { line, column } = position else { panic!("{position:?}") };
        (line, column)
    }

    #[test]
    fn every_value_has_its_place() {
        let node = parse("\u{feff}# é\nä: 1\nb:\n  c: [yes, 'é', 2.5]\n  c: null\n".as_bytes()).unwrap();
        let mut places = Vec::new();
        fn walk(node: &Node, places: &mut Vec<(String, u64, u64)>) {
            let (line, column) = line_and_column(node.position);
            places.push((node.value.to_string(), line, column));
            match &node.value {
                Value::List(list) => list.iter().for_each(|node| walk(node, places)),
                Value::Mapping(pairs) => {
                    pairs.iter().for_each(|(key, value)| [key, value].into_iter().for_each(|node| walk(node, places)))
                }
                _ => {}
            }
        }
        walk(&node, &mut places);
        let expected = [
            ("a mapping", 2, 1),
            ("`ä`", 2, 1),
            ("1", 2, 4),
            ("`b`", 3, 1),
            ("a mapping", 4, 3),
            ("`c`", 4, 3),
            ("a list", 4, 6),
            ("`yes`", 4, 7),
            ("`é`", 4, 12),
            ("2.5", 4, 17),
            ("`c`", 5, 3),
            ("null", 5, 6),
        ];
        assert_eq!(places, expected.map(|(value, line, column)| (value.to_owned(), line, column)));
    }

    #[test]
    fn broken_yaml_says_where() {
        assert_eq!(refused("a: 1\nb: [1\nc: 2"), (3, 2, "not valid YAML: illegal placement of ':' indicator".into()));
        assert_eq!(refused("a: 1\n---\nb: 2\n"), (3, 1, "a config is one YAML document; here a second begins".into()));
        assert_eq!(refused("a: !python/object 3"), (1, 19, "not valid YAML: unsupported tag `!python/object`".into()));
        assert_eq!(refused("a: *nope"), (1, 4, "not valid YAML: alias references unknown anchor".into()));
        assert_eq!(refused(b"a: 1\nb\xc3\xa4\xff"), (2, 3, "not UTF-8 text".into()));
        for text in ["a: &a [*a]", "<<: {a: 1}", "a: \"x", "\0", "@x", "a: b: c", "%YAML 9.9\n---\na: 1\n%"] {
            refused(text);
        }
    }

    #[test]
    fn hostile_yaml_is_refused_in_little_time_and_memory() {
        for deep in ["[".repeat(500_000), "{a: ".repeat(200_000), "- ".repeat(400_000), "? ".repeat(400_000)] {
            refused(deep);
        }
        let stairs: String = (0..1_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
        assert!(refused(stairs).2.contains("nested too deeply"));
        let laugh: String = (1..20).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "))).collect();
        assert!(refused(format!("a0: &a0 [x, x]\n{laugh}")).2.contains("aliases make it too large"));
        assert!(refused(vec![b' '; MAX_BYTES + 1]).2.contains("too many"));
        assert!(refused("a: 1\n".repeat(150_000)).2.contains("too large"));
    }
}
