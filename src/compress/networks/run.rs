//! A whole run of a text encoder or a VAE: calibration, compression, container.

use std::collections::BTreeMap;

use sdxl_model::States;
use sdxl_model::checkpoint::{Prefetched, SourceFile, TensorSource, Weights};
use sdxl_model::text::ClipText;
use serde_json::{Map, Value, json};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::ContainerInfo;

use super::amount;
use super::dense::{Dense, Half, Loaded, TOKEN_EMBEDDING};
use super::inputs;
use super::prepare::PreparedNetwork;
use super::report::NetworkReport;
use super::walk::{self, Samples, Solving};
use crate::compress::container::{Finished, write_container};
use crate::compress::identity::BUILD;
use crate::compress::report::LayerReport;
use crate::compress::workspace::{Claim, Workspace, workspace_folder};
use crate::config::{RunConfig, SequencingWord, Target};
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
        let texts = if self.is_calibrated() { amount::texts(&self.config, self.nsamples)? } else { Vec::new() };
        self.few_texts(&texts).iter().for_each(|note| tracing::warn!("{note}"));
        let mut store = claim.open(&self.identity(&sources, &texts)?, self.options.resume)?;
        let source = weights.source(self.placement());
        let samples = match self.is_calibrated() {
            true => self.compress_calibrated(&source, &texts, &mut store, progress)?,
            false => self.compress_alone(&source, &mut store, progress)?,
        };

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
        let notes = numerics
            .note()
            .into_iter()
            .chain(self.few_texts(&texts))
            .chain(self.findings.iter().cloned())
            .chain(store.warnings().iter().cloned());
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

    /// A warning if the layers of a text encoder are fitted to the dense outputs of a few texts.
    fn few_texts(&self, texts: &[String]) -> Option<String> {
        /// By 24 texts, the bundled model's first encoder at 3 bits gets worse than by palettes
        /// alone; by 48 it gets better than by `target: current`.
        const ENOUGH: usize = 48;
        let is_few = self.sequencing().has_dense_target() && (1..ENOUGH).contains(&texts.len());
        let network = self.network();
        is_few.then(|| {
            format!(
                "{network}: {} texts are few for `target: dense`, which fits them too well; a larger `nsamples` or `target: current` \
                 is better",
                texts.len()
            )
        })
    }

    /// Compresses the layers behind samples; returns the number of texts or pictures.
    fn compress_calibrated(
        &self,
        source: &(dyn TensorSource + Sync),
        texts: &[String],
        store: &mut Workspace,
        progress: &dyn Progress,
    ) -> Result<usize> {
        let (mut samples, mut pictures) = (0, Vec::new());
        for half in self.dense.halves() {
            let load = |source: &dyn TensorSource| self.dense.load(*half, source);
            let mut loaded = load(&Prefetched::for_network(source, load)?)?;
            let (states, dense) = match (&mut loaded, self.dense) {
                (Loaded::Text(text), Dense::Text(folder, part)) => {
                    let embed = |text: &ClipText| {
                        inputs::of_texts(folder, part, text, texts, self.config.calibration.reading.long_prompts)
                    };
                    let dense = if self.sequencing().has_dense_target() { embed(text)? } else { Vec::new() };
                    self.compress_embedding(source, store, progress)?;
                    let table = if store.has(TOKEN_EMBEDDING) { store.weight(TOKEN_EMBEDDING)? } else { None };
                    if let Some(table) = table {
                        text.replace_token_embedding(&walk::decoded(&table)?)?;
                    }
                    samples = texts.len();
                    (embed(text)?, dense)
                }
                (Loaded::Decoder(decoder), _) => {
                    let latents = inputs::of_pictures(self, decoder, store, progress)?;
                    if self.dense.halves().contains(&Half::Encoder) {
                        pictures = inputs::pictures(decoder, &latents, progress)?;
                    }
                    samples = latents.len();
                    self.twice(latents)
                }
                (Loaded::Encoder(_), _) => self.twice(std::mem::take(&mut pictures)),
                (Loaded::Text(_), Dense::Vae(..)) => return Err(Error::internal("a VAE was loaded as a text encoder")),
            };
            self.solving(None, progress).run(loaded.pieces_mut(), Samples { states, dense }, store)?;
        }
        Ok(samples)
    }

    /// Samples of the compressed and the dense network, which are the same in the beginning.
    fn twice(&self, states: Vec<States>) -> (Vec<States>, Vec<States>) {
        let dense = if self.sequencing().has_dense_target() { &states[..] } else { &[] };
        let dense = dense.iter().map(States::shallow_clone).collect();
        (states, dense)
    }

    /// Compresses layers that need no samples, with one weight in memory at a time; returns 0, the
    /// number of samples.
    fn compress_alone(&self, source: &dyn TensorSource, store: &mut Workspace, progress: &dyn Progress) -> Result<usize> {
        self.compress_embedding(source, store, progress)?;
        for half in self.dense.halves() {
            let mut outline = self.dense.outline(*half)?;
            self.solving(Some(source), progress).run(outline.pieces_mut(), Samples::default(), store)?;
        }
        Ok(0)
    }

    fn solving<'s>(&'s self, source: Option<&'s dyn TensorSource>, progress: &'s dyn Progress) -> Solving<'s> {
        let (sequencing, device) = (self.sequencing(), self.placement().device);
        Solving { recipes: &self.recipes, source, sequencing, device, progress }
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
            SequencingWord::Sublayer => Sequencing::Sublayer { dense_target: self.config.target == Target::Dense },
        }
    }

    /// The config without what other networks are compressed with.
    fn settings(&self) -> RunConfig {
        let mut config = RunConfig { prune: None, palettize: None, budget: None, tune: None, ..self.config.clone() };
        match self.dense {
            Dense::Text(..) => config.vae = None,
            Dense::Vae(..) => config.text_encoders = None,
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
            if let Dense::Vae(folder, _) = self.dense {
                identity.insert("unet".to_owned(), json!(folder.unet_files()?));
            }
        }
        Ok(identity)
    }

    /// Compresses the table of the tokens' embeddings, if it has a recipe.
    fn compress_embedding(&self, source: &dyn TensorSource, store: &mut Workspace, progress: &dyn Progress) -> Result<()> {
        let (Some(recipe), Dense::Text(_, part)) = (self.recipes.get(TOKEN_EMBEDDING), self.dense) else { return Ok(()) };
        if store.has(TOKEN_EMBEDDING) {
            return Ok(());
        }
        let task = Task::begin(progress, "compressing", "tables", 1);
        task.go_on()?;
        let shape = vec![part.config.vocab_size, part.config.hidden_size];
        let table = source.tensor(&format!("{TOKEN_EMBEDDING}.weight"), &shape)?;
        let solved = walk::solved(TOKEN_EMBEDDING, table, recipe, None, self.placement().device)?;
        let report = LayerReport::new(TOKEN_EMBEDDING, "embeddings".to_owned(), shape, &solved.compressed, None);
        walk::add(report, solved, store, &task)?;
        store.flush()
    }

    /// The reports and notes of all compressed layers.
    fn in_execution_order<'s>(&self, store: &'s Workspace) -> Result<Vec<(&'s LayerReport, &'s [String])>> {
        let mut reports: BTreeMap<String, _> =
            store.reports().map(|(report, notes)| (self.dense.ruled(&report.name), (report, notes))).collect();
        Ok(self.dense.infos()?.iter().filter_map(|info| reports.remove(&info.name)).collect())
    }
}
