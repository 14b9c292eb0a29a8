//! The content of a package, for tests that inspect or damage it.

use std::path::{Path, PathBuf};

use prost::Message;
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::value::immediate_value::Value as Immediate;
use sdxl_squeeze::coreml::proto::mil_spec::{Block, Operation, Program, Value as MilValue, ValueType, value_type};
use sdxl_squeeze::coreml::proto::specification::{Model, model};
use serde_json::Value;

/// The three files of a package.
#[derive(Clone)]
pub(super) struct Package {
    pub manifest: Value,
    pub model: Model,
    pub blobs: Vec<u8>,
}

pub(super) fn model_path(package: &Path) -> PathBuf {
    package.join("Data/com.apple.CoreML/model.mlmodel")
}

pub(super) fn blob_path(package: &Path) -> PathBuf {
    package.join("Data/com.apple.CoreML/weights/weight.bin")
}

impl Package {
    pub(super) fn read(path: &Path) -> Self {
        Package {
            manifest: serde_json::from_slice(&std::fs::read(path.join("Manifest.json")).unwrap()).unwrap(),
            model: Model::decode(&std::fs::read(model_path(path)).unwrap()[..]).unwrap(),
            blobs: std::fs::read(blob_path(path)).unwrap(),
        }
    }

    pub(super) fn write(&self, path: &Path) {
        std::fs::create_dir_all(blob_path(path).parent().unwrap()).unwrap();
        std::fs::write(path.join("Manifest.json"), format!("{:#}\n", self.manifest)).unwrap();
        std::fs::write(model_path(path), self.model.encode_to_vec()).unwrap();
        std::fs::write(blob_path(path), &self.blobs).unwrap();
    }

    /// Removes everything that identifies the writer of the package: metadata, and identifiers that
    /// are made from the program.
    pub(super) fn forget_maker(&mut self) {
        let metadata = self.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.user_defined.clear();
        metadata.version_string.clear();
        let text = self.manifest.to_string();
        let items = self.manifest["itemInfoEntries"].as_object().unwrap();
        let other = |number: usize| format!("226b7db2-a266-485a-9040-472cc97b83{number:02}");
        let renamed = items.keys().enumerate().fold(text, |text, (number, name)| text.replace(name, &other(number)));
        self.manifest = serde_json::from_str(&renamed).unwrap();
    }

    pub(super) fn program(&mut self) -> &mut Program {
        let Some(model::Type::MlProgram(program)) = &mut self.model.r#type else { panic!("not a program") };
        program
    }

    pub(super) fn block(&mut self) -> &mut Block {
        self.program().functions.get_mut("main").unwrap().block_specializations.get_mut("CoreML8").unwrap()
    }

    /// The package with the function `name` alone, as `main`.
    pub(super) fn only(&self, name: &str) -> Self {
        let mut package = self.clone();
        let function = package.program().functions.remove(name).unwrap();
        package.program().functions = [("main".to_owned(), function)].into();
        package
    }

    /// The first operation of a type.
    pub(super) fn op(&mut self, kind: &str) -> &mut Operation {
        self.block().operations.iter_mut().find(|op| op.r#type == kind).unwrap()
    }

    /// The operation that computes the value `name`.
    pub(super) fn named(&mut self, name: &str) -> &mut Operation {
        self.block().operations.iter_mut().find(|op| op.outputs[0].name == name).unwrap()
    }
}

/// The number of the dtype and the shape of a declared type.
pub(super) fn declared(value: Option<&ValueType>) -> (i32, Vec<i64>) {
    use sdxl_squeeze::coreml::proto::mil_spec::dimension::Dimension;
    let Some(value_type::Type::TensorType(tensor)) = value.and_then(|value| value.r#type.as_ref()) else { panic!("no array") };
    let size = |dimension: &Option<Dimension>| match dimension {
        Some(Dimension::Constant(constant)) => constant.size as i64,
        _ => panic!("a dimension that is not fixed"),
    };
    (tensor.data_type, tensor.dimensions.iter().map(|dimension| size(&dimension.dimension)).collect())
}

/// The bytes of a value, in the program or in the weight file.
pub(super) fn bytes_of(value: &MilValue, blobs: &[u8]) -> Vec<u8> {
    match value.value.as_ref().unwrap() {
        Kind::BlobFileValue(place) => {
            let number = |from: usize| {
                let at = place.offset as usize + from;
                u64::from_le_bytes(blobs[at..at + 8].try_into().unwrap()) as usize
            };
            blobs[number(16)..number(16) + number(8)].to_vec()
        }
        Kind::ImmediateValue(value) => match &value.value {
            Some(Immediate::Tensor(tensor)) => match tensor.value.as_ref().unwrap() {
                Content::Bytes(list) => list.values.clone(),
                Content::Ints(list) => list.values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        },
    }
}
