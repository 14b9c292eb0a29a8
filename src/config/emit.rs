//! Writes the YAML of a config.

use std::fmt::Write as _;

/// Lines of block mappings and lists.
#[derive(Debug, Default)]
pub(super) struct Yaml {
    text: String,
    depth: usize,
}

impl Yaml {
    pub fn into_text(self) -> String {
        self.text
    }

    /// A line of its own.
    pub fn line(&mut self, line: &str) {
        let indent = "  ".repeat(self.depth);
        self.text.extend([&indent, line, "\n"]);
    }

    /// `key: value`; `value` is YAML already.
    pub fn entry(&mut self, key: &str, value: impl AsRef<str>) {
        self.line(&format!("{key}: {}", value.as_ref()));
    }

    /// `key:` with what `content` writes beneath it, which must be something.
    pub fn block(&mut self, key: &str, content: impl FnOnce(&mut Yaml)) {
        self.line(&format!("{key}:"));
        self.depth += 1;
        content(self);
        self.depth -= 1;
    }

    /// `key:` with a list of values, which are YAML already.
    pub fn list(&mut self, key: &str, values: impl IntoIterator<Item = String>) {
        self.block(key, |yaml| values.into_iter().for_each(|value| yaml.line(&format!("- {value}"))));
    }
}

/// A number that reads as the same one.
pub(super) fn number(value: f64) -> String {
    format!("{value:?}")
}

/// `null`, or the value.
pub(super) fn or_null<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "null".to_owned(), show)
}

/// Quoted text: single quotes keep backslashes as they are, which regexes like; double quotes where something must be escaped.
pub(super) fn text(value: &str) -> String {
    if value.chars().all(|c| matches!(c, ' '..='~')) {
        return format!("'{}'", value.replace('\'', "''"));
    }
    let mut quoted = String::from("\"");
    for c in value.chars() {
        // Writing to a String cannot fail.
        let _ = match c {
            '"' | '\\' => write!(quoted, "\\{c}"),
            ' '..='~' | '\u{a1}'..='\u{d7ff}' | '\u{f900}'..='\u{fdcf}' if !is_invisible(c) => write!(quoted, "{c}"),
            _ => write!(quoted, "\\U{:08X}", u32::from(c)),
        };
    }
    quoted.push('"');
    quoted
}

/// Line separators, marks of direction and the like, which an editor would not show.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{2000}'..='\u{200f}' | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}')
}
