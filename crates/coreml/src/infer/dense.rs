//! Operations on numbers.

use super::super::element::{ArrayType, Element};
use super::super::operand::Operands;
use super::inferred::{Inferred, axis, rank4};

pub(super) fn unary(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    floating(x.element)?;
    Ok(vec![x.clone()])
}

pub(super) fn gelu(operands: &Operands) -> Inferred {
    match operands.text("mode")? {
        "EXACT" => unary(operands),
        mode => Err(format!("the mode `{mode}` is not the UNet's")),
    }
}

pub(super) fn softmax(operands: &Operands) -> Inferred {
    axis(operands.int("axis")?, operands.shape("x")?.len())?;
    unary(operands)
}

pub(super) fn cast(operands: &Operands) -> Inferred {
    let element = match operands.text("dtype")? {
        "fp16" => Element::F16,
        "fp32" => Element::F32,
        "int32" => Element::I32,
        dtype => return Err(format!("a cast to `{dtype}` is not expected")),
    };
    let x = operands.array("x")?;
    if !matches!(x.element, Element::F16 | Element::F32 | Element::I32 | Element::Bool) {
        return Err(format!("is given {x}"));
    }
    Ok(vec![ArrayType::new(element, x.shape.clone())])
}

/// Element-wise with broadcasting: sizes of 1 are repeated, and the shorter shape is extended with
/// them in front.
pub(super) fn binary(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    floating(x.element)?;
    Ok(vec![ArrayType::new(x.element, broadcast(operands)?)])
}

/// The shape of an element-wise operation's output.
pub(super) fn broadcast(operands: &Operands) -> Result<Vec<u64>, String> {
    let (x, y) = (operands.array("x")?, operands.array("y")?);
    if x.element != y.element {
        return Err(format!("`x` is {x}, but `y` is {y}"));
    }
    let rank = x.shape.len().max(y.shape.len());
    let size = |shape: &[u64], i: usize| (i + shape.len()).checked_sub(rank).and_then(|i| shape.get(i)).copied().unwrap_or(1);
    let shape = (0..rank).map(|i| match (size(&x.shape, i), size(&y.shape, i)) {
        (a, b) if a == b || b == 1 => Ok(a),
        (1, b) => Ok(b),
        _ => Err(format!("{x} and {y} do not fit together")),
    });
    shape.collect()
}

/// x [.., i], weight [o, i], bias [o].
pub(super) fn linear(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let (outputs, inputs) = match *weight(operands, x.element)? {
        [outputs, inputs] => (outputs, inputs),
        ref shape => return Err(format!("the weight is of shape {shape:?}")),
    };
    operands.vector("bias", x.element, outputs)?;
    let mut shape = x.shape.clone();
    match shape.last_mut() {
        Some(last) if *last == inputs => *last = outputs,
        _ => return Err(format!("a weight for {inputs} inputs is given {x}")),
    }
    Ok(vec![ArrayType { element: x.element, shape }])
}

/// x [n, c, h, w], weight [o, c, kh, kw], bias [o].
pub(super) fn conv(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let ([batch, channels, height, width], [outputs, inputs, down, right]) =
        (rank4(&x.shape)?, rank4(weight(operands, x.element)?)?);
    operands.vector("bias", x.element, outputs)?;
    if operands.int("groups")? != 1 || channels != inputs {
        return Err(format!("a weight for {inputs} channels is given {x}"));
    }
    let (strides, dilations, pad) = (operands.sizes("strides")?, operands.sizes("dilations")?, operands.ints("pad")?);
    let pad: Vec<u64> = match operands.text("pad_type")? {
        "custom" => pad.iter().map(|n| u64::try_from(*n)).collect::<Result<_, _>>().map_err(|_| "a padding below 0")?,
        "valid" if pad.iter().all(|n| *n == 0) => vec![0; 4],
        pad_type => return Err(format!("the pad_type `{pad_type}` with pad {pad:?}")),
    };
    let ([stride_down, stride_right], [1, 1], [top, bottom, left, right_pad]) = (&strides[..], &dilations[..], &pad[..]) else {
        return Err(format!("strides {strides:?}, dilations {dilations:?}, pad {pad:?}"));
    };
    let out = |size: u64, before: u64, after: u64, kernel: u64, stride: u64| {
        let steps = size.saturating_add(before).saturating_add(after).checked_sub(kernel)?;
        Some(steps / stride + 1)
    };
    let sizes = out(height, *top, *bottom, down, *stride_down).zip(out(width, *left, *right_pad, right, *stride_right));
    let (height, width) = sizes.ok_or("the kernel is larger than its input")?;
    Ok(vec![ArrayType::new(x.element, [batch, outputs, height, width])])
}

/// A constant weight's shape.
fn weight<'a>(operands: &Operands<'a>, element: Element) -> Result<&'a [u64], String> {
    let weight = operands.one("weight")?;
    if !weight.constant || weight.array.element != element {
        return Err(format!("the weight is {}, and {}", weight.array, if weight.constant { "constant" } else { "computed" }));
    }
    floating(element)?;
    Ok(&weight.array.shape)
}

pub(super) fn layer_norm(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let [axis_index] = *operands.ints("axes")? else { return Err("is over more than one axis".into()) };
    let channels = x.shape[axis(axis_index, x.shape.len())?];
    operands.vector("gamma", x.element, channels)?;
    operands.vector("beta", x.element, channels)?;
    operands.epsilon("epsilon", x.element)?;
    unary(operands)
}

pub(super) fn batch_norm(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    let [_, channels, _, _] = rank4(&x.shape)?;
    for name in ["mean", "variance", "gamma", "beta"] {
        operands.vector(name, x.element, channels)?;
    }
    operands.epsilon("epsilon", x.element)?;
    unary(operands)
}

pub(super) fn reduce_mean(operands: &Operands) -> Inferred {
    floating(operands.array("x")?.element)?;
    reduced(operands)
}

/// The type of `x` with sizes of 1 along `axes`.
pub(super) fn reduced(operands: &Operands) -> Inferred {
    let x = operands.array("x")?;
    if !operands.bool("keep_dims")? {
        return Err("drops its axes".into());
    }
    let mut shape = x.shape.clone();
    for index in operands.ints("axes")? {
        shape[axis(*index, x.shape.len())?] = 1;
    }
    Ok(vec![ArrayType { element: x.element, shape }])
}

/// The parameter for what is added to the scores of an attention; the UNet's have none.
pub(super) const MASK: &str = "attn_mask";

/// query [b, heads, s, d], key [b, heads, t, d], value [b, heads, t, e] to [b, heads, s, e]; a mask
/// is [1, 1, s, t].
pub(super) fn attention(operands: &Operands) -> Inferred {
    let (query, key, value) = (operands.array("query")?, operands.array("key")?, operands.array("value")?);
    floating(query.element)?;
    let ([batch, heads, length, width], k, v) = (rank4(&query.shape)?, rank4(&key.shape)?, rank4(&value.shape)?);
    let fits = [k[0], k[1], k[3]] == [batch, heads, width] && v[..3] == k[..3];
    if !fits || key.element != query.element || value.element != query.element {
        return Err(format!("query {query}, key {key} and value {value} do not fit together"));
    }
    if operands.0.contains_key(MASK) {
        let (mask, wanted) = (operands.one(MASK)?, ArrayType::new(query.element, [1, 1, length, k[2]]));
        if mask.array != wanted {
            return Err(format!("the mask is {}, not {wanted}", mask.array));
        }
    }
    Ok(vec![ArrayType::new(query.element, [batch, heads, length, v[3]])])
}

/// The two products of split attention, as apple/ml-stable-diffusion writes them.
pub(super) fn einsum(operands: &Operands) -> Inferred {
    let [x, y] = operands.list("values")? else { return Err("is not of two values".into()) };
    floating(x.array.element)?;
    let ([b, c, h, k], [b2, k2, h2, q]) = (rank4(&x.array.shape)?, rank4(&y.array.shape)?);
    let known = ["bkhc,bchq->bkhq", "bchk,bkhq->bchq"];
    let equation = operands.text("equation")?;
    if !known.contains(&equation) || [b, h, k] != [b2, h2, k2] || x.array.element != y.array.element {
        return Err(format!("`{equation}` of {} and {}", x.array, y.array));
    }
    Ok(vec![ArrayType::new(x.array.element, [b, c, h, q])])
}

fn floating(element: Element) -> Result<(), String> {
    if matches!(element, Element::F16 | Element::F32) { Ok(()) } else { Err(format!("is given {element}")) }
}
