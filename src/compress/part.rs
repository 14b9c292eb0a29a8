//! A part of a run: some solved layers in a container, which a thread of its own writes.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use half::f16;
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_container::{CompressedWeight, Container, ContainerInfo, ContainerWriter, Network};

use super::report::LayerReport;

/// A layer that is solved.
#[derive(Debug)]
pub(super) struct SolvedLayer {
    pub report: LayerReport,
    pub notes: Vec<String>,
    /// Its weight; `None` if it stays dense, or is only in the file.
    pub weight: Option<CompressedWeight>,
}

/// A part that is being written. Its layers stay in memory until it is on the disk.
#[derive(Debug)]
pub(super) struct Writing {
    layers: Arc<Vec<SolvedLayer>>,
    /// `None` once it was waited for.
    thread: Option<JoinHandle<Result<Container>>>,
}

impl Writing {
    /// Begins to write `layers` to the file `path`, as a part of the run with the hash `run`.
    ///
    /// # Errors
    /// [`Error::Write`] if the system has no thread left.
    pub(super) fn begin(path: &Path, run: String, layers: Vec<SolvedLayer>) -> Result<Self> {
        let layers = Arc::new(layers);
        let of_thread = Arc::clone(&layers);
        let target = path.to_owned();
        let thread = std::thread::Builder::new().name("part".into());
        let thread = thread.spawn(move || write(&target, &run, &of_thread)).map_err(Error::write(path))?;
        Ok(Writing { layers, thread: Some(thread) })
    }

    /// The layers of the part.
    pub(super) fn layers(&self) -> &[SolvedLayer] {
        &self.layers
    }

    /// Waits until the part is on the disk, and opens it.
    ///
    /// # Errors
    /// If it could not be written.
    pub(super) fn end(mut self) -> Result<Container> {
        let thread = self.thread.take().expect("the thread is only taken here and when this is dropped");
        thread.join().unwrap_or_else(|_| Err(Error::internal("the thread that writes layers has panicked")))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Whoever drops it has an error to report already; the part is on the disk or is not.
            let _ = thread.join();
        }
    }
}

fn write(path: &Path, run: &str, layers: &[SolvedLayer]) -> Result<Container> {
    let rows: Vec<Value> = layers.iter().map(|layer| json!({ "notes": layer.notes, "report": layer.report })).collect();
    let info = ContainerInfo {
        network: Network::Unet,
        config: Map::new(),
        recipe: json!({ "layers": rows, "run": run }),
        sources: Vec::new(),
        prediction_type: None,
    };
    let mut writer = ContainerWriter::create(path, info)?;
    for SolvedLayer { report, weight, .. } in layers {
        if let Some(weight) = weight {
            writer.add_weight(&format!("{}.weight", report.name), weight, Value::Null)?;
        }
    }
    if layers.iter().all(|layer| layer.weight.is_none()) {
        // A safetensors file needs a tensor.
        writer.add_tensor("nothing", &[1], &[f16::ZERO])?;
    }
    writer.finish()?;
    // The data was hashed a moment ago. A run that goes on with this one checks the hash.
    Container::open_unverified(path)
}

/// The layers of a part of the run with the hash `run`, without their weights.
///
/// # Errors
/// [`Error::BadFile`] if it is a part of another run, or of none.
pub(super) fn layers(part: &Container, run: &str) -> Result<Vec<SolvedLayer>> {
    let recipe = &part.info().recipe;
    let damaged = || Error::bad_file(part.path(), "is no part of this run");
    if recipe.get("run").and_then(Value::as_str) != Some(run) {
        return Err(damaged());
    }
    let rows = recipe.get("layers").and_then(Value::as_array).ok_or_else(damaged)?;
    let layer = |row: &Value| {
        let field = |name: &str| row.get(name).cloned().unwrap_or(Value::Null);
        let report = serde_json::from_value(field("report")).map_err(|_| damaged())?;
        let notes = serde_json::from_value(field("notes")).map_err(|_| damaged())?;
        Ok(SolvedLayer { report, notes, weight: None })
    };
    rows.iter().map(layer).collect()
}
