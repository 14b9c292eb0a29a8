//! Comments have a limited width, which rustfmt does not enforce.

use std::path::Path;

/// The largest width of a comment's line.
const COLUMNS: usize = 100;

#[test]
fn comments_are_at_most_100_columns_wide() {
    let mut wide = Vec::new();
    let folders =
        super::crates().into_iter().map(|this| this.root).chain(["tests", "benches", "examples", "fuzz"].map(Into::into));
    for file in folders.filter(|folder| Path::new(folder).is_dir()).flat_map(|folder| super::rust_files(&folder)) {
        if file.components().any(|part| part.as_os_str() == "target") {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            // An address or a table's row cannot be broken.
            let comment = line.trim_start().starts_with("//") && !line.contains("://") && !line.contains(" | ");
            if comment && line.chars().count() > COLUMNS {
                wide.push(format!("{}:{}", file.display(), number + 1));
            }
        }
    }
    assert!(wide.is_empty(), "comments wider than {COLUMNS} columns:\n{}", wide.join("\n"));
}
