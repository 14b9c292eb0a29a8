//! Evaluates the program of a package with libtorch in fp32, from the files of the package alone.

use std::collections::BTreeMap;

use half::f16;
use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::value::immediate_value::Value as Immediate;
use sdxl_squeeze::coreml::proto::mil_spec::{DataType, Value};
use tch::{Kind as Dtype, Tensor};

use super::file::{Package, declared};

/// A value of the running program.
enum Held {
    Numbers(Tensor),
    Text(String),
}

type Values = BTreeMap<String, Held>;

/// Evaluates the program and returns its outputs.
pub(super) fn evaluate(package: &mut Package, inputs: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut values: Values = inputs.iter().map(|(name, x)| (name.clone(), Held::Numbers(x.to_kind(Dtype::Float)))).collect();
    let blobs = package.blobs.clone();
    let block = package.block().clone();
    for op in &block.operations {
        let mut arguments: BTreeMap<&str, Vec<Held>> = BTreeMap::new();
        for (parameter, argument) in &op.inputs {
            let given = argument.arguments.iter().map(|binding| match binding.binding.as_ref().unwrap() {
                Binding::Name(name) => match &values[name] {
                    Held::Numbers(x) => Held::Numbers(x.shallow_clone()),
                    Held::Text(text) => Held::Text(text.clone()),
                },
                Binding::Value(value) => stored(value, &blobs),
            });
            arguments.insert(parameter, given.collect());
        }
        let results = match op.r#type.as_str() {
            "const" => vec![stored(&op.attributes["val"], &blobs)],
            kind => compute(kind, &Arguments(arguments)).into_iter().map(Held::Numbers).collect(),
        };
        assert_eq!(results.len(), op.outputs.len(), "{}", op.r#type);
        for (output, result) in op.outputs.iter().zip(results) {
            let (_, shape) = declared(output.r#type.as_ref());
            if let Held::Numbers(x) = &result {
                assert_eq!(x.size(), shape, "{} {}", op.r#type, output.name);
            }
            values.insert(output.name.clone(), result);
        }
    }
    block.outputs.iter().map(|name| (name.clone(), tensor(&values[name]).shallow_clone())).collect()
}

fn tensor(held: &Held) -> &Tensor {
    match held {
        Held::Numbers(x) => x,
        Held::Text(text) => panic!("`{text}` is not a tensor"),
    }
}

/// Reads a value of the program or of the weight file. Packed numbers become bytes, and fp16
/// becomes fp32.
fn stored(value: &Value, blobs: &[u8]) -> Held {
    let (code, shape) = declared(value.r#type.as_ref());
    let bits = match DataType::try_from(code).unwrap() {
        DataType::Uint1 => 1,
        DataType::Uint2 => 2,
        DataType::Uint3 => 3,
        DataType::Uint4 => 4,
        DataType::Uint6 => 6,
        DataType::Uint8 => 8,
        _ => 0,
    };
    let numel: i64 = shape.iter().product();
    let bytes = |data: &[u8]| match DataType::try_from(code).unwrap() {
        DataType::Float16 => Tensor::from_slice(
            &data.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect::<Vec<_>>(),
        ),
        DataType::Float32 => Tensor::from_slice(
            &data.chunks_exact(4).map(|quad| f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]])).collect::<Vec<_>>(),
        ),
        _ => {
            let bit = |k: usize| data[k / 8] >> (k % 8) & 1;
            let number = |i: usize| (0..bits).map(|b| i64::from(bit(i * bits + b)) << b).sum::<i64>();
            Tensor::from_slice(&(0..numel as usize).map(number).collect::<Vec<_>>())
        }
    };
    let x = match value.value.as_ref().unwrap() {
        Kind::BlobFileValue(place) => {
            let at = place.offset as usize;
            let number = |from: usize| u64::from_le_bytes(blobs[at + from..at + from + 8].try_into().unwrap()) as usize;
            bytes(&blobs[number(16)..number(16) + number(8)])
        }
        Kind::ImmediateValue(value) => {
            let Some(Immediate::Tensor(content)) = &value.value else { panic!("not a tensor") };
            match content.value.as_ref().unwrap() {
                Content::Strings(list) => return Held::Text(list.values[0].clone()),
                Content::Bytes(list) => bytes(&list.values),
                Content::Floats(list) => Tensor::from_slice(&list.values),
                Content::Ints(list) => Tensor::from_slice(&list.values.iter().map(|n| i64::from(*n)).collect::<Vec<_>>()),
                Content::Bools(list) => Tensor::from_slice(&list.values.iter().map(|b| i64::from(*b)).collect::<Vec<_>>()),
                other => panic!("{other:?}"),
            }
        }
    };
    Held::Numbers(x.reshape(&shape))
}

struct Arguments<'a>(BTreeMap<&'a str, Vec<Held>>);

impl Arguments<'_> {
    fn t(&self, name: &str) -> &Tensor {
        tensor(&self.0[name][0])
    }

    fn ints(&self, name: &str) -> Vec<i64> {
        Vec::try_from(&self.t(name).flatten(0, -1)).unwrap()
    }

    fn float(&self, name: &str) -> f64 {
        self.t(name).double_value(&[])
    }

    fn text(&self, name: &str) -> &str {
        let Held::Text(text) = &self.0[name][0] else { panic!("`{name}` is not text") };
        text
    }

    fn list(&self, name: &str) -> Vec<&Tensor> {
        self.0[name].iter().map(tensor).collect()
    }
}

fn compute(kind: &str, a: &Arguments) -> Vec<Tensor> {
    let whole = |name: &str| a.ints(name)[0];
    vec![match kind {
        "add" => a.t("x") + a.t("y"),
        "sub" => a.t("x") - a.t("y"),
        "mul" => a.t("x") * a.t("y"),
        "real_div" => a.t("x") / a.t("y"),
        "silu" => a.t("x").silu(),
        "sin" => a.t("x").sin(),
        "cos" => a.t("x").cos(),
        "square" => a.t("x").square(),
        "sqrt" => a.t("x").sqrt(),
        "gelu" => a.t("x").gelu("none"),
        "softmax" => a.t("x").softmax(whole("axis"), None),
        "sigmoid" => a.t("x").sigmoid(),
        // All numbers are fp32, and ids are integers.
        "cast" if a.text("dtype") == "int32" => a.t("x").to_kind(Dtype::Int64),
        "cast" => a.t("x").to_kind(Dtype::Float),
        "equal" => a.t("x").eq_tensor(a.t("y")),
        "reduce_max" => a.t("x").amax(a.ints("axes"), whole("keep_dims") == 1),
        "reduce_argmax" => {
            let (x, axis) = (a.t("x"), whole("axis"));
            let highest = x.amax(axis, true);
            assert_eq!(
                x.eq_tensor(&highest).sum(None::<Dtype>).int64_value(&[]),
                1,
                "which of equal values is taken is not promised"
            );
            x.argmax(axis, whole("keep_dims") == 1)
        }
        "gather" => {
            let (x, indices, axis) = (a.t("x"), a.t("indices"), whole("axis") as usize);
            let shape = [&x.size()[..axis], &indices.size(), &x.size()[axis + 1..]].concat();
            x.index_select(axis as i64, &indices.flatten(0, -1)).reshape(&shape)
        }
        "constexpr_cast" => a.t("source_val").shallow_clone(),
        "linear" => a.t("x").linear(a.t("weight"), Some(a.t("bias"))),
        "conv" => {
            let pad = a.ints("pad");
            let x = a.t("x").constant_pad_nd([pad[2], pad[3], pad[0], pad[1]]);
            x.conv2d(a.t("weight"), Some(a.t("bias")), a.ints("strides"), [0, 0], a.ints("dilations"), whole("groups"))
        }
        "layer_norm" => {
            let (x, axis) = (a.t("x"), whole("axes"));
            let last = x.movedim_int(axis, -1);
            let normed =
                last.layer_norm([*last.size().last().unwrap()], Some(a.t("gamma")), Some(a.t("beta")), a.float("epsilon"), false);
            normed.movedim_int(-1, axis)
        }
        "batch_norm" => {
            let per_channel = |name: &str| a.t(name).reshape([1, -1, 1, 1]);
            (a.t("x") - per_channel("mean")) / (per_channel("variance") + a.float("epsilon")).sqrt() * per_channel("gamma")
                + per_channel("beta")
        }
        "reduce_mean" => a.t("x").mean_dim(a.ints("axes"), whole("keep_dims") == 1, None),
        "scaled_dot_product_attention" => {
            let width = a.t("query").size()[3] as f64;
            let mut scores: Tensor = a.t("query").matmul(&a.t("key").transpose(2, 3)) / width.sqrt();
            if a.0.contains_key("attn_mask") {
                scores += a.t("attn_mask");
            }
            scores.softmax(-1, None).matmul(a.t("value"))
        }
        "einsum" => Tensor::einsum(a.text("equation"), &a.list("values"), None::<i64>),
        "reshape" => a.t("x").reshape(a.ints("shape")),
        "transpose" => a.t("x").permute(a.ints("perm")),
        "expand_dims" => a.ints("axes").iter().fold(a.t("x").shallow_clone(), |x, axis| x.unsqueeze(*axis)),
        "concat" => Tensor::cat(&a.list("values"), whole("axis")),
        "split" => return a.t("x").split_with_sizes(a.ints("split_sizes"), whole("axis")),
        "slice_by_index" => {
            let (begin, end, mask) = (a.ints("begin"), a.ints("end"), a.ints("end_mask"));
            let slice = |x: Tensor, axis: usize| {
                let end = if mask[axis] == 1 { x.size()[axis] } else { end[axis] };
                x.slice(axis as i64, begin[axis], end, 1)
            };
            (0..begin.len()).fold(a.t("x").shallow_clone(), slice)
        }
        "upsample_nearest_neighbor" => {
            assert_eq!((a.float("scale_factor_height"), a.float("scale_factor_width")), (2.0, 2.0));
            a.t("x").repeat_interleave_self_int(2, 2, None).repeat_interleave_self_int(2, 3, None)
        }
        "constexpr_lut_to_dense" => {
            let indices = a.t("indices");
            spread_vectors(&entries_of(&indices.size(), a.t("lut"), indices, None), &indices.size(), vector_axis(a))
        }
        "constexpr_lut_to_sparse" => {
            let mask = a.t("indices_mask");
            let kept = mask.flatten(0, -1).nonzero().flatten(0, -1);
            let entries = entries_of(&mask.size(), a.t("lut"), a.t("indices_nonzero_data"), Some(&kept));
            let length = entries.size()[1];
            let all = Tensor::zeros([mask.numel() as i64, length], (Dtype::Float, mask.device()));
            let dense = spread_vectors(&all.index_put(&[Some(kept)], &entries, false), &mask.size(), vector_axis(a));
            let mask = mask.repeat_interleave_self_int(length, vector_axis(a), None);
            return vec![mask.shallow_clone(), dense.masked_select(&mask.not_equal(0))];
        }
        "constexpr_sparse_to_dense" => {
            let mask = a.t("mask");
            let dense = Tensor::zeros([mask.numel() as i64], (Dtype::Float, mask.device()));
            let kept = mask.flatten(0, -1).nonzero().flatten(0, -1);
            dense.index_put(&[Some(kept)], a.t("nonzero_data"), false).reshape(mask.size())
        }
        other => panic!("unknown operation {other}"),
    }]
}

/// The axis that vectors of a look-up table lie along; any axis will do for single values.
fn vector_axis(a: &Arguments) -> i64 {
    if a.0.contains_key("vector_axis") { a.ints("vector_axis")[0] } else { 0 }
}

/// The palette entries that `indices` name for all, or for the `kept`, of the places of `shape`:
/// [places, values of an entry].
fn entries_of(shape: &[i64], lut: &Tensor, indices: &Tensor, kept: Option<&Tensor>) -> Tensor {
    let rank = shape.len();
    let (entries, length) = (lut.size()[rank], lut.size()[rank + 1]);
    let whole: Vec<i64> = shape.iter().copied().chain([entries, length]).collect();
    let mut spread = lut.shallow_clone();
    for (axis, size) in shape.iter().enumerate() {
        spread = spread.repeat_interleave_self_int(size / lut.size()[axis], axis as i64, None);
    }
    assert_eq!(spread.size(), whole);
    let palettes = spread.reshape([-1, entries, length]);
    let palettes = kept.map_or(palettes.shallow_clone(), |kept| palettes.index_select(0, kept));
    let indices = indices.reshape([-1, 1, 1]).expand([-1, 1, length], false);
    palettes.gather(1, &indices, false).squeeze_dim(1)
}

/// Vectors [places, values] as the array whose `axis` has the values of each side by side.
fn spread_vectors(vectors: &Tensor, shape: &[i64], axis: i64) -> Tensor {
    let length = vectors.size()[1];
    let apart: Vec<i64> = shape.iter().copied().chain([length]).collect();
    let mut together = shape.to_vec();
    together[axis as usize] *= length;
    vectors.reshape(&apart).movedim_int(-1, axis + 1).reshape(&together)
}
