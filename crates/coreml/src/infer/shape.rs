//! Operations that move elements.

use super::super::element::{ArrayType, Element, MAX_RANK};
use super::super::operand::Operands;
use super::inferred::{Inferred, axis, rank4};

/// One size may be -1: the number that keeps the element count.
pub(super) fn reshape(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let shape = operands.ints("shape")?;
    let known = shape.iter().filter(|n| **n != -1).try_fold(1u64, |product, n| product.checked_mul(u64::try_from(*n).ok()?));
    let rest = x.numel().zip(known).and_then(|(numel, known)| numel.checked_div(known));
    let sizes = shape.iter().map(|n| if *n == -1 { rest } else { u64::try_from(*n).ok() });
    let sizes = sizes.collect::<Option<Vec<u64>>>().ok_or_else(|| format!("{x} cannot become {shape:?}"))?;
    let new = ArrayType::new(x.element, sizes);
    if shape.len() > MAX_RANK || new.numel().is_none() || new.numel() != x.numel() {
        return Err(format!("{x} cannot become {:?}", new.shape));
    }
    Ok(vec![new])
}

pub(super) fn transpose(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let perm = operands.ints("perm")?;
    let axes = perm.iter().map(|index| axis(*index, x.shape.len())).collect::<Result<Vec<_>, _>>()?;
    let mut sorted = axes.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..x.shape.len()) {
        return Err(format!("{perm:?} is no order of the axes of {x}"));
    }
    let shape: Vec<u64> = axes.iter().map(|axis| x.shape[*axis]).collect();
    Ok(vec![ArrayType::new(x.element, shape)])
}

/// Inserts axes of size 1; positions count in the result.
pub(super) fn expand_dims(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let axes = operands.ints("axes")?;
    let rank = x.shape.len() + axes.len();
    if rank > MAX_RANK {
        return Err(format!("axes {axes:?} of {x}"));
    }
    let mut shape = x.shape.clone();
    for index in axes {
        let at = axis(*index, rank)?;
        if at > shape.len() {
            return Err(format!("axes {axes:?} of {x}"));
        }
        shape.insert(at, 1);
    }
    Ok(vec![ArrayType { element: x.element, shape }])
}

pub(super) fn concat(operands: &Operands) -> Inferred {
    let values = operands.list("values")?;
    let first = &values.first().ok_or("is of nothing")?.array;
    let along = axis(operands.int("axis")?, first.shape.len())?;
    if operands.bool("interleave")? {
        return Err("interleaves".into());
    }
    let mut shape = first.shape.clone();
    for value in values.iter().skip(1).map(|value| &value.array) {
        let fits = value.element == first.element
            && value.shape.len() == shape.len()
            && value.shape.iter().zip(&shape).enumerate().all(|(i, (a, b))| i == along || a == b);
        if !fits {
            return Err(format!("{first} and {value} along axis {along}"));
        }
        shape[along] = shape[along].checked_add(value.shape[along]).ok_or("is too large")?;
    }
    Ok(vec![ArrayType { element: first.element, shape }])
}

pub(super) fn split(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let (sizes, along) = (operands.sizes("split_sizes")?, axis(operands.int("axis")?, x.shape.len())?);
    if x.shape[along] != sizes.iter().sum::<u64>() {
        return Err(format!("{x} into {sizes:?} along axis {along}"));
    }
    let part = |size: &u64| {
        let mut shape = x.shape.clone();
        shape[along] = *size;
        ArrayType { element: x.element, shape }
    };
    Ok(sizes.iter().map(part).collect())
}

pub(super) fn slice_by_index(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let (begin, end, mask) = (operands.ints("begin")?, operands.ints("end")?, operands.bools("end_mask")?);
    let rank = x.shape.len();
    if [begin.len(), end.len(), mask.len()] != [rank; 3] {
        return Err(format!("of {x} with {} begins, {} ends and {} masks", begin.len(), end.len(), mask.len()));
    }
    let bounds = x.shape.iter().zip(begin).zip(end.iter().zip(mask));
    let shape = bounds.map(|((size, begin), (end, to_end))| {
        let end = if *to_end { Some(*size) } else { u64::try_from(*end).ok() };
        let length = end.filter(|end| end <= size)?.checked_sub(u64::try_from(*begin).ok()?)?;
        (length > 0).then_some(length)
    });
    let shape = shape.collect::<Option<Vec<u64>>>().ok_or_else(|| format!("{begin:?} to {end:?} of {x}"))?;
    Ok(vec![ArrayType::new(x.element, shape)])
}

pub(super) fn upsample(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let [batch, channels, height, width] = rank4(&x.shape)?;
    let scale = |name| match operands.float(name)? {
        2.0 => Ok(2),
        scale => Err(format!("`{name}` is {scale}, not 2")),
    };
    let (down, right): (u64, u64) = (scale("scale_factor_height")?, scale("scale_factor_width")?);
    if !matches!(x.element, Element::F16 | Element::F32) {
        return Err(format!("is given {x}"));
    }
    Ok(vec![ArrayType::new(x.element, [batch, channels, height.saturating_mul(down), width.saturating_mul(right)])])
}
