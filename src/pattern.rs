//! Regular expressions over names of stages and layers.

use std::fmt::{self, Display};

use regex::Regex;

use crate::error::{Error, Result};

/// A pattern that matches whole names, as Python's `re.fullmatch` does and coremltools expects.
#[derive(Debug, Clone)]
pub struct NamePattern {
    written: String,
    whole: Regex,
}

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// [`Error::Argument`] with the place of the mistake.
    pub fn parse(written: &str) -> Result<Self> {
        // Compiled alone first, so that its mistakes are not shown inside our own brackets.
        let bad = |why: regex::Error| Error::Argument(format!("`{written}` is not a regular expression: {why}"));
        Regex::new(written).map_err(bad)?;
        let whole = Regex::new(&format!("^(?:{written})$")).map_err(bad)?;
        Ok(NamePattern { written: written.to_owned(), whole })
    }

    /// Whether it matches the whole of `name`.
    pub fn matches(&self, name: &str) -> bool {
        self.whole.is_match(name)
    }
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        // What it compiles to follows from what is written.
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
    }
}
