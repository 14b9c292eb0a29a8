//! Dense weights with coremltools' compression buffers, for those who convert in Python.
//!
//! coremltools stores neither mask nor indices in a torch model: it finds them again when it converts, from the dense weight and the buffers
//! `_COREML_/weight/compression_type` and `_COREML_/weight/lut` of each layer (`optimize/torch/_utils/metadata_utils.py`,
//! `converters/mil/frontend/torch/converter.py`). In a pruned weight it takes everything up to 2^-10 for pruned, whatever the palette says.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use half::f16;
use serde_json::json;
use tch::{Device, Kind};

use crate::checkpoint::{TensorSource, TensorSpec};
use crate::container::{CompressedWeight, Container, Values};
use crate::coreml::Lut;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::output::write_file;
use crate::progress::{Progress, Task};

/// The largest weight that coremltools drops: fp16's epsilon, 2^-10.
const DROPPED: f32 = 0.000_976_562_5;

/// What to do with weights that coremltools would drop: kept, not zero, and at most 2^-10 in a pruned layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SmallWeights {
    /// Name the layers, and write nothing.
    #[default]
    Refuse,
    /// Make them the next fp16 number above 2^-10, with their sign.
    Move,
}

/// What was moved.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Moved {
    /// The weight.
    pub name: String,
    /// How many of its elements.
    pub elements: u64,
}

/// Writes the UNet's dense weights, in fp16, and the buffers to the safetensors file `path`. Weights are decoded one at a time.
///
/// # Errors
/// [`Error::Argument`] naming the weights of which coremltools would drop some, if they are not to be moved; if a weight cannot be read, or
/// the file cannot be written.
pub fn coremltools(container: &Container, path: &Path, small: SmallWeights, progress: &dyn Progress) -> Result<Vec<Moved>> {
    let tensors = container.unet()?.tensors()?;
    let task = Task::begin(progress, "looking for small weights", "weights", container.layers().len());
    let (mut buffers, mut moved) = (BTreeMap::new(), Vec::new());
    for layer in container.layers() {
        task.advance(&layer.name);
        let weight = container.weight(&layer.name)?;
        let elements = match &weight.mask {
            Some(_) => weight.decode()?.iter().filter(|value| is_dropped(**value)).count() as u64,
            None => 0,
        };
        if elements > 0 {
            moved.push(Moved { name: layer.name.clone(), elements });
        }
        buffers.insert(layer.name, Buffers::of(&weight)?);
    }
    drop(task);
    if small == SmallWeights::Refuse && !moved.is_empty() {
        return Err(refusal(&moved));
    }
    let header = header(container, &tensors, &buffers)?;
    let task = Task::begin(progress, "decoding", "tensors", tensors.len());
    let mut failed = None;
    let written = write_file(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        buffers.values().try_for_each(|buffers| buffers.write_types(out))?;
        out.write_all(&1i64.to_le_bytes())?;
        for buffers in buffers.values() {
            write_halves(out, buffers.lut.iter().flat_map(|lut| &lut.entries).copied().map(|entry| buffers.adjust(entry)))?;
        }
        for tensor in &tensors {
            task.advance(&tensor.name);
            match read(container, tensor) {
                Ok(values) => match buffers.get(&tensor.name) {
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

/// Whether coremltools takes a kept value for pruned. A zero is as good pruned as kept.
fn is_dropped(value: f16) -> bool {
    value != f16::ZERO && value.to_f32().abs() <= DROPPED
}

/// What belongs to a compressed weight.
struct Buffers {
    /// 1 pruned, 2 palettized, in this order.
    types: Vec<i64>,
    lut: Option<Lut>,
    lut_shape: Vec<u64>,
}

impl Buffers {
    fn of(weight: &CompressedWeight) -> Result<Self> {
        let mut types: Vec<i64> = weight.mask.iter().map(|_| 1).collect();
        let Values::Palettized { codebook, .. } = &weight.values else {
            return Ok(Buffers { types, lut: None, lut_shape: Vec::new() });
        };
        types.push(2);
        let lut = Lut::of(weight, codebook)?;
        let lut_shape = lut.array(weight.shape.len()).shape;
        Ok(Buffers { types, lut: Some(lut), lut_shape })
    }

    /// Where anything is pruned, moves a value above what coremltools drops.
    fn adjust(&self, value: f16) -> f16 {
        let above = f16::from_bits(f16::from_f32(DROPPED).to_bits() + 1);
        if self.types.first() == Some(&1) && is_dropped(value) { above.copysign(value) } else { value }
    }

    fn write_types(&self, out: &mut dyn Write) -> std::io::Result<()> {
        self.types.iter().try_for_each(|kind| out.write_all(&kind.to_le_bytes()))
    }
}

/// The safetensors header: the numbers of types first, which are aligned to 8 bytes, then look-up tables, then weights.
fn header(container: &Container, tensors: &[TensorSpec], buffers: &BTreeMap<String, Buffers>) -> Result<Vec<u8>> {
    let mut end = 0;
    let mut entries = serde_json::Map::new();
    let mut place = |name: String, dtype: &str, shape: Vec<u64>, width: u64| {
        let start = end;
        end += width * shape.iter().product::<u64>();
        entries.insert(name, json!({ "data_offsets": [start, end], "dtype": dtype, "shape": shape }));
    };
    let buffer = |weight: &str, key: &str| format!("{}._COREML_/weight/{key}", weight.trim_end_matches(".weight"));
    for (name, buffers) in buffers {
        place(buffer(name, "compression_type"), "I64", vec![buffers.types.len() as u64], 8);
    }
    place("_COREML_/metadata_version".to_owned(), "I64", Vec::new(), 8);
    for (name, buffers) in buffers.iter().filter(|(_, buffers)| buffers.lut.is_some()) {
        place(buffer(name, "lut"), "F16", buffers.lut_shape.clone(), 2);
    }
    for tensor in tensors {
        place(tensor.name.clone(), "F16", tensor.shape.iter().map(|n| *n as u64).collect(), 2);
    }
    let config = serde_json::Value::Object(container.info().unet_config.clone()).to_string();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt", "unet_config": config }));
    let mut header =
        serde_json::to_vec(&entries).map_err(|why| Error::Argument(format!("the header cannot be written: {why}")))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn read(container: &Container, tensor: &TensorSpec) -> Result<Vec<f16>> {
    if container.is_compressed(&tensor.name) {
        return container.decode(&tensor.name);
    }
    let source = container.source(Placement { device: Device::Cpu, kind: Kind::Half });
    Ok(Vec::try_from(&source.tensor(&tensor.name, &tensor.shape)?.f_flatten(0, -1)?)?)
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
