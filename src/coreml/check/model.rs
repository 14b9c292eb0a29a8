//! The model's file: version, description and hashes.

use std::path::Path;

use prost::Message;

use super::blobs::Blobs;
use super::program::Checked;
use crate::coreml::description::feature_type;
use crate::coreml::manifest::manifest;
use crate::coreml::package::{MAKER, MODEL_HASH, SPECIFICATION, UNET_CONFIG, WEIGHTS_HASH};
use crate::coreml::proto::mil_spec::Program;
use crate::coreml::proto::specification::{FeatureDescription, Metadata, Model, model};
use crate::digest;
use crate::error::{Error, Result};
use crate::input::{self, Limit};

/// A model's file.
pub struct ModelFile {
    model: Model,
    program: Program,
    content: Vec<u8>,
    pub bytes: u64,
}

/// Reads the file `path`.
pub fn read(path: &Path) -> Result<ModelFile> {
    parse(path, input::read(path, Limit::PROGRAM)?)
}

/// Takes apart what was read from `path`.
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
    pub fn program(&self) -> &Program {
        &self.program
    }

    pub fn version(&self) -> i32 {
        self.model.specification_version
    }

    /// The value of an entry of the model's own metadata.
    pub fn entry(&self, key: &str) -> Option<&str> {
        self.metadata()?.user_defined.get(key).map(String::as_str)
    }

    fn metadata(&self) -> Option<&Metadata> {
        self.model.description.as_ref()?.metadata.as_ref()
    }

    /// Whether the description has the program's inputs and outputs.
    pub fn check_description(&self, program: &Checked) -> Result<(), String> {
        let description = self.model.description.as_ref().ok_or("the model has no description")?;
        for (what, described, made) in
            [("input", &description.input, &program.inputs), ("output", &description.output, &program.outputs)]
        {
            let same = |(feature, (name, array)): (&FeatureDescription, &(String, _))| {
                feature.name == *name && feature.r#type.as_ref() == Some(&feature_type(array))
            };
            if described.len() != made.len() || !described.iter().zip(made).all(same) {
                let made: Vec<String> = made.iter().map(|(name, array)| format!("{name}: {array}")).collect();
                return Err(format!("the description's {what}s are not the program's: {}", made.join(", ")));
            }
        }
        Ok(())
    }

    /// Whether this library's name stands anywhere in the file. It does some ten times in a model
    /// of ours, in keys and values of the metadata: so that is seen even if a damaged byte has made
    /// the parser pass over the metadata, or a key another key.
    pub fn names_maker(&self) -> bool {
        self.content.windows(MAKER.len()).any(|window| window == MAKER.as_bytes())
    }

    /// Whether a package of ours has all entries that it must have, and its program the hash that
    /// was written with it.
    pub fn check_own_hash(&self) -> Result<(), String> {
        let (of_model, ..) = (self.required(MODEL_HASH)?, self.required(WEIGHTS_HASH)?, self.required(UNET_CONFIG)?);
        let mut model = Model { r#type: Some(model::Type::MlProgram(self.program.clone())), ..self.model.clone() };
        let whole = model.encode_to_vec() == self.content;
        if let Some(metadata) = model.description.as_mut().and_then(|description| description.metadata.as_mut()) {
            metadata.user_defined.remove(MODEL_HASH);
        }
        if !whole || digest::of_bytes(&model.encode_to_vec()) != of_model {
            return Err(format!("the program is damaged: it does not have the hash that `{MODEL_HASH}` says"));
        }
        Ok(())
    }

    /// Whether the weights of a package of ours have the hash that was written with them.
    pub fn check_weights_hash(&self, blobs: &Blobs) -> Result<(), String> {
        if self.required(WEIGHTS_HASH)? != blobs.sha256 {
            return Err(format!("the weights are damaged: they do not have the hash that `{WEIGHTS_HASH}` says"));
        }
        Ok(())
    }

    fn required(&self, key: &str) -> Result<&str, String> {
        self.entry(key).ok_or_else(|| format!("the metadata is damaged: it lacks `{key}`"))
    }

    /// Whether `text` is the manifest that is written with this model.
    pub fn check_manifest(&self, text: &str) -> Result<(), String> {
        if text == manifest(&self.content) {
            Ok(())
        } else {
            Err("Manifest.json is not what was written with this program".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::coreml::proto::mil_spec::{Function, NamedValueType};
    use crate::coreml::proto::specification::ModelDescription;

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

    /// Not one bit makes a package of ours look like another writer's, and not one is taken for
    /// good.
    #[test]
    fn every_flipped_bit_is_found() {
        let whole = small();
        let good = parse(Path::new("m"), whole.clone()).unwrap();
        assert!(good.names_maker());
        good.check_own_hash().unwrap();
        let text = manifest(&whole);
        good.check_manifest(&text).unwrap();
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Ok(model) = parse(Path::new("m"), damaged) else { continue };
            assert!(model.names_maker(), "bit {bit}");
            assert!(model.check_own_hash().is_err() && model.check_manifest(&text).is_err(), "bit {bit}");
        }
    }
}
