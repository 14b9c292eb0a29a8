//! Checks the operations in order: each reads only earlier values, has exactly its parameters, and
//! declares the types that are inferred.

use std::collections::{BTreeMap, BTreeSet};

use super::blobs::Blobs;
use super::values::operand;
use crate::element::ArrayType;
use crate::infer::infer;
use crate::literal::Literal;
use crate::operand::{Operand, Operands};
use crate::package::OPSET;
use crate::proto::mil_spec::argument::binding::Binding;
use crate::proto::mil_spec::{NamedValueType, Operation, Program};

/// The facts about a checked function of a program.
#[derive(Debug, Default)]
pub(super) struct Checked {
    /// Inputs, in order.
    pub inputs: Vec<(String, ArrayType)>,
    /// Outputs, in order.
    pub outputs: Vec<(String, ArrayType)>,
    /// Everything that has a name.
    pub values: BTreeMap<String, Operand>,
    /// The weights, biases and tables of each operation.
    pub weights: BTreeMap<String, Vec<String>>,
    /// Records of the blob file that are used.
    pub blobs: BTreeSet<u64>,
    /// The records of each operation that holds values in the blob file, by its first output.
    pub records: BTreeMap<String, Vec<u64>>,
    pub operations: usize,
    pub compressed: usize,
    pub compressed_elements: u64,
    pub pruned: u64,
    /// Weights with vector palettes.
    pub vectors: usize,
    /// For each output of a `constexpr_lut_to_sparse`, the name of the operation.
    pairs: BTreeMap<String, String>,
}

/// Checks the function `name` of the program.
pub(super) fn check(program: &Program, name: &str, blobs: &Blobs) -> Result<Checked, String> {
    if program.version != 1 {
        return Err(format!("a program of version {}", program.version));
    }
    if let Some(strange) = program.attributes.keys().find(|key| *key != "buildInfo") {
        return Err(format!("the program has the attribute `{strange}`"));
    }
    let function = program.functions.get(name).ok_or_else(|| format!("the program has no function `{name}`"))?;
    if function.opset != OPSET {
        return Err(format!("the operator set is `{}`, not {OPSET}", function.opset));
    }
    let Some(block) = function.block_specializations.get(OPSET) else {
        return Err(format!("there is no block for {OPSET}"));
    };
    if !function.attributes.is_empty() || !block.attributes.is_empty() || !block.inputs.is_empty() {
        return Err("the function or its block has attributes or inputs that coremltools does not read".into());
    }
    let mut checked = Checked::default();
    for input in &function.inputs {
        let array = declared(input)?;
        checked.name(&input.name, Operand::computed(array.clone()))?;
        checked.inputs.push((input.name.clone(), array));
    }
    for operation in &block.operations {
        let name = operation.outputs.first().map_or("", |output| output.name.as_str());
        checked.operation(operation, blobs).map_err(|problem| format!("`{name}` ({}): {problem}", operation.r#type))?;
    }
    for name in &block.outputs {
        let output = checked.values.get(name).ok_or_else(|| format!("the output `{name}` is never made"))?;
        if output.constant || function.inputs.iter().any(|input| input.name == *name) {
            return Err(format!("the output `{name}` is not computed"));
        }
        checked.outputs.push((name.clone(), output.array.clone()));
    }
    if checked.outputs.is_empty() {
        return Err("the program has no output".into());
    }
    Ok(checked)
}

/// An input's or output's declared type.
fn declared(value: &NamedValueType) -> Result<ArrayType, String> {
    ArrayType::of_proto(value.r#type.as_ref()).map_err(|problem| format!("`{}` {problem}", value.name))
}

/// The values in an entry of the operation's look-up table.
fn vector_length(operands: &Operands) -> Result<u64, String> {
    Ok(operands.shape("lut")?.last().copied().unwrap_or(1))
}

/// The set bits of the mask of elements that a `constexpr_lut_to_sparse` makes from its mask of
/// vectors.
fn ones_of_elements(operands: &Operands) -> Result<Option<u64>, String> {
    let ones = operands.one("indices_mask")?.ones;
    let length = vector_length(operands)?;
    ones.map(|ones| ones.checked_mul(length).ok_or_else(|| "the mask is too large".to_owned())).transpose()
}

impl Checked {
    fn operation(&mut self, operation: &Operation, blobs: &Blobs) -> Result<(), String> {
        let Operation { r#type: kind, inputs, outputs, blocks, attributes } = operation;
        if !blocks.is_empty() {
            return Err("has blocks".into());
        }
        let constant = kind == "const";
        let expected: &[&str] = if constant { &["name", "val"] } else { &["name"] };
        if !attributes.keys().eq(expected.iter().copied()) {
            return Err(format!("has the attributes {:?}, not {expected:?}", attributes.keys().collect::<Vec<_>>()));
        }
        if !matches!(attributes.get("name").map(|value| operand(value, blobs)), Some(Ok((name, _))) if matches!(name.literal, Some(Literal::Text(_))))
        {
            return Err("has no name".into());
        }
        let types = outputs.iter().map(declared).collect::<Result<Vec<_>, _>>()?;
        if constant {
            let ([output], [array], true) = (&outputs[..], &types[..], inputs.is_empty()) else {
                return Err("must have one output and no inputs".into());
            };
            let value = attributes.get("val").ok_or("has no value")?;
            let (operand, blob) = operand(value, blobs)?;
            self.record(&output.name, blob);
            if operand.array != *array {
                return Err(format!("says it is {array}, but is {}", operand.array));
            }
            return self.name(&output.name, operand);
        }

        let mut given: Vec<(&str, Vec<Operand>)> = Vec::new();
        let mut bound: BTreeMap<&str, &str> = BTreeMap::new();
        for (parameter, argument) in inputs {
            let mut operands = Vec::new();
            for binding in &argument.arguments {
                operands.push(match &binding.binding {
                    Some(Binding::Name(name)) => {
                        bound.insert(parameter, name);
                        self.values.get(name).cloned().ok_or_else(|| format!("reads `{name}`, which is not there yet"))?
                    }
                    Some(Binding::Value(value)) => {
                        let (operand, blob) = operand(value, blobs).map_err(|problem| format!("`{parameter}` {problem}"))?;
                        self.record(outputs.first().map_or("", |output| &output.name), blob);
                        operand
                    }
                    None => return Err(format!("`{parameter}` is bound to nothing")),
                });
            }
            given.push((parameter, operands));
        }
        let operands = Operands(given.iter().map(|(name, operands)| (*name, operands.iter().collect())).collect());
        let inferred = infer(kind, &operands)?;
        if inferred != types {
            let list = |types: &[ArrayType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(format!("says that it makes {}, but makes {}", list(&types), list(&inferred)));
        }
        self.note(kind, &operands, &bound, outputs)?;
        let constant = kind.starts_with("constexpr_");
        let ones = if kind == "constexpr_lut_to_sparse" { ones_of_elements(&operands)? } else { None };
        for (i, (output, array)) in outputs.iter().zip(types).enumerate() {
            let ones = ones.filter(|_| i == 0);
            self.name(&output.name, Operand { array, literal: None, constant, ones })?;
        }
        Ok(())
    }

    /// Notes a record that the operation with the first output `name` uses.
    fn record(&mut self, name: &str, blob: Option<u64>) {
        if let Some(blob) = blob {
            self.blobs.insert(blob);
            self.records.entry(name.to_owned()).or_default().push(blob);
        }
    }

    /// Counts the operation and records its weights.
    fn note(
        &mut self,
        kind: &str,
        operands: &Operands,
        bound: &BTreeMap<&str, &str>,
        outputs: &[NamedValueType],
    ) -> Result<(), String> {
        // Every operation that can be inferred has an output.
        let first = outputs[0].name.clone();
        let numel = |parameter: &str| operands.array(parameter)?.numel().ok_or_else(|| format!("`{parameter}` is too large"));
        match kind {
            "constexpr_lut_to_sparse" => {
                self.vectors += usize::from(vector_length(operands)? > 1);
                self.pairs.extend(outputs.iter().map(|output| (output.name.clone(), first.clone())));
            }
            "constexpr_sparse_to_dense" => {
                let made_by = |parameter| bound.get(parameter).and_then(|name| self.pairs.get(*name));
                if made_by("mask") != made_by("nonzero_data") {
                    return Err("takes mask and values of two different weights".into());
                }
                self.compressed += 1;
                self.compressed_elements += numel("mask")?;
                self.pruned += numel("mask")? - numel("nonzero_data")?;
            }
            "constexpr_lut_to_dense" => {
                let length = vector_length(operands)?;
                self.vectors += usize::from(length > 1);
                self.compressed += 1;
                self.compressed_elements += numel("indices")?.checked_mul(length).ok_or("the weight is too large")?;
            }
            "constexpr_cast" => {}
            _ => {
                self.operations += 1;
                // The rows of an embedding, and positions that are added to tokens.
                let table = match kind {
                    "gather" => Some("x"),
                    "add" => Some("y"),
                    _ => None,
                };
                let stored = |name: &&str| operands.one(name).is_ok_and(|value| value.constant && value.literal.is_none());
                let parameters = ["weight", "bias", "gamma", "beta"].into_iter().chain(table.filter(stored));
                let weights: Vec<String> = parameters.filter_map(|name| bound.get(name)).map(|name| (*name).to_owned()).collect();
                if !weights.is_empty() {
                    self.weights.insert(first, weights);
                }
            }
        }
        Ok(())
    }

    /// Gives a value its name: an identifier, and a new one.
    fn name(&mut self, name: &str, operand: Operand) -> Result<(), String> {
        let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
        let follows = |c: char| letter(c) || c.is_ascii_digit() || c == '@';
        if !name.starts_with(letter) || !name.chars().all(follows) {
            return Err(format!("`{name}` is not an identifier"));
        }
        match self.values.insert(name.to_owned(), operand) {
            None => Ok(()),
            Some(_) => Err(format!("the name `{name}` is used twice")),
        }
    }
}
