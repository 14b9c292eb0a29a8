//! Operations on token ids, and on the rows that ids name.

use super::super::element::{ArrayType, Element, MAX_RANK};
use super::super::operand::Operands;
use super::dense::{broadcast, reduced};
use super::inferred::{Inferred, axis};

/// Whether the elements of `x` and `y` are equal, with broadcasting.
pub(super) fn equal(operands: &Operands) -> Inferred {
    ids(operands.array("x")?)?;
    Ok(vec![ArrayType::new(Element::Bool, broadcast(operands)?)])
}

pub(super) fn reduce_max(operands: &Operands) -> Inferred {
    ids(operands.array("x")?)?;
    reduced(operands)
}

/// The position of the highest value along one axis.
pub(super) fn reduce_argmax(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    if !matches!(x.element, Element::F16 | Element::F32 | Element::I32) {
        return Err(format!("is given {x}"));
    }
    let at = axis(operands.int("axis")?, x.shape.len())?;
    let mut shape = x.shape.clone();
    match (operands.bool("keep_dims")?, operands.text("output_dtype")?) {
        (true, "int32") => shape[at] = 1,
        (false, "int32") => drop(shape.remove(at)),
        (_, dtype) => return Err(format!("positions as `{dtype}` are not expected")),
    }
    Ok(vec![ArrayType::new(Element::I32, shape)])
}

/// The rows of `x` along an axis that `indices` name: the axis becomes the shape of `indices`.
pub(super) fn gather(operands: &Operands) -> Inferred {
    let (x, indices) = (operands.array("x")?, operands.array("indices")?);
    ids(indices)?;
    if !matches!(x.element, Element::F16 | Element::F32 | Element::I32) {
        return Err(format!("is given {x}"));
    }
    if operands.int("batch_dims")? != 0 || operands.bool("validate_indices")? {
        return Err("has dimensions in common with its indices, or validates them".into());
    }
    let at = axis(operands.int("axis")?, x.shape.len())?;
    let shape = [&x.shape[..at], &indices.shape, &x.shape[at + 1..]].concat();
    if shape.len() > MAX_RANK {
        return Err(format!("of {x} at {indices}"));
    }
    Ok(vec![ArrayType::new(x.element, shape)])
}

fn ids(array: &ArrayType) -> Result<(), String> {
    if array.element == Element::I32 { Ok(()) } else { Err(format!("is given {array} where ids are needed")) }
}
