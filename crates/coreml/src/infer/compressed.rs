//! Constant expressions of compressed weights (coremltools: `ops/defs/iOS18/compression.py`).

use super::super::element::{ArrayType, Element};
use super::super::operand::{Operand, Operands};
use super::inferred::Inferred;

pub(super) fn lut_to_dense(operands: &Operands) -> Inferred {
    let indices = constant(operands, "indices")?;
    Ok(vec![palette(operands, indices.array.element, &indices.array.shape)?])
}

/// The mask again, and the kept values.
pub(super) fn lut_to_sparse(operands: &Operands) -> Inferred {
    let mask = constant(operands, "indices_mask")?;
    bits(mask)?;
    let indices = constant(operands, "indices_nonzero_data")?;
    let [kept] = indices.array.shape[..] else { return Err(format!("the kept indices are {}", indices.array)) };
    let dense = palette(operands, indices.array.element, &mask.array.shape)?;
    counted(mask, kept)?;
    Ok(vec![mask.array.clone(), ArrayType::new(dense.element, [kept])])
}

pub(super) fn sparse_to_dense(operands: &Operands) -> Inferred {
    let (values, mask) = (constant(operands, "nonzero_data")?, constant(operands, "mask")?);
    bits(mask)?;
    let [kept] = values.array.shape[..] else { return Err(format!("the kept values are {}", values.array)) };
    if mask.array.numel().is_none_or(|numel| kept > numel) || values.array.element != Element::F16 {
        return Err(format!("the kept values are {} for a mask {}", values.array, mask.array));
    }
    counted(mask, kept)?;
    Ok(vec![ArrayType::new(Element::F16, mask.array.shape.clone())])
}

fn constant<'a>(operands: &Operands<'a>, name: &str) -> Result<&'a Operand, String> {
    let operand = operands.one(name)?;
    if operand.constant { Ok(operand) } else { Err(format!("`{name}` is not a constant")) }
}

fn bits(mask: &Operand) -> Result<(), String> {
    if mask.array.element == Element::BIT { Ok(()) } else { Err(format!("the mask is {}", mask.array)) }
}

/// Whether the mask keeps as many elements as there are values.
fn counted(mask: &Operand, kept: u64) -> Result<(), String> {
    match mask.ones {
        Some(ones) if ones != kept => Err(format!("the mask keeps {ones} elements, but there are {kept} values")),
        Some(_) | None => Ok(()),
    }
}

/// The dense weight of `shape` that indices of `element` into `lut` make: lut [g0, g1, .., 2^bits,
/// 1], one palette for each of the g0 x g1 x .. blocks.
fn palette(operands: &Operands, element: Element, shape: &[u64]) -> Result<ArrayType, String> {
    let lut = constant(operands, "lut")?;
    let Element::Unsigned(width) = element else { return Err(format!("the indices are {element}")) };
    let wrong = || format!("the lut is {} for {element} {shape:?}", lut.array);
    let Some((groups, [entries, 1])) = lut.array.shape.split_at_checked(shape.len()) else { return Err(wrong()) };
    let whole = groups.iter().zip(shape).all(|(groups, size)| size.is_multiple_of(*groups));
    if !whole || *entries != width.entries() as u64 || lut.array.element != Element::F16 {
        return Err(wrong());
    }
    Ok(ArrayType::new(Element::F16, shape))
}
