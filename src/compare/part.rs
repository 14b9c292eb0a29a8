//! A part of a judging in a file: what was measured of some of the pictures.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use squeeze_base::output::write_file;

use super::figures::figures;
use super::results::Results;
use crate::report::Comparison;

/// The value of `format`.
const FORMAT: &str = "sdxl-squeeze compare part";

/// The most bytes of a part. A picture of 1,024 x 1,024 pixels has 2 MB, and a part shows 32 of
/// each model or fewer unless it is asked for more.
const LIMIT: Limit = Limit { kind: "a part of a comparison", bytes: 2 << 30 };

/// One of several nearly equal parts of the pictures that are judged: `3/8` is the third of eight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    number: usize,
    parts: usize,
}

impl Part {
    /// The most parts.
    const MOST: usize = 100_000;

    /// Its number, from 1.
    #[must_use]
    pub fn number(self) -> usize {
        self.number
    }

    /// How many parts there are.
    #[must_use]
    pub fn parts(self) -> usize {
        self.parts
    }

    /// Path of its file in `folder`.
    #[must_use]
    pub fn path(self, folder: &Path) -> PathBuf {
        folder.join(format!("part-{}-of-{}.json", self.number, self.parts))
    }

    /// The part whose file has this name.
    fn of_name(name: &str) -> Option<Self> {
        let (number, parts) = name.strip_prefix("part-")?.strip_suffix(".json")?.split_once("-of-")?;
        let part: Part = format!("{number}/{parts}").parse().ok()?;
        (part.path(Path::new("")) == Path::new(name)).then_some(part)
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.parts)
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(number, parts)| Some((number.parse().ok()?, parts.parse().ok()?)));
        match numbers {
            Some((number, parts)) if (1..=parts).contains(&number) && parts <= Part::MOST => Ok(Part { number, parts }),
            _ => Err(format!("is not K/N, the K-th of N parts, with K from 1 to N and at most {} parts", Part::MOST)),
        }
    }
}

/// The content of a part's file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PartFile {
    format: String,
    /// Hash of everything that all parts of a comparison have in common.
    pub identity: String,
    pub part: usize,
    pub parts: usize,
    /// The pictures: index of the first, and of the one after the last.
    pub first: usize,
    pub end: usize,
    /// The report without measurements.
    pub frame: Comparison,
    pub results: Results,
}

impl PartFile {
    /// What was measured of the pictures from `first` to before `end`.
    pub(super) fn new(part: Part, identity: String, (first, end): (usize, usize), frame: Comparison, results: Results) -> Self {
        let Part { number, parts } = part;
        PartFile { format: FORMAT.into(), identity, part: number, parts, first, end, frame, results }
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|why| Error::internal(format!("a part cannot be written: {why}")))?;
        write_file(path, |file| file.write_all(&text))
    }

    /// Reads a part and checks that it is whole.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is no part, or lacks something.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let content = input::read(path, LIMIT)?;
        let read: PartFile = serde_json::from_slice(&content)
            .map_err(|why| Error::bad_file(path, format!("is no whole part of a comparison, so draw it again: {why}")))?;
        let PartFile { format, part, parts, first, end, frame, results, .. } = &read;
        let is_whole = format == FORMAT
            && (1..=*parts).contains(part)
            && first <= end
            && *end <= frame.judged.len()
            && results.is_whole(frame.rows.len(), end - first)
            && results.noise_floor.is_some() == frame.noise_floor.is_some();
        if is_whole { Ok(read) } else { Err(Error::bad_file(path, "is no whole part of a comparison; draw it again")) }
    }
}

/// Puts the parts in `folder` together. The result is that of judging in one piece.
///
/// # Errors
/// [`Error::Argument`] if there are no parts, some are missing, or they are of different
/// comparisons; [`Error::BadFile`] naming a part that is damaged.
pub fn merge(folder: &Path) -> Result<Comparison> {
    let mut found: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(Error::read(folder))? {
        let name = entry.map_err(Error::read(folder))?.file_name();
        if let Some(part) = name.to_str().and_then(Part::of_name) {
            found.entry(part.parts).or_default().push(part.number);
        }
    }
    let shown = folder.display();
    if found.len() > 1 {
        let counts: Vec<String> = found.keys().map(usize::to_string).collect();
        return Err(Error::Argument(format!(
            "{shown} has parts of {} and keeps only one set; remove the others",
            counts.join(" and of ")
        )));
    }
    let Some((parts, numbers)) = found.pop_first() else {
        return Err(Error::Argument(format!("{shown} has no parts; draw them with --part 1/N to N/N")));
    };
    let missing: Vec<usize> = (1..=parts).filter(|number| !numbers.contains(number)).collect();
    if !missing.is_empty() {
        return Err(Error::Argument(format!(
            "{shown} lacks {} of {parts} parts; draw with --part {}",
            missing.len(),
            missing.iter().map(|number| format!("{number}/{parts}")).collect::<Vec<_>>().join(", ")
        )));
    }
    let read = |number: usize| PartFile::read(&Part { number, parts }.path(folder));
    let PartFile { identity, end, mut frame, mut results, first, .. } = read(1)?;
    let (mut next, mut devices) = (end, vec![frame.device.clone()]);
    for number in 2..=parts {
        let path = Part { number, parts }.path(folder);
        let part = read(number)?;
        if part.identity != identity {
            let one = Part { number: 1, parts }.path(folder);
            return Err(Error::Argument(format!(
                "{} and {} are of different comparisons; remove one and draw it again",
                one.display(),
                path.display()
            )));
        }
        if part.first != next {
            return Err(Error::bad_file(&path, format!("begins with picture {}, not {next}", part.first)));
        }
        next = part.end;
        if !devices.contains(&part.frame.device) {
            devices.push(part.frame.device);
        }
        results.append(part.results);
    }
    if first != 0 || next != frame.judged.len() {
        return Err(Error::Argument(format!("the parts in {shown} are of {next} pictures, not of {}", frame.judged.len())));
    }
    if devices.len() > 1 {
        frame.warnings.push(format!("parts were judged on different devices: {}", devices.join("; ")));
    }
    figures(frame, results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_read_as_it_is_written() {
        let part: Part = "3/8".parse().unwrap();
        assert_eq!((part.number(), part.parts(), part.to_string().as_str()), (3, 8, "3/8"));
        assert_eq!(Part::of_name("part-3-of-8.json"), Some(part));
        for text in ["", "3", "0/8", "9/8", "a/8", "3/", "-1/2", "1/100001", "3/8/9", "1/99999999999999999999"] {
            assert!(text.parse::<Part>().is_err(), "{text}");
        }
        for name in ["part-3-of-8", "part-03-of-8.json", "part-+3-of-8.json", "apart-3-of-8.json", "part-9-of-8.json"] {
            assert_eq!(Part::of_name(name), None, "{name}");
        }
    }
}
