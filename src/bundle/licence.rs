//! The licence of a model.

use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::Result;
use squeeze_base::input;

/// The licence that a model's folder states in the head of its `README.md`, as model hubs write it.
pub(super) fn stated_licence(model: &PipelineFolder) -> Result<Option<String>> {
    /// A model card: a few KiB.
    const CARD: input::Limit = input::Limit { kind: "a model card", bytes: 1 << 20 };
    let path = model.root().join("README.md");
    if !path.is_file() {
        return Ok(None);
    }
    let text = input::read_text(&path, CARD)?;
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return Ok(None);
    }
    let head: Vec<&str> = lines.take_while(|line| *line != "---").collect();
    let entry = |key: &str| {
        let value = head.iter().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        value.map(|value| value.trim().trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
    };
    // Licences of one's own are `other` with a name.
    Ok(entry("license_name").or_else(|| entry("license")))
}
