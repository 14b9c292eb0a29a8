//! Values of a program: inside the program or in the blob file.

use half::f16;

use super::blobs::Blobs;
use crate::element::{ArrayType, Element};
use crate::literal::Literal;
use crate::operand::Operand;
use crate::program::BLOB_FILE;
use crate::proto::mil_spec::Value;
use crate::proto::mil_spec::tensor_value::Value as Content;
use crate::proto::mil_spec::value::Value as Kind;
use crate::proto::mil_spec::value::immediate_value::Value as Immediate;

/// Checks that a value fits its declared type. Returns it, with the offset of its record if it is
/// in the blob file.
pub(super) fn operand(value: &Value, blobs: &Blobs) -> Result<(Operand, Option<u64>), String> {
    if !value.doc_string.is_empty() {
        return Err("has a docString, which coremltools does not read".into());
    }
    let array = ArrayType::of_proto(value.r#type.as_ref())?;
    let constant = |array, literal, ones| Operand { array, literal, constant: true, ones };
    match &value.value {
        Some(Kind::BlobFileValue(place)) => {
            if place.file_name != BLOB_FILE {
                return Err(format!("lies in `{}`, not in {BLOB_FILE}", place.file_name));
            }
            let record = blobs.record(place.offset, &array)?;
            let ones = (array.element == Element::BIT).then_some(record.ones);
            Ok((constant(array, None, ones), Some(place.offset)))
        }
        Some(Kind::ImmediateValue(value)) => {
            let Some(Immediate::Tensor(tensor)) = &value.value else { return Err("is not an array".into()) };
            let content = tensor.value.as_ref().ok_or("is empty")?;
            let ones = check(&array, content)?;
            let literal = Literal::of_content(&array, content);
            Ok((constant(array, literal, ones), None))
        }
        None => Err("has no value".into()),
    }
}

/// Checks type, length and finiteness of the content. Returns the number of set bits of a mask.
fn check(array: &ArrayType, content: &Content) -> Result<Option<u64>, String> {
    let (right, length) = match (array.element, content) {
        (Element::Bool, Content::Bools(list)) => (true, list.values.len()),
        (Element::I32, Content::Ints(list)) => (true, list.values.len()),
        (Element::F32, Content::Floats(list)) => (list.values.iter().all(|value| value.is_finite()), list.values.len()),
        (Element::Text, Content::Strings(list)) => (true, list.values.len()),
        (Element::F16 | Element::Unsigned(_), Content::Bytes(list)) => {
            let bytes = &list.values;
            let (Some(numel), true) = (array.numel(), array.bytes() == Some(bytes.len() as u64)) else {
                return Err(format!("has {} bytes, which are not {array}", bytes.len()));
            };
            let used = numel % 8 * array.element.bits() % 8;
            if used != 0 && bytes.last().is_some_and(|last| last >> used != 0) {
                return Err("has bits set after its last number".into());
            }
            let finite = bytes.as_chunks::<2>().0.iter().all(|pair| f16::from_le_bytes(*pair).is_finite());
            if array.element == Element::F16 && !finite {
                return Err("has NaN or infinite values".into());
            }
            let ones = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
            return Ok((array.element == Element::BIT).then_some(ones));
        }
        _ => return Err(format!("is kept in the wrong way for {array}")),
    };
    if !right {
        return Err("has NaN or infinite values".into());
    }
    if array.numel() != Some(length as u64) {
        return Err(format!("has {length} values, which are not {array}"));
    }
    Ok(None)
}
