//! A network's weights as constants of a program: dense ones as values, compressed ones as Core
//! ML's constant expressions.

use half::f16;
use sdxl_pipeline::{StoredNetwork, StoredTensor, UnetWeights};
use squeeze_base::error::{Error, Result};
use squeeze_codebook::Codebook;
use squeeze_container::{CompressedWeight, Packed, Values};

use super::element::{ArrayType, Element};
use super::literal::Literal;
use super::lut::Lut;
use super::program::{Arg, ProgramBuilder, Var};

/// The source of a network's tensors, as they are stored.
pub(super) trait StoredTensors {
    /// Reads the tensor `name` of `shape`.
    ///
    /// # Errors
    /// If it is missing, damaged or of another shape, or has a value that fp16 does not hold.
    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor>;
}

impl StoredTensors for UnetWeights<'_> {
    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor> {
        self.read(name, shape)
    }
}

impl StoredTensors for &dyn StoredNetwork {
    fn read_stored(&self, name: &str, shape: &[i64]) -> Result<StoredTensor> {
        StoredNetwork::read_stored(*self, name, shape)
    }
}

/// Adds a tensor to a program that computes in fp32. Kernels and matrices are stored as halves,
/// which the constant expression `constexpr_cast` widens; vectors, which are small, as fp32.
/// Palettes are stored in fp32, whose entries `constexpr_lut_to_dense` gives as they are.
///
/// # Errors
/// [`Error::Argument`] if the tensor is pruned: Core ML's masks are of fp16 values.
pub(super) fn add_wide(program: &mut ProgramBuilder, name: &str, shape: &[u64], stored: StoredTensor) -> Result<Var> {
    let values = match stored {
        StoredTensor::Dense(values) => values,
        StoredTensor::Compressed(weight) => {
            let (None, Values::Palettized { codebook, indices }) = (&weight.mask, &weight.values) else {
                return Err(Error::Argument(format!("`{name}` is pruned, but its network is computed in fp32")));
            };
            return add_palettized(program, name, shape, &weight, codebook, indices, Element::F32);
        }
    };
    if shape.len() < 2 {
        let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
        return program.floats(name, shape, &values);
    }
    let source = inline(program, (name, "source_val"), ArrayType::new(Element::F16, shape), &bytes_of(&values))?;
    let dtype = Arg::InlineLiteral(Literal::text("fp32"));
    program.op("constexpr_cast", name, &[("source_val", source), ("output_dtype", dtype)])
}

fn bytes_of(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Adds a tensor to the program as the constant `name` of `shape`, which may have additional
/// dimensions of 1.
pub(super) fn add(program: &mut ProgramBuilder, name: &str, shape: &[u64], stored: StoredTensor) -> Result<Var> {
    let weight = match stored {
        StoredTensor::Dense(values) => return program.halves(name, shape, &values),
        StoredTensor::Compressed(weight) => weight,
    };
    let CompressedWeight { mask, values, .. } = &weight;
    let flat = |element, length: usize| ArrayType::new(element, [length as u64]);
    // The shape of mask and indices: a vector of output channels has one of each.
    let vector_length = weight.vector_length() as u64;
    let mut vectors = shape.to_vec();
    vectors.iter_mut().take(1).for_each(|outputs| *outputs /= vector_length);
    let mask = mask.as_ref().map(|mask| (ArrayType::new(Element::BIT, vectors.clone()), mask));
    match (mask, values) {
        // Core ML has no empty arrays: one element is kept, and it is zero.
        (Some((_, mask)), _) if mask.kept() == 0 => {
            let array = ArrayType::new(Element::BIT, shape);
            let mut bytes = vec![0; weight.numel().div_ceil(8)];
            bytes.iter_mut().take(1).for_each(|byte| *byte = 1);
            let one = flat(Element::F16, 1);
            let parameters = [
                ("nonzero_data", inline(program, (name, "nonzero_data"), one, &[0, 0])?),
                ("mask", inline(program, (name, "mask"), array, &bytes)?),
            ];
            program.op("constexpr_sparse_to_dense", name, &parameters)
        }
        (Some((array, mask)), Values::Plain(values)) => {
            let bytes = bytes_of(values);
            let parameters = [
                ("mask", inline(program, (name, "mask"), array, mask.bytes())?),
                ("nonzero_data", inline(program, (name, "nonzero_data"), flat(Element::F16, values.len()), &bytes)?),
            ];
            program.op("constexpr_sparse_to_dense", name, &parameters)
        }
        (mask, Values::Palettized { codebook, indices }) => {
            let lut = Lut::of(&weight, codebook)?;
            let (lut_array, lut_bytes) = (lut.array(shape.len()), lut.bytes());
            let element = Element::Unsigned(codebook.bits);
            let vector_axis = (vector_length > 1).then_some(("vector_axis", Arg::InlineLiteral(Literal::Int(0))));
            let Some((array, mask)) = mask else {
                return add_palettized(program, name, shape, &weight, codebook, indices, Element::F16);
            };
            let mut parameters = vec![
                ("indices_mask", inline(program, (name, "indices_mask"), array, mask.bytes())?),
                (
                    "indices_nonzero_data",
                    inline(program, (name, "indices_nonzero_data"), flat(element, indices.len()), indices.bytes())?,
                ),
                ("lut", inline(program, (name, "lut"), lut_array, &lut_bytes)?),
            ];
            parameters.extend(vector_axis);
            let sparse = program.ops("constexpr_lut_to_sparse", &format!("{name}_palettized"), &parameters)?;
            let [mask, values] = &sparse[..] else {
                return Err(Error::internal(format!("`{name}` did not become a mask and values")));
            };
            program.op("constexpr_sparse_to_dense", name, &[("mask", mask.into()), ("nonzero_data", values.into())])
        }
        (None, Values::Plain(values)) => program.halves(name, shape, values),
    }
}

/// Adds a weight of palettes and indices alone. `values` is the dtype of its entries: fp16, or
/// fp32, which holds each fp16 number exactly.
fn add_palettized(
    program: &mut ProgramBuilder,
    name: &str,
    shape: &[u64],
    weight: &CompressedWeight,
    codebook: &Codebook,
    indices: &Packed,
    values: Element,
) -> Result<Var> {
    let lut = Lut::of(weight, codebook)?;
    let (array, bytes) = match values {
        Element::F32 => (ArrayType::new(Element::F32, lut.array(shape.len()).shape), lut.wide_bytes()),
        _ => (lut.array(shape.len()), lut.bytes()),
    };
    let vector_length = weight.vector_length() as u64;
    let mut vectors = shape.to_vec();
    vectors.iter_mut().take(1).for_each(|outputs| *outputs /= vector_length);
    let element = Element::Unsigned(codebook.bits);
    let mut parameters = vec![
        ("indices", inline(program, (name, "indices"), ArrayType::new(element, vectors), indices.bytes())?),
        ("lut", inline(program, (name, "lut"), array, &bytes)?),
    ];
    parameters.extend((vector_length > 1).then_some(("vector_axis", Arg::InlineLiteral(Literal::Int(0)))));
    program.op("constexpr_lut_to_dense", name, &parameters)
}

/// A parameter of the constant expression `name` whose value is inside the operation.
fn inline<'a>(program: &mut ProgramBuilder, (name, parameter): (&str, &str), array: ArrayType, bytes: &[u8]) -> Result<Arg<'a>> {
    let value = program.data(&format!("{name}.{parameter}"), &array, bytes)?;
    Ok(Arg::Inline(array, value))
}
