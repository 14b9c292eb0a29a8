//! The bytes of a program's constants, by the operation that holds them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::element::{ArrayType, Element};
use super::proto::mil_spec::argument::binding::Binding;
use super::proto::mil_spec::{Operation, Value};

/// A large constant of halves: a weight that is not compressed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DenseConstant {
    /// Its name in the program.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
}

/// Halves that take less are biases and norms, which nobody compresses.
const LARGE: u64 = 16 << 10;

/// The bytes of the arrays that operations hold, by the kind of operation: `const` holds dense
/// values, `constexpr_cast` those of networks in fp32, and the other `constexpr_…` hold masks,
/// indices, palettes and kept values.
pub(super) fn bytes_by_kind(operations: &[Operation]) -> BTreeMap<String, u64> {
    let mut kinds = BTreeMap::new();
    for operation in operations {
        let bytes: u64 = held(operation).map(bytes_of).sum();
        if bytes > 0 {
            *kinds.entry(operation.r#type.clone()).or_default() += bytes;
        }
    }
    kinds
}

/// The dense constants of at least 16 KiB, the largest first.
pub(super) fn large_and_dense(operations: &[Operation]) -> Vec<DenseConstant> {
    let constants = operations.iter().filter(|operation| matches!(operation.r#type.as_str(), "const" | "constexpr_cast"));
    let mut large: Vec<DenseConstant> = constants
        .filter_map(|operation| {
            let bytes = held(operation).filter(|value| is_half(value)).map(bytes_of).sum();
            let name = operation.outputs.first()?.name.clone();
            (bytes >= LARGE).then_some(DenseConstant { name, bytes })
        })
        .collect();
    large.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    large
}

/// The values in an operation: the value of a constant, and inline arguments.
fn held(operation: &Operation) -> impl Iterator<Item = &Value> {
    let arguments = operation.inputs.values().flat_map(|argument| &argument.arguments);
    let inline = arguments.filter_map(|binding| match &binding.binding {
        Some(Binding::Value(value)) => Some(value),
        Some(Binding::Name(_)) | None => None,
    });
    operation.attributes.get("val").into_iter().chain(inline)
}

fn is_half(value: &Value) -> bool {
    ArrayType::of_proto(value.r#type.as_ref()).is_ok_and(|array| array.element == Element::F16)
}

/// The bytes of a value's numbers; 0 for text.
fn bytes_of(value: &Value) -> u64 {
    match ArrayType::of_proto(value.r#type.as_ref()) {
        Ok(array) if array.element != Element::Text => array.bytes().unwrap_or(0),
        Ok(_) | Err(_) => 0,
    }
}
