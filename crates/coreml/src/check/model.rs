//! The model's file: version, description and hashes.

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};

use super::blobs::Blobs;
use super::program::Checked;
use crate::description::feature_type;
use crate::manifest::manifest;
use crate::package::{CONFIGS, MAKER, MODEL_HASH, SPECIFICATION, UNET_CONFIG, WEIGHTS_HASH};
use crate::program::MAIN;
use crate::proto::mil_spec::Program;
use crate::proto::specification::{FeatureDescription, FunctionDescription, Metadata, Model, model};

/// A model's file.
pub(super) struct ModelFile {
    model: Model,
    program: Program,
    content: Vec<u8>,
    pub bytes: u64,
}

/// Reads the file `path`.
pub(super) fn read(path: &Path) -> Result<ModelFile> {
    parse(path, input::read(path, Limit::PROGRAM)?)
}

/// Parses the `content` of the file `path`.
fn parse(path: &Path, content: Vec<u8>) -> Result<ModelFile> {
    let mut model = Model::decode(&content[..]).map_err(|why| Error::bad_file(path, format!("not a Core ML model: {why}")))?;
    if model.specification_version != SPECIFICATION {
        let problem = format!("a specification of version {}; {SPECIFICATION} is expected", model.specification_version);
        return Err(Error::bad_file(path, problem));
    }
    let Some(model::Type::MlProgram(program)) = model.r#type.take() else {
        return Err(Error::bad_file(path, "not an ML Program"));
    };
    let bytes = content.len() as u64;
    Ok(ModelFile { model, program, content, bytes })
}

impl ModelFile {
    pub(super) fn program(&self) -> &Program {
        &self.program
    }

    pub(super) fn version(&self) -> i32 {
        self.model.specification_version
    }

    /// The value of an entry of the model's own metadata.
    pub(super) fn entry(&self, key: &str) -> Option<&str> {
        self.metadata()?.user_defined.get(key).map(String::as_str)
    }

    fn metadata(&self) -> Option<&Metadata> {
        self.model.description.as_ref()?.metadata.as_ref()
    }

    /// The names of the functions, the default one first: `main`, or those of the description,
    /// which must be the program's.
    pub(super) fn functions(&self) -> Result<Vec<String>, String> {
        let (described, default, own) = match &self.model.description {
            Some(description) => {
                let own = description.input.len() + description.output.len();
                (&description.functions[..], description.default_function_name.as_str(), own)
            }
            None => (&[][..], "", 0),
        };
        let mut names: Vec<String> = described.iter().map(|function| function.name.clone()).collect();
        if names.is_empty() {
            if !default.is_empty() {
                return Err(format!("the default function is `{default}`, but no functions are described"));
            }
            names.push(MAIN.to_owned());
        } else if own > 0 {
            return Err("the description has inputs or outputs beside those of its functions".into());
        } else {
            let at = names.iter().position(|name| name == default);
            let at = at.ok_or_else(|| format!("the default function `{default}` is none of {names:?}"))?;
            names[..=at].rotate_right(1);
        }
        let mut sorted: Vec<&String> = names.iter().collect();
        sorted.sort();
        if !sorted.iter().copied().eq(self.program.functions.keys()) {
            let found: Vec<&String> = self.program.functions.keys().collect();
            return Err(format!("the program's functions are {found:?}, not {sorted:?}"));
        }
        Ok(names)
    }

    /// Whether the description has the inputs and outputs of the function `name`.
    pub(super) fn check_description(&self, name: &str, program: &Checked) -> Result<(), String> {
        let description = self.model.description.as_ref().ok_or("the model has no description")?;
        let function = description.functions.iter().find(|function| function.name == name);
        let (inputs, outputs) = match function {
            Some(FunctionDescription { input, output, .. }) => (input, output),
            None => (&description.input, &description.output),
        };
        for (end, described, computed) in [("input", inputs, &program.inputs), ("output", outputs, &program.outputs)] {
            let same = |(feature, (name, array)): (&FeatureDescription, &(String, _))| {
                feature.name == *name && feature.r#type.as_ref() == Some(&feature_type(array))
            };
            if described.len() != computed.len() || !described.iter().zip(computed).all(same) {
                let computed: Vec<String> = computed.iter().map(|(name, array)| format!("{name}: {array}")).collect();
                return Err(format!("the description's {end}s are not the program's: {}", computed.join(", ")));
            }
        }
        Ok(())
    }

    /// Whether this library's name occurs anywhere in the file. In this library's packages it
    /// occurs some ten times, in keys and values of the metadata, so that it is found even if a
    /// damaged byte makes the parser skip the metadata or changes a key.
    pub(super) fn names_maker(&self) -> bool {
        self.content.windows(MAKER.len()).any(|window| window == MAKER.as_bytes())
    }

    /// Checks that a package of this library has all required entries, and the hash of its program.
    /// The model is afterwards as before: it is lent to the check, because a program with several
    /// functions takes hundreds of megabytes and a copy of it as much again.
    pub(super) fn check_own_hash(&mut self) -> Result<(), String> {
        let of_model = self.required(MODEL_HASH)?.to_owned();
        self.required(WEIGHTS_HASH)?;
        if CONFIGS.iter().all(|key| self.entry(key).is_none()) {
            return Err(format!("the metadata is damaged: it lacks `{UNET_CONFIG}`, or the config of another network"));
        }
        let mut model = std::mem::take(&mut self.model);
        model.r#type = Some(model::Type::MlProgram(std::mem::take(&mut self.program)));
        let whole = model.encode_to_vec() == self.content;
        let hash = own_entries(&mut model).and_then(|entries| entries.remove(MODEL_HASH));
        let computed = digest::of_bytes(&model.encode_to_vec());
        if let (Some(entries), Some(hash)) = (own_entries(&mut model), hash) {
            entries.insert(MODEL_HASH.to_owned(), hash);
        }
        if let Some(model::Type::MlProgram(program)) = model.r#type.take() {
            self.program = program;
        }
        self.model = model;
        if !whole || computed != of_model {
            return Err(format!("the program is damaged: it does not have the hash that `{MODEL_HASH}` says"));
        }
        Ok(())
    }

    /// Checks the hash of the weights of a package of this library.
    pub(super) fn check_weights_hash(&self, blobs: &Blobs) -> Result<(), String> {
        if self.required(WEIGHTS_HASH)? != blobs.sha256 {
            return Err(format!("the weights are damaged: they do not have the hash that `{WEIGHTS_HASH}` says"));
        }
        Ok(())
    }

    fn required(&self, key: &str) -> Result<&str, String> {
        self.entry(key).ok_or_else(|| format!("the metadata is damaged: it lacks `{key}`"))
    }

    /// Checks that `text` is this model's manifest.
    pub(super) fn check_manifest(&self, text: &str) -> Result<(), String> {
        if text == manifest(&self.content) {
            Ok(())
        } else {
            Err("Manifest.json is not what was written with this program".into())
        }
    }
}

/// The entries of a model's own metadata.
fn own_entries(model: &mut Model) -> Option<&mut BTreeMap<String, String>> {
    Some(&mut model.description.as_mut()?.metadata.as_mut()?.user_defined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::mil_spec::{Function, NamedValueType};
    use crate::proto::specification::ModelDescription;

    /// A model with metadata as a package has it, and next to no program.
    fn small() -> Vec<u8> {
        let function = Function {
            inputs: vec![NamedValueType { name: "sample".into(), r#type: None }],
            opset: "CoreML8".into(),
            ..Function::default()
        };
        let program = Program { version: 1, functions: BTreeMap::from([("main".to_owned(), function)]), ..Program::default() };
        let keys = [WEIGHTS_HASH, UNET_CONFIG, "sdxl-squeeze.layout", "sdxl-squeeze.io", "sdxl-squeeze.sizes"];
        let metadata = Metadata {
            short_description: "The UNet".into(),
            version_string: format!("{MAKER} 1"),
            user_defined: keys.iter().map(|key| ((*key).to_owned(), "0123456789abcdef".to_owned())).collect(),
            ..Metadata::default()
        };
        let mut model = Model {
            specification_version: SPECIFICATION,
            description: Some(ModelDescription { metadata: Some(metadata.clone()), ..ModelDescription::default() }),
            r#type: Some(model::Type::MlProgram(program)),
        };
        let hash = digest::of_bytes(&model.encode_to_vec());
        let with_hash = metadata.user_defined.into_iter().chain([(MODEL_HASH.to_owned(), hash)]).collect();
        model.description.as_mut().unwrap().metadata.as_mut().unwrap().user_defined = with_hash;
        model.encode_to_vec()
    }

    /// Every flipped bit is found, and none makes a package of this library look like another
    /// writer's.
    #[test]
    fn every_flipped_bit_is_found() {
        let whole = small();
        let mut good = parse(Path::new("m"), whole.clone()).unwrap();
        assert!(good.names_maker());
        good.check_own_hash().unwrap();
        let text = manifest(&whole);
        good.check_manifest(&text).unwrap();
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Ok(mut model) = parse(Path::new("m"), damaged) else { continue };
            assert!(model.names_maker(), "bit {bit}");
            assert!(model.check_own_hash().is_err() && model.check_manifest(&text).is_err(), "bit {bit}");
        }
    }
}
