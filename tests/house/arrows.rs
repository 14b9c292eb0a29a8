//! Imports between the project's modules go in one direction.
//!
//! A *room* is a crate, or a top-level module of one of the crates that hold several ideas
//! ([`CRATES_OF_ROOMS`](super::CRATES_OF_ROOMS)). [`FLOORS`] lists the rooms from the ground up. A
//! room may import only rooms of lower floors, and no files may import each other in a circle. Unit
//! tests (`#[cfg(test)] mod`) are not read, because a test may import anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::Crate;

/// The rooms from the ground up.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["number", "shorten", "digest", "progress", "allocator"],
    &["input", "memory", "pattern"],
    &["output", "safetensors_file"],
    &["codebook"],
    &["container"],
    &["symbols", "no_symbols"],
    &[
        "product",
        "sum",
        "elementwise",
        "finite",
        "random",
        "seed_sequence",
        "device",
        "libtorch",
        "settings",
        "waiting",
        "one_thread",
    ],
    &["brownian"],
    &["solver", "model"],
    &["geometry", "pipeline", "shipped"],
    &["synth", "config"],
    &["recipe"],
    &["calibration"],
    &["plan"],
    &["tune"],
    &["compress", "coreml", "inspect"],
    &["export", "report"],
    &["bundle", "compare"],
    &["cli"],
];

/// One source file, its place among the modules, and the paths that it names.
struct Source {
    file: PathBuf,
    /// The module, e.g. `["solver", "joint", "row"]`; empty for the root of a crate of rooms.
    module: Vec<String>,
    /// Paths that the file names, from the root of the rooms, e.g. `["solver", "Hessian"]`.
    uses: BTreeSet<Vec<String>>,
    /// Targets of `pub use`, by the name that they have in this file. Re-exports do not count as
    /// imports.
    handed_on: BTreeMap<String, Vec<String>>,
}

#[test]
fn every_arrow_goes_down() {
    let sources = read_all();
    let floor = |room: &str| FLOORS.iter().position(|rooms| rooms.contains(&room));
    let mut wrong = BTreeSet::new();
    for source in &sources {
        let Some(room) = source.module.first() else { continue };
        let Some(from) = floor(room) else {
            wrong.insert(format!("{}: `{room}` is on no floor of tests/house/arrows.rs", source.file.display()));
            continue;
        };
        for target in source.uses.iter().filter_map(|path| target(&sources, path)) {
            let Some(other) = sources[target].module.first() else { continue };
            if other != room && floor(other).is_none_or(|to| to >= from) {
                wrong.insert(format!("{}: `{room}` imports `{other}`", source.file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows that do not go down:\n{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let sources = read_all();
    let arrows: Vec<BTreeSet<usize>> = (0..sources.len())
        .map(|from| {
            let targets = sources[from].uses.iter().filter_map(|path| target(&sources, path));
            targets.filter(|to| *to != from).collect()
        })
        .collect();
    let circles: Vec<String> = circles(&arrows)
        .iter()
        .map(|circle| {
            let mut lines = Vec::new();
            for from in circle {
                for to in arrows[*from].intersection(circle) {
                    lines.push(format!("  {} -> {}", sources[*from].file.display(), sources[*to].file.display()));
                }
            }
            lines.join("\n")
        })
        .collect();
    assert!(circles.is_empty(), "circles of imports:\n{}", circles.join("\n\n"));
}

/// The index of the file that defines the item at `path`. Re-exports are followed.
fn target(sources: &[Source], path: &[String]) -> Option<usize> {
    let mut path = path.to_vec();
    for _ in 0..8 {
        let depth = (0..=path.len()).rev().find(|depth| sources.iter().any(|source| source.module == path[..*depth]))?;
        let same = |source: &&Source| source.module == path[..depth];
        let at = sources.iter().position(|source| same(&source))?;
        // Several crates have the same, empty path as their root, so all of their roots are
        // searched.
        let handed_on = |name: &String| sources.iter().filter(same).find_map(|source| source.handed_on.get(name));
        match path.get(depth).and_then(handed_on) {
            Some(further) => path = further.iter().chain(&path[depth + 1..]).cloned().collect(),
            None => return Some(at),
        }
    }
    None
}

/// Sets of two or more files in which every file reaches every other through imports.
fn circles(arrows: &[BTreeSet<usize>]) -> Vec<BTreeSet<usize>> {
    let reached: Vec<BTreeSet<usize>> = (0..arrows.len())
        .map(|from| {
            let mut reached = BTreeSet::new();
            let mut open: Vec<usize> = arrows[from].iter().copied().collect();
            while let Some(next) = open.pop() {
                if reached.insert(next) {
                    open.extend(&arrows[next]);
                }
            }
            reached
        })
        .collect();
    let mut circles = BTreeSet::new();
    for from in 0..arrows.len() {
        if reached[from].contains(&from) {
            circles.insert(reached[from].iter().copied().filter(|to| reached[*to].contains(&from)).collect());
        }
    }
    circles.into_iter().collect()
}

/// Reads the sources of all crates.
fn read_all() -> Vec<Source> {
    let crates = super::crates();
    crates.iter().flat_map(|this| read_crate(&crates, this)).collect()
}

fn read_crate(crates: &[Crate], this: &Crate) -> Vec<Source> {
    let mut files = super::rust_files(&this.root);
    let tests: Vec<PathBuf> = files.iter().flat_map(|file| files_of_tests(file)).collect();
    files.retain(|file| !tests.contains(file));
    files.iter().map(|file| read(crates, this, file)).collect()
}

/// The files of modules that a file declares with `#[cfg(test)] mod name;`.
fn files_of_tests(file: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(file).unwrap();
    let mut files = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]"
            && let Some(name) = lines
                .next()
                .and_then(|next| next.trim().trim_start_matches("pub(crate) ").strip_prefix("mod ")?.strip_suffix(';'))
        {
            let folder = folder_of(file);
            files.extend([folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")]);
        }
    }
    files
}

/// The folder of a file's child modules.
fn folder_of(file: &Path) -> PathBuf {
    let stem = file.file_stem().unwrap();
    if stem == "mod" || stem == "lib" || stem == "main" { file.parent().unwrap().to_owned() } else { file.with_extension("") }
}

fn read(crates: &[Crate], this: &Crate, file: &Path) -> Source {
    let inside = file.strip_prefix(&this.root).unwrap().with_extension("");
    let mut module = this.room.clone();
    module.extend(inside.iter().map(|part| part.to_str().unwrap().to_owned()));
    if module.last().is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main")) {
        module.pop();
    }
    let tokens = without_tests(tokens(&std::fs::read_to_string(file).unwrap()));
    let mut source = Source { file: file.to_owned(), module, uses: BTreeSet::new(), handed_on: BTreeMap::new() };
    // A path may begin with the name of a module that this file declares.
    let children: BTreeSet<&str> =
        tokens.windows(3).filter(|three| three[0] == "mod" && three[2] == ";").map(|three| three[1].as_str()).collect();
    let mut at = 0;
    while at < tokens.len() {
        let begins = at == 0 || tokens[at - 1] != "::";
        if tokens[at] == "use" && begins {
            let public = at > 0 && (tokens[at - 1] == "pub" || tokens[at - 1] == ")");
            let mut names = Vec::new();
            at = tree(&tokens, at + 1, &[], &mut names);
            for (path, name) in names {
                if let Some(path) = from_root(crates, this, &source.module, &children, &path) {
                    if public {
                        source.handed_on.insert(name, path);
                    } else {
                        source.uses.insert(path);
                    }
                }
            }
        } else if begins && at + 1 < tokens.len() && tokens[at + 1] == "::" {
            let mut path = vec![tokens[at].clone()];
            while at + 2 < tokens.len() && tokens[at + 1] == "::" && is_name(&tokens[at + 2]) {
                path.push(tokens[at + 2].clone());
                at += 2;
            }
            source.uses.extend(from_root(crates, this, &source.module, &children, &path));
            at += 1;
        } else {
            at += 1;
        }
    }
    source
}

/// Collects the paths of the `use` at index `at`, each with the name that it gets in this file.
/// Returns the index after the `use`.
fn tree(tokens: &[String], mut at: usize, before: &[String], names: &mut Vec<(Vec<String>, String)>) -> usize {
    let mut path = before.to_vec();
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = tree(tokens, at, &path, names);
                    if tokens.get(at).is_some_and(|token| token == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            Some("::") => at += 1,
            Some("as") => {
                names.push((path, tokens[at + 1].clone()));
                return at + 2;
            }
            Some("self") if !path.is_empty() => at += 1,
            Some(token) if is_name(token) || token == "*" => {
                path.push(token.to_owned());
                at += 1;
            }
            _ => {
                let name = path.last().cloned().unwrap_or_default();
                names.push((path, name));
                return at;
            }
        }
    }
}

/// Converts a path to one from the root of the rooms. Returns `None` if the path names an item of a
/// foreign crate or of this file.
fn from_root(
    crates: &[Crate],
    this: &Crate,
    module: &[String],
    children: &BTreeSet<&str>,
    path: &[String],
) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let named = crates.iter().find(|other| other.name == *first);
    let (mut base, mut rest) = match first.as_str() {
        "crate" => (this.room.clone(), rest),
        _ if named.is_some() => (named?.room.clone(), rest),
        "self" => (module.to_vec(), rest),
        "super" => (module[..module.len().checked_sub(1)?].to_vec(), rest),
        child if children.contains(child) => (module.to_vec(), path),
        _ => return None,
    };
    while let Some(("super", further)) = rest.split_first().map(|(first, further)| (first.as_str(), further)) {
        base.pop()?;
        rest = further;
    }
    base.extend_from_slice(rest);
    Some(base)
}

fn is_name(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Drops the bodies of `#[cfg(test)] mod name { .. }`.
fn without_tests(tokens: Vec<String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let marked = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
        if tokens[at..].iter().take(marked.len()).map(String::as_str).eq(marked)
            && tokens.get(at + 9).is_some_and(|token| token == "{")
        {
            let mut depth = 1;
            at += 10;
            while depth > 0 && at < tokens.len() {
                depth += i32::from(tokens[at] == "{") - i32::from(tokens[at] == "}");
                at += 1;
            }
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Splits code into names, `::` and single characters. Comments, strings and character literals are
/// left out.
fn tokens(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let is = |at: usize, wanted: &str| wanted.chars().enumerate().all(|(n, letter)| letters.get(at + n) == Some(&letter));
    while at < letters.len() {
        let letter = letters[at];
        if is(at, "//") {
            while at < letters.len() && letters[at] != '\n' {
                at += 1;
            }
        } else if is(at, "r\"") || is(at, "r#\"") || is(at, "br\"") || is(at, "br#\"") {
            let start = at + usize::from(letter == 'b') + 1;
            let end = if letters[start] == '#' { "\"#" } else { "\"" };
            at = start + end.len();
            while at < letters.len() && !is(at, end) {
                at += 1;
            }
            at += end.len();
        } else if letter == '"' {
            at += 1;
            while at < letters.len() && letters[at] != '"' {
                at += if letters[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if letter == '\'' && (letters.get(at + 1) == Some(&'\\') || letters.get(at + 2) == Some(&'\'')) {
            at += if letters[at + 1] == '\\' { 3 } else { 2 };
            while at < letters.len() && letters[at] != '\'' {
                at += 1;
            }
            at += 1;
        } else if is(at, "::") {
            tokens.push("::".to_owned());
            at += 2;
        } else if letter.is_alphanumeric() || letter == '_' {
            let start = at;
            while at < letters.len() && (letters[at].is_alphanumeric() || letters[at] == '_') {
                at += 1;
            }
            tokens.push(letters[start..at].iter().collect());
        } else {
            if !letter.is_whitespace() {
                tokens.push(letter.to_string());
            }
            at += 1;
        }
    }
    tokens
}

#[test]
fn paths_are_read_as_the_compiler_reads_them() {
    let text = r##"
        //! crate::comment
        pub use child::Given;
        use crate::solver::{Hessian, joint::{self, row::Row as R}};
        use super::super::plan::Plan;
        mod child;
        fn f(x: &str) -> char { let _ = "crate::string"; crate::sum::all(x); other::Chest::open(); child::g(); std::mem::take(y); '"' }
        #[cfg(test)]
        mod tests { use crate::pipeline::noise; }
    "##;
    let folder = std::env::temp_dir().join(format!("arrows-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("a/b")).unwrap();
    let file = folder.join("a/b/mod.rs");
    std::fs::write(&file, text).unwrap();
    let this = Crate { name: "this".to_owned(), root: folder.clone(), room: Vec::new() };
    let other = Crate { name: "other".to_owned(), root: folder.join("other"), room: vec!["attic".to_owned()] };
    let source = read(&[other], &this, &file);
    std::fs::remove_dir_all(&folder).unwrap();
    let uses: Vec<String> = source.uses.iter().map(|path| path.join("::")).collect();
    assert_eq!(
        uses,
        [
            "a::b::child::g",
            "attic::Chest::open",
            "plan::Plan",
            "solver::Hessian",
            "solver::joint",
            "solver::joint::row::Row",
            "sum::all"
        ]
    );
    assert_eq!(source.handed_on["Given"].join("::"), "a::b::child::Given");
    assert_eq!(source.module.join("::"), "a::b");
}

#[test]
fn circles_are_found() {
    let arrows = [[1].into(), [2].into(), [0].into(), [0].into(), BTreeSet::new()];
    assert_eq!(circles(&arrows), [BTreeSet::from([0, 1, 2])]);
}
