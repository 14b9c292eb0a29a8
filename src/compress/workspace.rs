//! What of a run is finished, on disk: so that memory need not hold it, and a run that was ended goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use half::f16;
use serde_json::{Map, Value, json};

use super::LayerReport;
use crate::container::{CompressedWeight, Container, ContainerInfo, ContainerWriter};
use crate::error::{Error, Result};
use crate::output::write_file;

/// A folder beside the result, there until the result is.
///
/// `run.json` says of what run it is. Finished layers lie in `part-NNNN.safetensors`, each a container of a few weights that came into
/// being whole: so whatever kills a run, what was finished some seconds before is kept. A lock keeps a second run out.
#[derive(Debug)]
pub struct Workspace {
    folder: PathBuf,
    _lock: File,
    parts: Vec<Container>,
    finished: BTreeMap<String, Finished>,
    waiting: Vec<(LayerReport, Vec<String>, Option<CompressedWeight>)>,
    waiting_bytes: u64,
    since: Instant,
}

#[derive(Debug)]
struct Finished {
    part: usize,
    report: LayerReport,
    notes: Vec<String>,
}

/// Finished layers wait no longer than this to be written, ...
const WAIT: Duration = Duration::from_secs(15);
/// ... nor when they are so many bytes.
const MANY: u64 = crate::plan::WAITING / 2;

impl Workspace {
    /// Begins a run in `folder`, or goes on with the one that is there.
    ///
    /// `identity` is everything that the result depends on, entry by entry. With `resume` a run of the same identity goes on, and one of
    /// another is refused; without, what is there is thrown away.
    ///
    /// # Errors
    /// [`Error::Argument`] naming what has changed, or if another process works there; [`Error::Write`]; [`Error::BadFile`] for a part
    /// that is damaged.
    pub fn open(folder: &Path, identity: &Map<String, Value>, resume: bool) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        let lock_path = folder.join("lock");
        let lock = File::create(&lock_path).map_err(Error::write(&lock_path))?;
        lock.try_lock().map_err(|_| Error::Argument(format!("another run is at work in {}", folder.display())))?;

        let said = folder.join("run.json");
        let found = match crate::input::read(&said, crate::input::Limit::RUN_STATE) {
            Ok(bytes) => serde_json::from_slice::<Map<String, Value>>(&bytes).ok(),
            Err(_) => None,
        };
        let mut parts = Vec::new();
        match found {
            Some(found) if resume => {
                check_identity(folder, &found, identity)?;
                for number in 0.. {
                    let path = folder.join(part_name(number));
                    if !path.exists() {
                        break;
                    }
                    parts.push(Container::open(&path)?);
                }
            }
            found => {
                if found.is_some() {
                    tracing::warn!(
                        "an unfinished run in {} is thrown away; --resume would have gone on with it",
                        folder.display()
                    );
                }
                for entry in std::fs::read_dir(folder).map_err(Error::read(folder))?.flatten() {
                    let path = entry.path();
                    if path != lock_path {
                        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                        removed.map_err(Error::write(&path))?;
                    }
                }
                let text = serde_json::to_vec_pretty(identity).map_err(|why| Error::Argument(why.to_string()))?;
                write_file(&said, |out| out.write_all(&text))?;
            }
        }
        let mut workspace = Workspace {
            folder: folder.to_owned(),
            _lock: lock,
            parts,
            finished: BTreeMap::new(),
            waiting: Vec::new(),
            waiting_bytes: 0,
            since: Instant::now(),
        };
        for part in 0..workspace.parts.len() {
            workspace.index(part)?;
        }
        Ok(workspace)
    }

    /// The folder, for what the run keeps besides.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads what layers a part has.
    fn index(&mut self, part: usize) -> Result<()> {
        let container = &self.parts[part];
        let damaged = || Error::bad_file(container.path(), "is no part of a run");
        for row in container.info().recipe.get("layers").and_then(Value::as_array).ok_or_else(damaged)? {
            let field = |name: &str| row.get(name).cloned().unwrap_or(Value::Null);
            let report: LayerReport = serde_json::from_value(field("report")).map_err(|_| damaged())?;
            let notes = serde_json::from_value(field("notes")).map_err(|_| damaged())?;
            self.finished.insert(report.name.clone(), Finished { part, report, notes });
        }
        Ok(())
    }

    /// Whether a layer is finished and on disk.
    pub fn has(&self, layer: &str) -> bool {
        self.finished.contains_key(layer)
    }

    /// Adds a finished layer; it is on disk soon, or after [`flush`](Self::flush). A layer that stays dense has no weight.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn push(&mut self, report: LayerReport, notes: Vec<String>, weight: Option<CompressedWeight>) -> Result<()> {
        if self.waiting.is_empty() {
            self.since = Instant::now();
        }
        self.waiting_bytes += weight.as_ref().map_or(0, CompressedWeight::stored_bytes);
        self.waiting.push((report, notes, weight));
        if self.waiting_bytes > MANY || self.since.elapsed() > WAIT { self.flush() } else { Ok(()) }
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let rows: Vec<Value> =
            self.waiting.iter().map(|(report, notes, _)| json!({ "notes": notes, "report": report })).collect();
        let info = ContainerInfo { unet_config: Map::new(), recipe: json!({ "layers": rows }), sources: Vec::new() };
        let path = self.folder.join(part_name(self.parts.len()));
        let mut writer = ContainerWriter::create(&path, info)?;
        for (report, _, weight) in &self.waiting {
            if let Some(weight) = weight {
                writer.add_weight(&format!("{}.weight", report.name), weight, Value::Null)?;
            }
        }
        if self.waiting.iter().all(|(_, _, weight)| weight.is_none()) {
            // A safetensors file of no tensors is none.
            writer.add_values("nothing", &[1], &[f16::ZERO])?;
        }
        writer.finish()?;
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.parts.push(Container::open(&path)?);
        self.index(self.parts.len() - 1)
    }

    /// A finished layer's weight; none if it stays dense.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not finished; [`Error::BadFile`].
    pub fn weight(&self, layer: &str) -> Result<Option<CompressedWeight>> {
        let finished = self.finished.get(layer).ok_or_else(|| Error::Argument(format!("`{layer}` is not finished")))?;
        let container = &self.parts[finished.part];
        let name = format!("{layer}.weight");
        if container.has_weight(&name) { container.weight(&name).map(Some) } else { Ok(None) }
    }

    /// The finished layers' reports and notes, in the order of their names.
    pub fn reports(&self) -> impl Iterator<Item = (&LayerReport, &[String])> {
        self.finished.values().map(|finished| (&finished.report, finished.notes.as_slice()))
    }

    /// Removes the folder: the result is where it belongs.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).map_err(Error::write(&self.folder))
    }
}

fn part_name(number: usize) -> String {
    format!("part-{number:04}.safetensors")
}

/// An error that names every entry that is not what it was.
fn check_identity(folder: &Path, found: &Map<String, Value>, wanted: &Map<String, Value>) -> Result<()> {
    let keys = found.keys().chain(wanted.keys().filter(|key| !found.contains_key(*key)));
    let changed: Vec<&str> = keys.filter(|key| found.get(*key) != wanted.get(*key)).map(String::as_str).collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "the run in {} cannot go on: changed since it began: {} (without --resume it begins anew)",
        folder.display(),
        changed.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str) -> LayerReport {
        LayerReport {
            name: name.into(),
            stage: "mid_block".into(),
            shape: vec![2, 4],
            sparsity: 0.5,
            bits_per_weight: 3.0,
            bytes: 3,
            vectors: Some(7),
            errors: Default::default(),
        }
    }

    fn weight() -> CompressedWeight {
        let values: Vec<f16> = (0..8).map(|i| f16::from_f32(i as f32)).collect();
        CompressedWeight::sparse(vec![2, 4], &[true, false, true, true, false, false, true, true], &values).unwrap()
    }

    fn identity(config: &str) -> Map<String, Value> {
        Map::from_iter([("config".to_owned(), json!(config)), ("model".to_owned(), json!("m"))])
    }

    #[test]
    fn what_was_finished_is_there_after_the_end_and_only_for_the_same_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut first = Workspace::open(&path, &identity("a"), false).unwrap();
        let twice = Workspace::open(&path, &identity("a"), true).unwrap_err().to_string();
        assert!(twice.contains("another run"), "{twice}");
        first.push(report("a"), vec!["a: said".into()], Some(weight())).unwrap();
        first.flush().unwrap();
        first.push(report("dense"), vec![], None).unwrap();
        first.flush().unwrap();
        first.push(report("lost"), vec![], Some(weight())).unwrap();
        drop(first);

        let second = Workspace::open(&path, &identity("a"), true).unwrap();
        assert!(second.has("a") && second.has("dense") && !second.has("lost"));
        assert_eq!(second.weight("a").unwrap(), Some(weight()));
        assert_eq!(second.weight("dense").unwrap(), None);
        assert!(second.weight("lost").is_err());
        let said: Vec<_> = second.reports().map(|(report, notes)| (report.name.as_str(), notes.to_vec())).collect();
        assert_eq!(said, [("a", vec!["a: said".to_owned()]), ("dense", vec![])]);
        drop(second);

        let refused = Workspace::open(&path, &identity("b"), true).unwrap_err();
        assert!(refused.is_bad_input() && refused.to_string().contains("changed since it began: config ("), "{refused}");
        let anew = Workspace::open(&path, &identity("b"), false).unwrap();
        assert!(!anew.has("a"));
        anew.remove().unwrap();
        assert!(!path.exists());
    }
}
