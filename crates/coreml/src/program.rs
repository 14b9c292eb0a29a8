//! Builds a program, operation by operation.

use std::collections::{BTreeMap, BTreeSet};

use half::f16;
use squeeze_base::error::{Error, Result};

use super::blob::BlobWriter;
use super::element::{ArrayType, Element};
use super::infer::infer;
use super::literal::{BLOB_FROM, Literal, immediate_bytes};
use super::operand::{Operand, Operands};
use super::proto::mil_spec::argument::{Binding, binding};
use super::proto::mil_spec::value::{BlobFileValue, Value as Kind};
use super::proto::mil_spec::{Argument, NamedValueType, Operation, Value};

/// How a program names its blob file.
pub(super) const BLOB_FILE: &str = "@model_path/weights/weight.bin";

/// The function of a program with one.
pub(super) const MAIN: &str = "main";

/// A value of the program by its name.
#[derive(Debug, Clone)]
pub(super) struct Var {
    pub name: String,
    pub operand: Operand,
}

impl Var {
    pub(crate) fn shape(&self) -> &[u64] {
        &self.operand.array.shape
    }

    /// The shape of a value that must have N dimensions.
    ///
    /// # Errors
    /// [`Error::Internal`] naming `layer`, which was given the value, if it has another number of
    /// them.
    pub(crate) fn dims<const N: usize>(&self, layer: &str) -> Result<[u64; N]> {
        let shape = self.shape();
        shape.try_into().map_err(|_| Error::internal(format!("`{layer}` is given {shape:?}, not {N} dimensions")))
    }
}

/// The argument of an operation's parameter.
pub(super) enum Arg<'a> {
    Var(&'a Var),
    Vars(&'a [&'a Var]),
    /// A constant, shared by all operations with an equal argument.
    Literal(Literal),
    /// A value inside the operation, as the parameters of `constexpr` operations have.
    Inline(ArrayType, Value),
    /// A small value inside the operation.
    InlineLiteral(Literal),
}

impl<'a> From<&'a Var> for Arg<'a> {
    fn from(var: &'a Var) -> Self {
        Arg::Var(var)
    }
}

impl From<Literal> for Arg<'_> {
    fn from(literal: Literal) -> Self {
        Arg::Literal(literal)
    }
}

/// The operations so far, in the order in which they run, and the blob file that their constants go
/// to.
#[derive(Debug)]
pub(super) struct ProgramBuilder {
    blobs: BlobWriter,
    operations: Vec<Operation>,
    names: BTreeSet<String>,
    literals: BTreeMap<String, Var>,
    vectors: BTreeMap<(Element, u16, u64), Var>,
}

impl ProgramBuilder {
    pub(crate) fn new(blobs: BlobWriter) -> Self {
        ProgramBuilder {
            blobs,
            operations: Vec::new(),
            names: BTreeSet::new(),
            literals: BTreeMap::new(),
            vectors: BTreeMap::new(),
        }
    }

    /// An input of the program.
    pub(crate) fn input(&mut self, name: &str, array: ArrayType) -> Var {
        Var { name: self.claim(name), operand: Operand::computed(array) }
    }

    /// An operation with one output, which has its name.
    ///
    /// # Errors
    /// [`Error::Internal`] if its parameters do not fit together; [`Error::Write`].
    pub(crate) fn op(&mut self, kind: &str, name: &str, parameters: &[(&'static str, Arg)]) -> Result<Var> {
        let mut outputs = self.ops(kind, name, parameters)?;
        match (outputs.pop(), outputs.pop()) {
            (Some(output), None) => Ok(output),
            _ => Err(Error::internal(format!("`{name}` ({kind}) does not have one output"))),
        }
    }

    /// An operation. Several outputs are called `name_0`, `name_1`, as coremltools calls them.
    ///
    /// # Errors
    /// As [`op`](Self::op).
    pub(crate) fn ops(&mut self, kind: &str, name: &str, parameters: &[(&'static str, Arg)]) -> Result<Vec<Var>> {
        let name = self.claim(name);
        let mut inputs = BTreeMap::new();
        let mut given: Vec<(&str, Vec<Operand>)> = Vec::new();
        for (parameter, arg) in parameters {
            let (bindings, operands) = match arg {
                Arg::Var(var) => (vec![bound(var)], vec![var.operand.clone()]),
                Arg::Vars(vars) => {
                    (vars.iter().map(|var| bound(var)).collect(), vars.iter().map(|var| var.operand.clone()).collect())
                }
                Arg::Literal(literal) => {
                    let var = self.literal(&format!("{name}_{parameter}"), literal);
                    (vec![bound(&var)], vec![var.operand])
                }
                Arg::Inline(array, value) => {
                    let binding = Binding { binding: Some(binding::Binding::Value(value.clone())) };
                    (vec![binding], vec![Operand { array: array.clone(), literal: None, constant: true, ones: None }])
                }
                Arg::InlineLiteral(literal) => {
                    let binding = Binding { binding: Some(binding::Binding::Value(literal.to_proto())) };
                    let (array, literal) = (literal.array_type(), Some(literal.clone()));
                    (vec![binding], vec![Operand { array, literal, constant: true, ones: None }])
                }
            };
            inputs.insert((*parameter).to_owned(), Argument { arguments: bindings });
            given.push((parameter, operands));
        }
        let operands = Operands(given.iter().map(|(name, operands)| (*name, operands.iter().collect())).collect());
        let types = infer(kind, &operands).map_err(|problem| Error::internal(format!("`{name}` ({kind}): {problem}")))?;
        let several = types.len() > 1;
        let constant = kind.starts_with("constexpr_");
        let outputs: Vec<Var> = types
            .into_iter()
            .enumerate()
            .map(|(i, array)| {
                let name = if several { self.claim(&format!("{name}_{i}")) } else { name.clone() };
                Var { name, operand: Operand { array, literal: None, constant, ones: None } }
            })
            .collect();
        self.push(kind, &name, inputs, &outputs, None);
        Ok(outputs)
    }

    /// A constant of fp16 values, of `shape`.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub(crate) fn halves(&mut self, name: &str, shape: &[u64], values: &[f16]) -> Result<Var> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, ArrayType::new(Element::F16, shape), &bytes)
    }

    /// A constant of fp32 values, of `shape`.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub(crate) fn floats(&mut self, name: &str, shape: &[u64], values: &[f32]) -> Result<Var> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, ArrayType::new(Element::F32, shape), &bytes)
    }

    /// A vector of `length` equal values in fp16 or fp32; equal vectors share one constant.
    ///
    /// # Errors
    /// [`Error::Internal`] for other dtypes; as [`data`](Self::data).
    pub(crate) fn repeated(&mut self, name: &str, element: Element, value: f16, length: u64) -> Result<Var> {
        let key = (element, value.to_bits(), length);
        if let Some(var) = self.vectors.get(&key) {
            return Ok(var.clone());
        }
        let var = match element {
            Element::F16 => self.halves(name, &[length], &vec![value; length as usize])?,
            Element::F32 => self.floats(name, &[length], &vec![value.to_f32(); length as usize])?,
            other => return Err(Error::internal(format!("`{name}` is asked for in {other}"))),
        };
        self.vectors.insert(key, var.clone());
        Ok(var)
    }

    /// The packed elements of an array as a value: in the program if they are few, in the blob file
    /// otherwise. Functions that share a blob file share equal values of equal names.
    ///
    /// # Errors
    /// [`Error::Internal`] if the bytes are not the array's; [`Error::Write`].
    pub(crate) fn data(&mut self, name: &str, array: &ArrayType, bytes: &[u8]) -> Result<Value> {
        if array.numel().is_some_and(|numel| numel < BLOB_FROM) {
            return Ok(immediate_bytes(array, bytes));
        }
        let offset = self.blobs.push(name, array, bytes)?;
        let place = BlobFileValue { file_name: BLOB_FILE.to_owned(), offset };
        Ok(Value { doc_string: String::new(), r#type: Some(array.to_proto()), value: Some(Kind::BlobFileValue(place)) })
    }

    fn constant(&mut self, name: &str, array: ArrayType, bytes: &[u8]) -> Result<Var> {
        let name = self.claim(name);
        let value = self.data(&name, &array, bytes)?;
        let operand = Operand { array, literal: None, constant: true, ones: None };
        let var = Var { name, operand };
        self.push("const", &var.name.clone(), BTreeMap::new(), std::slice::from_ref(&var), Some(value));
        Ok(var)
    }

    fn literal(&mut self, name: &str, literal: &Literal) -> Var {
        let key = format!("{literal:?}");
        if let Some(var) = self.literals.get(&key) {
            return var.clone();
        }
        let operand = Operand { array: literal.array_type(), literal: Some(literal.clone()), constant: true, ones: None };
        let var = Var { name: self.claim(name), operand };
        self.push("const", &var.name.clone(), BTreeMap::new(), std::slice::from_ref(&var), Some(literal.to_proto()));
        self.literals.insert(key, var.clone());
        var
    }

    /// Every operation has its name as its only attribute, a constant also its value.
    fn push(&mut self, kind: &str, name: &str, inputs: BTreeMap<String, Argument>, outputs: &[Var], value: Option<Value>) {
        let mut attributes = BTreeMap::from([("name".to_owned(), Literal::text(name).to_proto())]);
        attributes.extend(value.map(|value| ("val".to_owned(), value)));
        self.operations.push(Operation {
            r#type: kind.to_owned(),
            inputs,
            outputs: outputs.iter().map(declared).collect(),
            blocks: Vec::new(),
            attributes,
        });
    }

    /// An unused identifier made from `name`: letters, digits and underscores.
    fn claim(&mut self, name: &str) -> String {
        let plain = identifier(name);
        let mut claimed = plain.clone();
        let mut more = 1;
        while !self.names.insert(claimed.clone()) {
            more += 1;
            claimed = format!("{plain}_{more}");
        }
        claimed
    }

    /// The operations, and the blob file to finish.
    pub(crate) fn into_parts(self) -> (Vec<Operation>, BlobWriter) {
        (self.operations, self.blobs)
    }
}

/// A checkpoint name as an identifier of a program: letters, digits and underscores.
pub(super) fn identifier(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// A value's name and type.
pub(super) fn declared(var: &Var) -> NamedValueType {
    NamedValueType { name: var.name.clone(), r#type: Some(var.operand.array.to_proto()) }
}

fn bound(var: &Var) -> Binding {
    Binding { binding: Some(binding::Binding::Name(var.name.clone())) }
}
