//! The order of this house, checked: `cargo test --test house`.

mod arrows;
mod comments;

use std::path::{Path, PathBuf};

/// The folders of the crates' sources.
fn roots() -> Vec<PathBuf> {
    let mut roots = vec![PathBuf::from("src")];
    roots.extend(members().map(|member| member.join("src")));
    roots
}

/// The names of the crates, as paths write them.
fn crates() -> Vec<String> {
    let mut names = vec!["sdxl_squeeze".to_owned()];
    names.extend(members().map(|member| {
        let manifest = std::fs::read_to_string(member.join("Cargo.toml")).unwrap();
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).unwrap();
        name.replace('-', "_")
    }));
    names
}

fn members() -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir("crates").into_iter().flatten().map(|entry| entry.unwrap().path())
}

/// The Rust files below a folder, sorted.
fn rust_files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|why| panic!("{}: {why}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
