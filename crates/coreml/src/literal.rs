//! Values that are part of the program itself.

use half::f16;
use squeeze_base::error::{Error, Result};

use super::element::{ArrayType, Element};
use super::proto::mil_spec::tensor_value::{
    RepeatedBools, RepeatedBytes, RepeatedFloats, RepeatedInts, RepeatedStrings, Value as Content,
};
use super::proto::mil_spec::value::{ImmediateValue, Value as Kind, immediate_value};
use super::proto::mil_spec::{TensorValue, Value};

/// The number of elements from which on an array goes to the blob file (coremltools:
/// `backend/mil/load.py`, `should_use_weight_file`).
pub(super) const BLOB_FROM: u64 = 10;

/// A small constant: a parameter of an operation.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Literal {
    Bool(bool),
    Bools(Vec<bool>),
    Int(i32),
    Ints(Vec<i32>),
    Half(f16),
    Float(f32),
    Text(String),
}

impl Literal {
    pub(crate) fn text(text: &str) -> Self {
        Literal::Text(text.to_owned())
    }

    /// Sizes as integers.
    ///
    /// # Errors
    /// [`Error::Range`] if one is beyond 32 bits.
    pub(crate) fn sizes(sizes: &[u64]) -> Result<Self> {
        let int = |n: &u64| i32::try_from(*n).map_err(|_| Error::range("a dimension", n, "within Core ML's 32 bits"));
        sizes.iter().map(int).collect::<Result<_>>().map(Literal::Ints)
    }

    /// Its type.
    pub(crate) fn array_type(&self) -> ArrayType {
        let list = |n: usize| vec![n as u64];
        let (element, shape) = match self {
            Literal::Bool(_) => (Element::Bool, vec![]),
            Literal::Bools(values) => (Element::Bool, list(values.len())),
            Literal::Int(_) => (Element::I32, vec![]),
            Literal::Ints(values) => (Element::I32, list(values.len())),
            Literal::Half(_) => (Element::F16, vec![]),
            Literal::Float(_) => (Element::F32, vec![]),
            Literal::Text(_) => (Element::Text, vec![]),
        };
        ArrayType { element, shape }
    }

    /// Its form in a program.
    pub(crate) fn to_proto(&self) -> Value {
        let content = match self {
            Literal::Bool(value) => Content::Bools(RepeatedBools { values: vec![*value] }),
            Literal::Bools(values) => Content::Bools(RepeatedBools { values: values.clone() }),
            Literal::Int(value) => Content::Ints(RepeatedInts { values: vec![*value] }),
            Literal::Ints(values) => Content::Ints(RepeatedInts { values: values.clone() }),
            // fp16 has no field in the protobuf message: it is kept as bytes (coremltools:
            // `backend/mil/helper.py`).
            Literal::Half(value) => Content::Bytes(RepeatedBytes { values: value.to_le_bytes().to_vec() }),
            Literal::Float(value) => Content::Floats(RepeatedFloats { values: vec![*value] }),
            Literal::Text(text) => Content::Strings(RepeatedStrings { values: vec![text.clone()] }),
        };
        immediate(&self.array_type(), content)
    }

    /// The literal of a program's value; `None` if the value is no parameter, such as a weight.
    pub(crate) fn of_content(array: &ArrayType, content: &Content) -> Option<Self> {
        Some(match (array.element, array.shape.len(), content) {
            (Element::Bool, 0, Content::Bools(list)) => Literal::Bool(*list.values.first()?),
            (Element::Bool, 1, Content::Bools(list)) => Literal::Bools(list.values.clone()),
            (Element::I32, 0, Content::Ints(list)) => Literal::Int(*list.values.first()?),
            (Element::I32, 1, Content::Ints(list)) => Literal::Ints(list.values.clone()),
            (Element::F16, 0, Content::Bytes(list)) => {
                Literal::Half(f16::from_le_bytes([*list.values.first()?, *list.values.get(1)?]))
            }
            (Element::F32, 0, Content::Floats(list)) => Literal::Float(*list.values.first()?),
            (Element::Text, 0, Content::Strings(list)) => Literal::Text(list.values.first()?.clone()),
            _ => return None,
        })
    }
}

/// A value inside the program.
pub(super) fn immediate(array: &ArrayType, content: Content) -> Value {
    let value = immediate_value::Value::Tensor(TensorValue { value: Some(content) });
    Value {
        doc_string: String::new(),
        r#type: Some(array.to_proto()),
        value: Some(Kind::ImmediateValue(ImmediateValue { value: Some(value) })),
    }
}

/// The value of an array with fewer than [`BLOB_FROM`] elements, given as bytes.
pub(super) fn immediate_bytes(array: &ArrayType, bytes: &[u8]) -> Value {
    let content = match array.element {
        Element::F32 => {
            let (quads, _) = bytes.as_chunks::<4>();
            Content::Floats(RepeatedFloats { values: quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect() })
        }
        Element::F16 | Element::I32 | Element::Unsigned(_) | Element::Bool | Element::Text => {
            Content::Bytes(RepeatedBytes { values: bytes.to_vec() })
        }
    };
    immediate(array, content)
}
