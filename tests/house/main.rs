//! Checks of imports and of comments: `cargo test --test house`.

mod arrows;
mod comments;

use std::path::{Path, PathBuf};

/// A crate of this project.
struct Crate {
    /// The crate's name, as paths write it.
    name: String,
    /// The folder of the crate's sources.
    root: PathBuf,
    /// The path of the crate among the rooms; empty if each module of the crate is a room.
    room: Vec<String>,
}

/// The crates in which each top-level module is a room. Every other crate is one room.
const CRATES_OF_ROOMS: [&str; 3] = ["sdxl_squeeze", "squeeze_base", "squeeze_numerics"];

/// The program's crate and the members of the workspace.
fn crates() -> Vec<Crate> {
    let folders = std::iter::once(PathBuf::new()).chain(members());
    folders
        .map(|folder| {
            let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            let name = manifest.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).unwrap();
            let name = name.replace('-', "_");
            let room = folder.file_name().filter(|_| !CRATES_OF_ROOMS.contains(&name.as_str()));
            let room = room.map(|room| room.to_str().unwrap().to_owned()).into_iter().collect();
            Crate { name, root: folder.join("src"), room }
        })
        .collect()
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
