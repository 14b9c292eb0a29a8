//! Dense weights with coremltools' compression buffers, for conversion in Python.
//!
//! coremltools stores neither mask nor indices in a torch model. On conversion it finds them again
//! from the dense weight and each layer's buffers `_COREML_/weight/compression_type` and
//! `_COREML_/weight/lut` (`optimize/torch/_utils/metadata_utils.py`,
//! `converters/mil/frontend/torch/converter.py`). In a pruned weight it takes everything up to
//! 2^-10 as pruned, whatever the palette. Palettes of vectors also have the buffer `vector_axis`;
//! with a mask coremltools 9.0 cannot convert them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use half::f16;
use safetensors::Dtype;
use sdxl_model::checkpoint::TensorSpec;
use sdxl_pipeline::{StoredTensor, UnetWeights};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;
use squeeze_base::progress::{Progress, Task};
use squeeze_base::safetensors_file::Header;
use squeeze_container::{CompressedWeight, Values};
use squeeze_coreml::{Lut, check_scales};

/// The largest weight that coremltools drops: fp16's epsilon, 2^-10.
const DROPPED: f32 = 0.000_976_562_5;

/// The treatment of kept, non-zero weights of at most 2^-10 in pruned layers, which coremltools
/// would drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SmallWeights {
    /// Refuse to write, and name the layers.
    #[default]
    Refuse,
    /// Round them, away from zero, to the next fp16 number above 2^-10.
    Move,
}

/// The moved elements of a weight.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Moved {
    /// The weight.
    pub name: String,
    /// The number of moved elements.
    pub elements: u64,
}

/// Writes the UNet's dense weights, in fp16, and the buffers to the safetensors file `path`.
/// Weights are decoded one at a time.
///
/// # Errors
/// [`Error::Argument`] naming the weights of which coremltools would drop some, if they are not to
/// be moved, those that are pruned and have palettes of vectors, or those with scales for blocks of
/// columns; if a weight cannot be read, or the file cannot be written.
pub fn coremltools(weights: UnetWeights, path: &Path, small: SmallWeights, progress: &dyn Progress) -> Result<Vec<Moved>> {
    let tensors = weights.chain()?.tensors()?;
    check_scales(weights)?;
    let compressed = || tensors.iter().filter(|tensor| weights.is_compressed(&tensor.name));
    let task = Task::begin(progress, "looking for small weights", "weights", compressed().count());
    let mut buffers = BTreeMap::new();
    for TensorSpec { name, shape } in compressed() {
        task.advance(name);
        if let StoredTensor::Compressed(weight) = weights.read(name, shape)? {
            buffers.insert(name.clone(), Buffers::of(&weight)?);
        }
    }
    drop(task);
    let masked_vectors: Vec<&str> =
        buffers.iter().filter(|(_, buffers)| buffers.has_vectors && buffers.is_pruned()).map(|(name, _)| name.as_str()).collect();
    if !masked_vectors.is_empty() {
        return Err(masked_vectors_refusal(&masked_vectors));
    }
    let moved = buffers.iter().filter(|(_, buffers)| buffers.small > 0);
    let moved: Vec<Moved> = moved.map(|(name, buffers)| Moved { name: name.clone(), elements: buffers.small }).collect();
    if small == SmallWeights::Refuse && !moved.is_empty() {
        return Err(refusal(&moved));
    }
    let header = header(weights.config(), &tensors, &buffers)?;
    let task = Task::begin(progress, "decoding", "tensors", tensors.len());
    let mut failed = None;
    let written = write_file(path, |out| {
        out.write_all(&header)?;
        buffers.values().try_for_each(|buffers| buffers.write_types(out))?;
        // The axis of vectors is 0.
        buffers.values().filter(|buffers| buffers.has_vectors).try_for_each(|_| out.write_all(&0i64.to_le_bytes()))?;
        out.write_all(&1i64.to_le_bytes())?;
        for buffers in buffers.values() {
            write_halves(out, buffers.lut.iter().flat_map(|lut| &lut.entries).copied().map(|entry| buffers.adjust(entry)))?;
        }
        for TensorSpec { name, shape } in &tensors {
            task.advance(name);
            match weights.decode(name, shape) {
                Ok(values) => match buffers.get(name) {
                    Some(buffers) => write_halves(out, values.into_iter().map(|value| buffers.adjust(value)))?,
                    None => write_halves(out, values.into_iter())?,
                },
                Err(why) => {
                    failed = Some(why);
                    return Err(std::io::Error::other("a weight could not be read"));
                }
            }
        }
        Ok(())
    });
    match failed {
        Some(why) => Err(why),
        None => written.map(|()| moved),
    }
}

/// Whether coremltools takes a kept value as pruned. A kept zero is no loss.
fn is_dropped(value: f16) -> bool {
    value != f16::ZERO && value.to_f32().abs() <= DROPPED
}

/// The compression buffers of one weight.
struct Buffers {
    /// The compressions: 1 pruned, 2 palettized, in this order.
    types: Vec<i64>,
    lut: Option<Lut>,
    lut_shape: Vec<i64>,
    /// Whether the palettes are of vectors.
    has_vectors: bool,
    /// The number of elements that coremltools would drop.
    small: u64,
}

impl Buffers {
    fn of(weight: &CompressedWeight) -> Result<Self> {
        let small = match &weight.mask {
            Some(_) => weight.decode()?.iter().filter(|value| is_dropped(**value)).count() as u64,
            None => 0,
        };
        let mut types: Vec<i64> = weight.mask.iter().map(|_| 1).collect();
        let Values::Palettized { codebook, .. } = &weight.values else {
            return Ok(Buffers { types, lut: None, lut_shape: Vec::new(), has_vectors: false, small });
        };
        types.push(2);
        let lut = Lut::of(weight, codebook)?;
        let lut_shape = lut.array(weight.shape.len()).shape.iter().map(|n| *n as i64).collect();
        Ok(Buffers { types, lut: Some(lut), lut_shape, has_vectors: codebook.vector_length > 1, small })
    }

    fn is_pruned(&self) -> bool {
        self.types.first() == Some(&1)
    }

    /// In a pruned weight, moves a value above the limit of coremltools.
    fn adjust(&self, value: f16) -> f16 {
        let above = f16::from_bits(f16::from_f32(DROPPED).to_bits() + 1);
        if self.is_pruned() && is_dropped(value) { above.copysign(value) } else { value }
    }

    fn write_types(&self, out: &mut dyn Write) -> std::io::Result<()> {
        self.types.iter().try_for_each(|kind| out.write_all(&kind.to_le_bytes()))
    }
}

/// The safetensors header: the compression types first, whose elements have 8 bytes, then look-up
/// tables, then weights.
fn header(config: &Map<String, Value>, tensors: &[TensorSpec], buffers: &BTreeMap<String, Buffers>) -> Result<Vec<u8>> {
    let config = Value::Object(config.clone()).to_string();
    let mut header = Header::new(&BTreeMap::from([("format".into(), "pt".into()), ("unet_config".into(), config)]));
    let mut push = |name: &str, dtype: Dtype, shape: &[i64]| {
        let elements: i64 = shape.iter().product();
        header.push(name, dtype, shape, elements as u64 * (dtype.bitsize() / 8) as u64);
    };
    let buffer = |weight: &str, key: &str| format!("{}._COREML_/weight/{key}", weight.trim_end_matches(".weight"));
    for (name, buffers) in buffers {
        push(&buffer(name, "compression_type"), Dtype::I64, &[buffers.types.len() as i64]);
    }
    for (name, _) in buffers.iter().filter(|(_, buffers)| buffers.has_vectors) {
        push(&buffer(name, "vector_axis"), Dtype::I64, &[]);
    }
    push("_COREML_/metadata_version", Dtype::I64, &[]);
    for (name, buffers) in buffers.iter().filter(|(_, buffers)| buffers.lut.is_some()) {
        push(&buffer(name, "lut"), Dtype::F16, &buffers.lut_shape);
    }
    for TensorSpec { name, shape } in tensors {
        push(name, Dtype::F16, shape);
    }
    header.to_bytes()
}

fn write_halves(out: &mut dyn Write, values: impl Iterator<Item = f16>) -> std::io::Result<()> {
    const BLOCK: usize = 1 << 16;
    let mut bytes = Vec::with_capacity(BLOCK + 2);
    for value in values {
        bytes.extend(value.to_le_bytes());
        if bytes.len() >= BLOCK {
            out.write_all(&bytes)?;
            bytes.clear();
        }
    }
    out.write_all(&bytes)
}

fn masked_vectors_refusal(names: &[&str]) -> Error {
    const SHOWN: usize = 8;
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    let shown: Vec<&str> = names.iter().copied().take(SHOWN).collect();
    Error::Argument(format!(
        "coremltools 9.0 cannot convert weights that are pruned and have vector palettes, as {} are: {}{more}; --to coreml has no such \
         limit",
        names.len(),
        shown.join(", "),
    ))
}

fn refusal(moved: &[Moved]) -> Error {
    const SHOWN: usize = 8;
    let shown: Vec<String> = moved.iter().take(SHOWN).map(|row| format!("{} ({})", row.name, row.elements)).collect();
    let more = if moved.len() > SHOWN { format!(" and {} more", moved.len() - SHOWN) } else { String::new() };
    Error::Argument(format!(
        "coremltools drops kept weights of at most 2^-10 in pruned layers, which {} have: {}{more}; --small-weights move makes them a \
         little larger, --to coreml has no such limit",
        moved.len(),
        shown.join(", "),
    ))
}
