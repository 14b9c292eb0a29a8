//! Mistakes in a config, with their places.

use std::path::Path;

use serde::{Serialize, Serializer};
use squeeze_base::error::{Error, Mistake, Place, Result};
use squeeze_base::pattern::NamePattern;

use super::finding::Finding;
use super::tree::Position;

/// A value and the place where it was written. Two are equal if their values are, wherever they
/// were written.
#[derive(Debug, Clone)]
pub struct Written<T> {
    /// The value.
    pub value: T,
    /// Where it was written.
    pub place: Place,
}

impl Written<NamePattern> {
    /// A pattern that comes from no file or flag.
    ///
    /// # Errors
    /// As [`NamePattern::parse`].
    pub fn own(pattern: &str) -> Result<Self> {
        Ok(Written { value: NamePattern::parse(pattern)?, place: Place::Default })
    }
}

impl Serialize for Written<NamePattern> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.value)
    }
}

impl<T: PartialEq> PartialEq for Written<T> {
    fn eq(&self, other: &Self) -> bool {
        let Written { value, place: _ } = self;
        *value == other.value
    }
}

/// The known name that `name` was most probably meant to be.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // The similarity of a word with a typing error, without its underscore or with another ending
    // is above this bound; that of unrelated words of this vocabulary is below it.
    const ALIKE: f64 = 0.8;
    let scored = known.into_iter().map(|known| (strsim::jaro_winkler(&name.to_lowercase(), &known.to_lowercase()), known));
    scored.filter(|(score, _)| *score >= ALIKE).max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, known)| known)
}

/// Collects the mistakes of one config, and the remarks on how it is written.
#[derive(Debug)]
pub(super) struct Mistakes<'a> {
    path: &'a Path,
    /// The flags that edit the config, as messages show them: `--n-bits 5`.
    flags: Vec<String>,
    problems: Vec<(Position, String)>,
    remarks: Vec<Finding>,
}

impl<'a> Mistakes<'a> {
    pub(super) fn new(path: &'a Path, flags: Vec<String>) -> Self {
        Mistakes { path, flags, problems: Vec::new(), remarks: Vec::new() }
    }

    pub(super) fn place(&self, position: Position) -> Place {
        match position {
            Position::File { line, column } => Place::File { path: self.path.to_owned(), line, column },
            Position::Flag(index) => Place::Flag(self.flags[index].clone()),
        }
    }

    pub(super) fn add(&mut self, position: Position, problem: impl Into<String>) {
        let problem = (position, problem.into());
        // A flag that edits several rules makes the same mistake in each.
        if matches!(position, Position::File { .. }) || !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Notes something that is accepted but that people should know.
    pub(super) fn remark(&mut self, finding: Finding) {
        self.remarks.push(finding);
    }

    /// The remarks, if there is no mistake.
    ///
    /// # Errors
    /// [`Error::Config`] with all mistakes: those of the file in its order, then those of the
    /// flags.
    pub(super) fn into_remarks(mut self) -> Result<Vec<Finding>> {
        if self.problems.is_empty() {
            return Ok(self.remarks);
        }
        self.problems.sort_by_key(|(position, _)| *position);
        let problems = std::mem::take(&mut self.problems);
        let mistakes = problems.into_iter().map(|(position, problem)| Mistake { place: self.place(position), problem });
        Err(Error::Config { mistakes: mistakes.collect() })
    }
}
