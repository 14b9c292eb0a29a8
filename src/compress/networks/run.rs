//! A whole run of a text encoder or a VAE: calibration, compression, container.

use std::collections::BTreeMap;

use sdxl_model::checkpoint::{Prefetched, SourceFile, TensorSource, Weights};
use sdxl_model::text::ClipText;
use serde_json::{Map, Value, json};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::ContainerInfo;

use super::dense::{Dense, Loaded, TOKEN_EMBEDDING};
use super::inputs;
use super::prepare::PreparedNetwork;
use super::report::NetworkReport;
use super::walk::{self, Solving};
use crate::compress::container::{Finished, write_container};
use crate::compress::identity::BUILD;
use crate::compress::report::LayerReport;
use crate::compress::workspace::{Claim, Workspace, workspace_folder};
use crate::config::{RunConfig, SequencingWord};
use crate::recipe::Sequencing;

impl PreparedNetwork<'_> {
    /// Compresses the network and writes its container.
    ///
    /// Finished layers are kept beside the container's path, also once the container is written:
    /// [`clean_up`](Self::clean_up) removes them. With
    /// [`RunOptions::resume`](crate::recipe::RunOptions::resume) a run goes on with them.
    ///
    /// # Errors
    /// If texts cannot be read, the network has values that a container cannot hold, calibration
    /// fails, a layer cannot be compressed, or the container cannot be written;
    /// [`Error::Changed`](squeeze_base::Error::Changed) if a file is written to while it is read;
    /// [`Error::Stopped`](squeeze_base::Error::Stopped).
    pub fn run(&self, progress: &dyn Progress) -> Result<NetworkReport> {
        let numerics = crate::init();
        let network = self.network();
        let weights = self.dense.weights()?;
        let (claim, sources) = Claim::of(&workspace_folder(&self.path))?.during(|_| self.sources(&weights, progress))?;
        let texts = if self.is_calibrated() { inputs::texts(&self.config, self.nsamples)? } else { Vec::new() };
        let mut store = claim.open(&self.identity(&sources, &texts)?, self.options.resume)?;
        let source = weights.source(self.placement());
        let load = |source: &dyn TensorSource| self.dense.load(source);
        let mut loaded = load(&Prefetched::for_network(&source, load)?)?;
        let (states, samples) = match (&mut loaded, self.dense) {
            (Loaded::Text(text), Dense::Text(folder, part)) => {
                self.compress_embedding(text, &mut store, progress)?;
                let states = inputs::of_texts(folder, part, text, &texts, self.config.calibration.reading.long_prompts)?;
                (states, texts.len())
            }
            (Loaded::Vae(vae), Dense::Vae(_)) if self.is_calibrated() => {
                let states = inputs::of_pictures(self, vae, &mut store, progress)?;
                let count = states.len();
                (states, count)
            }
            (Loaded::Vae(_) | Loaded::Text(_), Dense::Vae(_) | Dense::Text(..)) => (Vec::new(), 0),
        };
        let solving =
            Solving { recipes: &self.recipes, sequencing: self.sequencing(), device: self.placement().device, progress };
        solving.run(loaded.pieces_mut(), states, &mut store)?;

        let info = ContainerInfo {
            network,
            config: self.dense.config().clone(),
            recipe: self.settings().without_folders().to_json(),
            sources,
            prediction_type: None,
        };
        let tensors = self.dense.tensors(&weights)?;
        let dense_bytes = tensors.iter().map(|spec| 2 * spec.numel()).sum();
        let finished = Finished { info, tensors, weights: &weights, layers: &store, tuned: None };
        let (written, sums) = write_container(&self.path, finished, progress)?;
        let notes = numerics.note().into_iter().chain(self.findings.iter().cloned()).chain(store.warnings().iter().cloned());
        let layers = self.in_execution_order(&store)?;
        Ok(NetworkReport {
            network,
            bytes: written.bytes,
            payload_bytes: written.payload_bytes,
            dense_bytes,
            samples,
            bits_per_weight: sums.bits_per_weight(),
            notes: notes.chain(layers.iter().flat_map(|(_, notes)| notes.iter().cloned())).collect(),
            layers: layers.into_iter().map(|(report, _)| report.clone()).collect(),
        })
    }

    /// Removes the finished layers, once they are not needed to go on with.
    ///
    /// # Errors
    /// [`Error::Write`](squeeze_base::Error::Write).
    pub fn clean_up(&self) -> Result<()> {
        let folder = workspace_folder(&self.path);
        std::fs::remove_dir_all(&folder).map_err(Error::write(&folder))
    }

    /// Which inputs the layers of a piece are compressed for.
    pub(super) fn sequencing(&self) -> Sequencing {
        match self.config.sequencing {
            SequencingWord::Stage => Sequencing::Stage,
            SequencingWord::Sublayer => Sequencing::Sublayer { dense_target: false },
        }
    }

    /// The config without what other networks are compressed with.
    fn settings(&self) -> RunConfig {
        let mut config = RunConfig { prune: None, palettize: None, budget: None, tune: None, ..self.config.clone() };
        match self.dense {
            Dense::Text(..) => config.vae = None,
            Dense::Vae(_) => config.text_encoders = None,
        }
        config
    }

    /// The files of the weights, with their hashes. Every value is checked, so that a model that a
    /// container cannot hold is refused before any layer is compressed.
    fn sources(&self, weights: &Weights, progress: &dyn Progress) -> Result<Vec<SourceFile>> {
        let task = Task::begin(progress, "checking the model", "files", weights.files().count());
        let folder = if self.folder.single_file().is_some() { String::new() } else { format!("{}/", self.network()) };
        let files = weights.survey(&folder, |name| task.advance(name))?;
        Ok(files.into_iter().chain(self.folder.lora_files()?).collect())
    }

    /// Everything that the result depends on, entry by entry.
    fn identity(&self, sources: &[SourceFile], texts: &[String]) -> Result<Map<String, Value>> {
        let (devices, kind) = (self.options.devices.as_slice(), self.placement().kind);
        let mut identity = Map::from_iter([
            ("version".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
            ("build".to_owned(), json!(BUILD)),
            ("network".to_owned(), json!(self.network())),
            ("config".to_owned(), json!(self.settings().to_yaml())),
            ("architecture".to_owned(), json!(self.dense.config())),
            ("model".to_owned(), json!(sources)),
            ("device and dtype".to_owned(), json!(format!("{devices:?} {kind:?}"))),
        ]);
        if self.is_calibrated() {
            identity.insert("texts".to_owned(), json!(digest::of_bytes(json!(texts).to_string().as_bytes())));
            identity.insert("text encoders and scheduler".to_owned(), json!(self.folder.prompt_files()?));
            if let Dense::Vae(folder) = self.dense {
                identity.insert("unet".to_owned(), json!(folder.unet_files()?));
            }
        }
        Ok(identity)
    }

    /// Compresses the table of the tokens' embeddings, if it has a recipe, and puts the compressed
    /// one into `text`.
    fn compress_embedding(&self, text: &mut ClipText, store: &mut Workspace, progress: &dyn Progress) -> Result<()> {
        let Some(recipe) = self.recipes.get(TOKEN_EMBEDDING) else { return Ok(()) };
        if !store.has(TOKEN_EMBEDDING) {
            let task = Task::begin(progress, "compressing", "tables", 1);
            task.go_on()?;
            let table = text.token_embedding().shallow_clone();
            let shape = table.size();
            let solved = walk::solved(TOKEN_EMBEDDING, table, recipe, None, self.placement().device)?;
            let report = LayerReport::new(TOKEN_EMBEDDING, "embeddings".to_owned(), shape, &solved.compressed, None);
            walk::add(report, solved, store, &task)?;
            store.flush()?;
        }
        if let Some(weight) = store.weight(TOKEN_EMBEDDING)? {
            text.replace_token_embedding(&walk::decoded(&weight)?)?;
        }
        Ok(())
    }

    /// The reports and notes of all compressed layers.
    fn in_execution_order<'s>(&self, store: &'s Workspace) -> Result<Vec<(&'s LayerReport, &'s [String])>> {
        let mut reports: BTreeMap<String, _> =
            store.reports().map(|(report, notes)| (self.dense.ruled(&report.name), (report, notes))).collect();
        Ok(self.dense.infos()?.iter().filter_map(|info| reports.remove(&info.name)).collect())
    }
}
