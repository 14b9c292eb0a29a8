//! Constant expressions of compressed weights (coremltools: `ops/defs/iOS18/compression.py`).

use super::super::element::{ArrayType, Element};
use super::super::operand::{Operand, Operands};
use super::inferred::{Inferred, axis};

/// The parameter for the axis that vectors lie along; look-up tables of single values have none.
pub(super) const VECTOR_AXIS: &str = "vector_axis";

pub(super) fn lut_to_dense(operands: &Operands) -> Inferred {
    let indices = constant(operands, "indices")?;
    let Vectors { shape, element, .. } = vectors(operands, indices.array.element, &indices.array.shape)?;
    Ok(vec![ArrayType::new(element, shape)])
}

/// The mask of elements, and the kept values. With vector palettes the given mask has a bit for
/// each vector.
pub(super) fn lut_to_sparse(operands: &Operands) -> Inferred {
    let mask = constant(operands, "indices_mask")?;
    bits(mask)?;
    let indices = constant(operands, "indices_nonzero_data")?;
    let [kept] = indices.array.shape[..] else { return Err(format!("the kept indices are {}", indices.array)) };
    let Vectors { shape, length, element } = vectors(operands, indices.array.element, &mask.array.shape)?;
    counted(mask, kept)?;
    let values = kept.checked_mul(length).ok_or("too many values are kept")?;
    if element != Element::F16 {
        return Err(format!("the lut of a mask is {element}"));
    }
    Ok(vec![ArrayType::new(Element::BIT, shape), ArrayType::new(Element::F16, [values])])
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

/// Halves that are stored for a network that computes in fp32 (`ops/defs/iOS18/compression.py`,
/// `constexpr_cast`, which knows these two dtypes only).
pub(super) fn cast(operands: &Operands) -> Inferred {
    let source = constant(operands, "source_val")?;
    match (source.array.element, operands.text("output_dtype")?) {
        (Element::F16, "fp32") => Ok(vec![ArrayType::new(Element::F32, source.array.shape.clone())]),
        (_, dtype) => Err(format!("a constant {} cannot become {dtype}", source.array)),
    }
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

/// What indices into a look-up table become.
struct Vectors {
    /// The shape of the dense weight.
    shape: Vec<u64>,
    /// The values that an index stands for, along one axis.
    length: u64,
    /// Their dtype: fp16, or fp32 in a network that computes in it.
    element: Element,
}

/// The dense weight that indices of `element` and `shape` into `lut` make: lut [g0, g1, .., 2^bits,
/// length], one palette for each of the g0 x g1 x .. blocks. Vectors lie along `vector_axis`, which
/// is needed if their length is not 1.
fn vectors(operands: &Operands, element: Element, shape: &[u64]) -> Result<Vectors, String> {
    let lut = constant(operands, "lut")?;
    let Element::Unsigned(width) = element else { return Err(format!("the indices are {element}")) };
    let wrong = || format!("the lut is {} for {element} {shape:?}", lut.array);
    let Some((groups, [entries, length])) = lut.array.shape.split_at_checked(shape.len()) else { return Err(wrong()) };
    let whole = groups.iter().zip(shape).all(|(groups, size)| size.is_multiple_of(*groups));
    if !whole || *entries != width.entries() as u64 || !matches!(lut.array.element, Element::F16 | Element::F32) {
        return Err(wrong());
    }
    let mut shape = shape.to_vec();
    if *length > 1 || operands.0.contains_key(VECTOR_AXIS) {
        let axis = axis(operands.int(VECTOR_AXIS)?, shape.len())?;
        shape[axis] = shape[axis].checked_mul(*length).ok_or_else(wrong)?;
    }
    Ok(Vectors { shape, length: *length, element: lut.array.element })
}
