//! The model's file: version, description and hashes.

use std::path::Path;

use prost::Message;
use sha2::{Digest, Sha256};

use super::blobs::Blobs;
use super::program::Checked;
use crate::coreml::description::feature_type;
use crate::coreml::package::{MODEL_HASH, SPECIFICATION, WEIGHTS_HASH};
use crate::coreml::proto::mil_spec::Program;
use crate::coreml::proto::specification::{FeatureDescription, Metadata, Model, model};
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
    let content = input::read(path, Limit::PROGRAM)?;
    let bytes = content.len() as u64;
    let mut model = Model::decode(&content[..]).map_err(|why| Error::bad_file(path, format!("not a Core ML model: {why}")))?;
    if model.specification_version != SPECIFICATION {
        let problem = format!("a specification of version {}; {SPECIFICATION} is expected", model.specification_version);
        return Err(Error::bad_file(path, problem));
    }
    let Some(model::Type::MlProgram(program)) = model.r#type.take() else {
        return Err(Error::bad_file(path, "not an ML Program"));
    };
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

    /// Whether program and weights have the hashes that were written with them; `false` if there are none.
    pub fn check_hashes(&self, blobs: &Blobs) -> Result<bool, String> {
        let (Some(of_weights), Some(of_model)) = (self.entry(WEIGHTS_HASH), self.entry(MODEL_HASH)) else { return Ok(false) };
        if of_weights != blobs.sha256 {
            return Err(format!("the weights are damaged: they do not have the hash that `{WEIGHTS_HASH}` says"));
        }
        let mut model = Model { r#type: Some(model::Type::MlProgram(self.program.clone())), ..self.model.clone() };
        let whole = model.encode_to_vec() == self.content;
        if let Some(metadata) = model.description.as_mut().and_then(|description| description.metadata.as_mut()) {
            metadata.user_defined.remove(MODEL_HASH);
        }
        if !whole || crate::coreml::hex(Sha256::new_with_prefix(model.encode_to_vec())) != of_model {
            return Err(format!("the program is damaged: it does not have the hash that `{MODEL_HASH}` says"));
        }
        Ok(true)
    }
}
