//! What is wrong with a config, and where.

use std::path::Path;

use super::tree::Position;
use crate::error::{Mistake, Place};

/// A value that remembers its place. Two are equal if the values are: where it was written is no part of what it says.
#[derive(Debug, Clone)]
pub struct Written<T> {
    /// The value.
    pub value: T,
    /// Where it was written.
    pub place: Place,
}

impl Written<crate::pattern::NamePattern> {
    /// A pattern that nobody wrote.
    ///
    /// # Errors
    /// As [`NamePattern::parse`](crate::pattern::NamePattern::parse).
    pub fn own(pattern: &str) -> crate::Result<Self> {
        Ok(Written { value: crate::pattern::NamePattern::parse(pattern)?, place: Place::Default })
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
    // A slip of a finger, a left-out underscore or a wrong ending is above it; unrelated words of this vocabulary are below.
    const ALIKE: f64 = 0.8;
    let scored = known.into_iter().map(|known| (strsim::jaro_winkler(&name.to_lowercase(), &known.to_lowercase()), known));
    scored.filter(|(score, _)| *score >= ALIKE).max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, known)| known)
}

/// The mistakes found so far in one file.
#[derive(Debug)]
pub(super) struct Mistakes<'a> {
    path: &'a Path,
    found: Vec<Mistake>,
}

impl<'a> Mistakes<'a> {
    pub fn new(path: &'a Path) -> Self {
        Mistakes { path, found: Vec::new() }
    }

    pub fn place(&self, Position { line, column }: Position) -> Place {
        Place::File { path: self.path.to_owned(), line, column }
    }

    pub fn add(&mut self, position: Position, problem: impl Into<String>) {
        let place = self.place(position);
        self.found.push(Mistake { place, problem: problem.into() });
    }

    /// All of them in the order of the file.
    pub fn into_sorted(mut self) -> Vec<Mistake> {
        self.found.sort_by_key(|mistake| match mistake.place {
            Place::File { line, column, .. } => (line, column),
            Place::Flag(_) | Place::Default => (0, 0),
        });
        self.found
    }
}
