//! The operations of a program: the parameters of each, and the types of its outputs.
//!
//! The builder declares these types, and `verify` infers them again from a file. Each operation has
//! exactly the parameters that coremltools 9.0 writes for a converted network
//! (`converters/mil/mil/ops/defs`).

mod compressed;
mod dense;
mod inferred;
mod shape;
mod tokens;

use inferred::Inferred;

use super::operand::Operands;

/// An operation's name, its parameters, and the function that infers its outputs.
struct Definition {
    name: &'static str,
    parameters: &'static [&'static str],
    infer: fn(&Operands) -> Inferred,
}

const DEFINITIONS: &[Definition] = &[
    Definition { name: "add", parameters: &["x", "y"], infer: dense::binary },
    Definition { name: "sub", parameters: &["x", "y"], infer: dense::binary },
    Definition { name: "mul", parameters: &["x", "y"], infer: dense::binary },
    Definition { name: "real_div", parameters: &["x", "y"], infer: dense::binary },
    Definition { name: "silu", parameters: &["x"], infer: dense::unary },
    Definition { name: "sigmoid", parameters: &["x"], infer: dense::unary },
    Definition { name: "sin", parameters: &["x"], infer: dense::unary },
    Definition { name: "cos", parameters: &["x"], infer: dense::unary },
    Definition { name: "square", parameters: &["x"], infer: dense::unary },
    Definition { name: "sqrt", parameters: &["x"], infer: dense::unary },
    Definition { name: "gelu", parameters: &["x", "mode"], infer: dense::gelu },
    Definition { name: "softmax", parameters: &["x", "axis"], infer: dense::softmax },
    Definition { name: "cast", parameters: &["x", "dtype"], infer: dense::cast },
    Definition { name: "linear", parameters: &["x", "weight", "bias"], infer: dense::linear },
    Definition {
        name: "conv",
        parameters: &["x", "weight", "bias", "strides", "pad_type", "pad", "dilations", "groups"],
        infer: dense::conv,
    },
    Definition { name: "layer_norm", parameters: &["x", "axes", "gamma", "beta", "epsilon"], infer: dense::layer_norm },
    Definition {
        name: "batch_norm",
        parameters: &["x", "mean", "variance", "gamma", "beta", "epsilon"],
        infer: dense::batch_norm,
    },
    Definition { name: "reduce_mean", parameters: &["x", "axes", "keep_dims"], infer: dense::reduce_mean },
    Definition { name: "reduce_max", parameters: &["x", "axes", "keep_dims"], infer: tokens::reduce_max },
    Definition { name: "reduce_argmax", parameters: &["x", "axis", "keep_dims", "output_dtype"], infer: tokens::reduce_argmax },
    Definition { name: "equal", parameters: &["x", "y"], infer: tokens::equal },
    Definition { name: "gather", parameters: &["x", "indices", "axis", "batch_dims", "validate_indices"], infer: tokens::gather },
    Definition { name: "scaled_dot_product_attention", parameters: &["query", "key", "value"], infer: dense::attention },
    Definition { name: "einsum", parameters: &["values", "equation"], infer: dense::einsum },
    Definition { name: "reshape", parameters: &["x", "shape"], infer: shape::reshape },
    Definition { name: "transpose", parameters: &["x", "perm"], infer: shape::transpose },
    Definition { name: "expand_dims", parameters: &["x", "axes"], infer: shape::expand_dims },
    Definition { name: "concat", parameters: &["values", "axis", "interleave"], infer: shape::concat },
    Definition { name: "split", parameters: &["x", "split_sizes", "axis"], infer: shape::split },
    Definition { name: "slice_by_index", parameters: &["x", "begin", "end", "end_mask"], infer: shape::slice_by_index },
    Definition {
        name: "upsample_nearest_neighbor",
        parameters: &["x", "scale_factor_height", "scale_factor_width"],
        infer: shape::upsample,
    },
    Definition { name: "constexpr_lut_to_dense", parameters: &["indices", "lut"], infer: compressed::lut_to_dense },
    Definition {
        name: "constexpr_lut_to_sparse",
        parameters: &["indices_mask", "indices_nonzero_data", "lut"],
        infer: compressed::lut_to_sparse,
    },
    Definition { name: "constexpr_cast", parameters: &["source_val", "output_dtype"], infer: compressed::cast },
    Definition { name: "constexpr_sparse_to_dense", parameters: &["nonzero_data", "mask"], infer: compressed::sparse_to_dense },
];

/// The types of the outputs of the operation `name`.
///
/// # Errors
/// If the operation is unknown, has other parameters, or they do not fit together.
pub(super) fn infer(name: &str, operands: &Operands) -> Inferred {
    let definition = DEFINITIONS.iter().find(|definition| definition.name == name);
    let Definition { parameters, infer, .. } = definition.ok_or_else(|| format!("unknown operation `{name}`"))?;
    if let Some(missing) = parameters.iter().find(|parameter| !operands.0.contains_key(*parameter)) {
        return Err(format!("`{missing}` is missing"));
    }
    let optional = |given: &str| {
        (parameters.contains(&"lut") && given == compressed::VECTOR_AXIS)
            || (parameters.contains(&"query") && given == dense::MASK)
    };
    if let Some(surplus) = operands.0.keys().find(|given| !parameters.contains(given) && !optional(given)) {
        return Err(format!("has no parameter `{surplus}`"));
    }
    infer(operands)
}
