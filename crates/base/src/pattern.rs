//! Regular expressions over names of stages and layers.

use std::fmt::{self, Display};

use regex::{Regex, RegexBuilder};

use crate::error::{Error, Result};
use crate::shorten::shorten;

/// A pattern that matches whole names, as Python's `re.fullmatch` does and coremltools expects.
#[derive(Debug, Clone)]
pub struct NamePattern {
    written: String,
    whole: Whole,
}

/// The compiled form of a pattern.
#[derive(Debug, Clone)]
enum Whole {
    /// One name, as most patterns of a config with a rule for each layer are. Thousands of them
    /// take no time.
    Name(String),
    Pattern(Regex),
}

/// The most bytes of a pattern.
const PATTERN_BYTES: usize = 4096;
/// The most bytes that a pattern may compile to. `\d+` and the like take a few KiB, names and
/// choices of names less.
const COMPILED_BYTES: usize = 1 << 20;

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the mistake, or if it has more than 4,096 bytes or compiles to
    /// more than 1 MiB.
    pub fn parse(written: &str) -> Result<Self> {
        if written.len() > PATTERN_BYTES {
            let (shown, bytes) = (shorten(written), written.len());
            return Err(Error::Argument(format!("`{shown}` has {bytes} bytes; at most {PATTERN_BYTES}")));
        }
        let whole = match name(written) {
            Some(name) => Whole::Name(name),
            None => {
                let bad =
                    |why: &dyn Display| Error::Argument(format!("`{}` is not a regular expression: {why}", shorten(written)));
                // Parsed without the added brackets first, so that messages do not show them.
                regex_syntax::Parser::new().parse(written).map_err(|why| match why {
                    regex_syntax::Error::Parse(why) => bad(why.kind()),
                    regex_syntax::Error::Translate(why) => bad(why.kind()),
                    why => bad(&why),
                })?;
                let mut builder = RegexBuilder::new(&format!("^(?:{written})$"));
                Whole::Pattern(builder.size_limit(COMPILED_BYTES).build().map_err(|why| bad(&why))?)
            }
        };
        Ok(NamePattern { written: written.to_owned(), whole })
    }

    /// Whether it matches the whole of `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.whole {
            Whole::Name(only) => only == name,
            Whole::Pattern(pattern) => pattern.is_match(name),
        }
    }
}

/// The only name that a pattern matches, if it consists of letters, digits, `_`, `-` and dots with
/// a backslash before them.
fn name(pattern: &str) -> Option<String> {
    let mut name = String::new();
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' if characters.next() == Some('.') => name.push('.'),
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' => name.push(character),
            _ => return None,
        }
    }
    Some(name)
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        // The compiled form follows from the text.
        let NamePattern { written, whole: _ } = self;
        *written == other.written
    }
}

impl Eq for NamePattern {}

impl Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_names_only() {
        let matches = |pattern: &str, name: &str| NamePattern::parse(pattern).unwrap().matches(name);
        assert!(matches(r"down_blocks\.\d+", "down_blocks.0"));
        assert!(!matches("down_blocks", "down_blocks.0"));
        assert!(matches("mid|mid_block", "mid_block"));
        assert!(!matches("mid_block|up", "up_blocks.0"));
        assert!(NamePattern::parse("up_blocks(").unwrap_err().to_string().contains("up_blocks("));
        // A pattern only inside brackets is none.
        assert!(NamePattern::parse("a)|(b").is_err());
    }

    #[test]
    fn plain_names_are_compared_and_not_compiled() {
        let pattern = NamePattern::parse(r"down_blocks\.0\.to_q").unwrap();
        assert!(matches!(pattern.whole, Whole::Name(_)));
        assert!(pattern.matches("down_blocks.0.to_q") && !pattern.matches("down_blocks.0xto_q") && !pattern.matches("to_q"));
        let pattern = NamePattern::parse("down_blocks.0").unwrap();
        assert!(matches!(pattern.whole, Whole::Pattern(_)) && pattern.matches("down_blocksx0"));
        assert!(NamePattern::parse("").unwrap().matches(""));
    }

    #[test]
    fn patterns_that_take_much_memory_are_refused() {
        for written in [r"\w{1000}".to_owned(), "a".repeat(5000), "((a{100}){100}){100}".to_owned(), "(".repeat(4000)] {
            let why = NamePattern::parse(&written).unwrap_err().to_string();
            assert!(why.len() < 200, "{why}");
        }
    }
}
