//! The identity of a run: the program, the config, and the content of every file that the run
//! reads.

use sdxl_model::checkpoint::{SafetensorsFile, SourceFile, Weights};
use sdxl_pipeline::{DenseUnet, PipelineFolder};
use serde_json::{Map, Value, json};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};

use crate::calibration::Samples;
use crate::config::{BudgetSection, BudgetTarget, CalibrationSection, Prompts, RunConfig, read_prompts};
use crate::recipe::RunOptions;

/// A hash of the sources that this program was compiled from, 16 hex digits.
pub const BUILD: &str = env!("SDXL_SQUEEZE_BUILD");

/// The files that a run reads besides its model. Each is read once, at the beginning, so that the
/// run uses exactly the content that its identity names.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// The prompts of the calibration; empty if they are not needed.
    pub prompts: Vec<String>,
    /// The captions of the calibration; empty if there are none or they are not needed.
    pub captions: Vec<String>,
    /// The prompts that the UNet is tuned with; empty if it is not tuned.
    pub tuning_prompts: Vec<String>,
    /// Samples from a file.
    pub samples: Option<Samples>,
    /// The files that prompts and captions are encoded with; empty if nothing is encoded.
    prompt_files: Vec<SourceFile>,
    entries: Map<String, Value>,
}

impl Inputs {
    /// Reads the files that `config` names. `given` are samples that the caller has; `needed` says
    /// whether any layer needs samples.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(super) fn read(unet: DenseUnet<'_>, config: &RunConfig, given: Option<&Samples>, needed: bool) -> Result<Self> {
        let section = &config.calibration;
        let mut inputs = Inputs::default();
        let mut add = |key: &str, value: Value| inputs.entries.insert(key.to_owned(), value);
        match (given, &section.samples) {
            (Some(given), _) if !given.calls.is_empty() => {
                add("samples", json!(digest::of_bytes(&given.to_bytes()?)));
            }
            (None, Some(path)) if needed => {
                let file = SafetensorsFile::open(path)?;
                add("samples", json!(file.sha256()?));
                inputs.samples = Some(Samples::from_file(&file, unet.chain().config(), section.calibration_nsamples)?);
            }
            _ => {}
        }
        if needed && section.samples.is_none() {
            inputs.prompts = section.prompts.load()?;
            inputs.entries.insert("prompts".to_owned(), json!(of_lines(&inputs.prompts)));
        }
        if let (Some(path), true) = (&section.captions, needed) {
            inputs.captions = read_prompts(path)?;
            inputs.entries.insert("captions".to_owned(), json!(of_lines(&inputs.captions)));
        }
        if let Some(tune) = &config.tune {
            inputs.tuning_prompts = tune.prompts.as_ref().unwrap_or(&section.prompts).load()?;
            inputs.entries.insert(TUNING_PROMPTS.to_owned(), json!(of_lines(&inputs.tuning_prompts)));
        }
        let encodes = !inputs.captions.is_empty() || !inputs.tuning_prompts.is_empty();
        // The caller's samples have been encoded already.
        if (given.is_none() && !inputs.prompts.is_empty()) || encodes {
            inputs.prompt_files = unet.pipeline("the encoding of prompts")?.prompt_files()?;
            inputs.entries.insert(ENCODERS.to_owned(), json!(inputs.prompt_files));
        }
        Ok(inputs)
    }

    /// Checks that text encoders, tokenizers and their configs have not changed since the
    /// beginning. They are opened when they are used, which for captions may be an hour later, so
    /// this is called after they have been used.
    ///
    /// # Errors
    /// [`Error::Changed`] naming the first file that is another, or not there any more;
    /// [`Error::Read`].
    pub(super) fn check_prompt_files(&self, folder: &PipelineFolder) -> Result<()> {
        if self.prompt_files.is_empty() {
            return Ok(());
        }
        let now = folder.prompt_files()?;
        match self.prompt_files.iter().find(|file| !now.contains(file)) {
            Some(file) => Err(Error::Changed { path: folder.path_of(file) }),
            None => Ok(()),
        }
    }

    /// The section with the prompts in the place of the file that they were read from.
    pub(super) fn section(&self, section: &CalibrationSection) -> CalibrationSection {
        let prompts = if self.prompts.is_empty() { section.prompts.clone() } else { Prompts::List(self.prompts.clone()) };
        CalibrationSection { prompts, ..section.clone() }
    }

    /// The config as the result records it: with the names of files and the hashes of their texts,
    /// without the folders of a user.
    pub(super) fn recipe(&self, config: &RunConfig) -> Value {
        let mut recipe = config.without_folders().to_json();
        let mut hashes = self.entries.clone();
        hashes.remove(ENCODERS);
        if config.calibration.samples.is_none() {
            // The caller has drawn these from the prompts, as the run itself would.
            hashes.remove("samples");
        }
        if !hashes.is_empty() {
            recipe["sha256"] = Value::Object(hashes);
        }
        recipe
    }

    /// Everything that a result depends on, entry by entry, for
    /// [`Workspace`](super::workspace::Workspace).
    pub(super) fn identity(&self, config: &RunConfig, sources: &[SourceFile], options: &RunOptions) -> Map<String, Value> {
        let mut identity = Map::from_iter([
            ("version".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
            ("build".to_owned(), json!(BUILD)),
            ("config".to_owned(), json!(config.to_yaml())),
            ("model".to_owned(), json!(sources)),
            ("device and dtype".to_owned(), json!(format!("{:?} {:?}", options.devices.as_slice(), options.kind))),
        ]);
        identity.extend(self.entries.clone());
        identity
    }

    /// A hash of everything that the prices of a budget's settings depend on: what
    /// [`identity`](Self::identity) has, but for the budget's target and for tuning, which comes
    /// after.
    ///
    /// # Errors
    /// [`Error::Internal`] if it cannot be written as JSON.
    pub(super) fn identity_of_prices(&self, config: &RunConfig, sources: &[SourceFile], options: &RunOptions) -> Result<String> {
        let measured = RunConfig { tune: None, ..of_any_size(config) };
        let mut identity = self.identity(&measured, sources, options);
        identity.remove(TUNING_PROMPTS);
        let text =
            serde_json::to_vec(&identity).map_err(|why| Error::internal(format!("an identity cannot be written: {why}")))?;
        Ok(digest::of_bytes(&text))
    }
}

/// The config with one and the same target, whatever target its budget has.
pub(super) fn of_any_size(config: &RunConfig) -> RunConfig {
    let any = |budget: &BudgetSection| budget.with_size(BudgetTarget::Bits(1.0));
    RunConfig { budget: config.budget.as_ref().map(any), ..config.clone() }
}

/// The entry with the hash of the prompts that the UNet is tuned with.
const TUNING_PROMPTS: &str = "tuning prompts";

/// The entry with the files that encode prompts.
const ENCODERS: &str = "text encoders and scheduler";

/// The hash of a list of texts.
fn of_lines(texts: &[String]) -> String {
    digest::of_bytes(json!(texts).to_string().as_bytes())
}

/// The files that the UNet comes from, with their hashes. They are read from beginning to end, and
/// every value is checked, so that a model that a container cannot hold is refused before any layer
/// is compressed.
///
/// # Errors
/// As [`Weights::survey`].
pub(super) fn sources_of(unet: DenseUnet<'_>, weights: &Weights, progress: &dyn Progress) -> Result<Vec<SourceFile>> {
    let task = Task::begin(progress, "checking the model", "files", weights.files().count());
    let files = weights.survey(unet.folder(), |name| task.advance(name))?;
    Ok(unet.config_file().cloned().into_iter().chain(files).chain(unet.lora_files()?).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use squeeze_base::progress::Silent;
    use tch::Kind;

    use super::*;
    use crate::synth::{Preset, synthesize};

    #[test]
    fn what_encodes_prompts_must_stay_what_it_was() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("model");
        synthesize(Preset::Tiny, &root, 0, Kind::Half, &Silent).unwrap();
        let folder = PipelineFolder::open(&root).unwrap();
        let yaml = b"prune: {global_config: {target_sparsity: 0.5}}\ncalibration: {prompts: [a, b]}\n";
        let config = RunConfig::parse(Path::new("c.yaml"), yaml).unwrap();
        let inputs = Inputs::read((&folder).into(), &config, None, true).unwrap();
        inputs.check_prompt_files(&folder).unwrap();
        assert_eq!(inputs.prompts, ["a", "b"]);
        let identity = |options: &RunOptions| inputs.identity(&config, &[], options);
        let options = RunOptions { devices: tch::Device::Cpu.into(), kind: Kind::Float, budget: None, resume: false };
        assert_ne!(identity(&options), identity(&RunOptions { kind: Kind::Half, ..options.clone() }));
        assert_eq!(identity(&options)["build"], json!(BUILD));
        for name in ["text_encoder_2/model.safetensors", "tokenizer/merges.txt", "model_index.json"] {
            let path = root.join(name);
            let before = std::fs::read(&path).unwrap();
            // Another file takes the name: whoever opens it now reads something else.
            let mut other = before.clone();
            *other.last_mut().unwrap() ^= 1;
            let beside = root.join("other");
            std::fs::write(&beside, other).unwrap();
            std::fs::rename(&beside, &path).unwrap();
            let why = inputs.check_prompt_files(&folder).unwrap_err();
            assert!(matches!(&why, Error::Changed { path: named } if *named == path), "{why}");
            std::fs::write(&path, before).unwrap();
        }
        inputs.check_prompt_files(&folder).unwrap();
        // A run that reads no prompts does not depend on them.
        assert_eq!(Inputs::read((&folder).into(), &config, None, false).unwrap().entries.len(), 0);
    }
}
