//! Reads a container: opens it, decodes every weight and verifies it.
//!
//! A container that the target builds without faults is also decoded here, by the definition in
//! `docs/container.md`. The library must accept it if its values are finite, and must decode the
//! same weights.

use half::f16;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::pipeline::verify;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::choices::Choices;
use crate::layout::{self, Tensor};
use crate::scratch;

/// Runs one input. Its first byte chooses the kind of the other bytes: a file, a file whose hashes
/// are to be corrected, or decisions for building a container with or without faults.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    match choices.below(4) {
        0 => drop(read(choices.rest())),
        1 => drop(read(&sealed(choices.rest()))),
        2 => drop(read(&made(&mut choices, true).0)),
        _ => {
            let (file, weights) = made(&mut choices, false);
            let finite = weights.iter().all(|(_, dense)| dense.iter().all(|value| value.is_finite()));
            let found = read(&file);
            assert_eq!(found.is_some(), finite, "{weights:?}");
            assert!(found.is_none_or(|found| found == weights), "other weights than were stored");
        }
    }
}

/// Reads all parts of a container, and returns the decoded weights if `Container::verify` accepts
/// it.
fn read(file: &[u8]) -> Option<Vec<(String, Vec<f16>)>> {
    let path = scratch::file("unet.squeezed.safetensors", file);
    let _ = Container::open(&path);
    // Hashes reveal most damage, so the container is also read without checking them.
    let container = Container::open_unverified(&path).ok()?;
    let _ = container.info();
    let _ = container.tensors().count();
    let decoded: Vec<_> = container
        .layers()
        .map(|layer| {
            let _ = container.weight(&layer.name);
            (layer.name.clone(), container.decode(&layer.name).ok())
        })
        .collect();
    let whole = container.verify().is_ok();
    // `verify` also compares the weights with the architecture of the UNet, so it may refuse a
    // container that is undamaged.
    assert!(verify(&path).is_err() || whole);
    whole.then(|| decoded.into_iter().map(|(name, dense)| (name, dense.expect("what is whole can be decoded"))).collect())
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Corrects the hashes of the data, the table and the metadata. A file that is not a safetensors
/// file with a header in JSON is returned as it is.
fn sealed(file: &[u8]) -> Vec<u8> {
    let Some((Value::Object(mut header), data)) = layout::taken_apart(file) else { return file.to_vec() };
    let Some(Value::Object(mut metadata)) = header.remove("__metadata__") else { return file.to_vec() };
    let place = |entry: &Value| {
        let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap_or(0);
        (at(0), at(1))
    };
    let mut rows: Vec<_> =
        header.iter().map(|(name, entry)| (place(entry), name, line(&entry["dtype"], &entry["shape"]))).collect();
    rows.sort();
    let table: String = rows.iter().map(|(_, name, line)| format!("{name}={line}\n")).collect();
    seal(&mut metadata, &table, data);
    header.insert("__metadata__".into(), Value::Object(metadata));
    layout::with_header(Value::Object(header).to_string().as_bytes(), data)
}

/// The dtype and the shape of a tensor, as the table of tensors contains them.
fn line(dtype: &Value, shape: &Value) -> String {
    let shape: Vec<String> = shape.as_array().into_iter().flatten().map(Value::to_string).collect();
    format!("{} [{}]", dtype.as_str().unwrap_or_default(), shape.join(", "))
}

/// Sets the hashes of the data, the table and the metadata.
fn seal(metadata: &mut Map<String, Value>, table: &str, data: &[u8]) {
    metadata.insert("data_sha256".into(), sha256(data).into());
    metadata.insert("tensors_sha256".into(), sha256(table.as_bytes()).into());
    metadata.remove("metadata_sha256");
    let lines: String = metadata.iter().map(|(key, value)| format!("{key}={}\n", value.as_str().unwrap_or_default())).collect();
    metadata.insert("metadata_sha256".into(), sha256(lines.as_bytes()).into());
}

/// Builds a container of one to three weights and at least one tensor, with correct hashes and, if
/// `lies` is true, with faults. Returns its bytes, and the weights as `docs/container.md` defines
/// their values.
fn made(choices: &mut Choices, lies: bool) -> (Vec<u8>, Vec<(String, Vec<f16>)>) {
    let (mut rows, mut halves, mut bytes, mut weights) = (Map::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..1 + choices.below(3) {
        let weight = Weight::any(choices, lies);
        let name = format!("{number}.weight");
        let dense = weight.decode();
        let mut row = weight.row();
        row.insert("sha256".into(), sha256(&to_bytes(&dense)).into());
        if lies && choices.rarely(4) {
            let keys = [
                "axis",
                "bits",
                "group_size",
                "kept",
                "masked",
                "scaled",
                "sha256",
                "shape",
                "report",
                "scale_block",
                "vector_length",
                "more",
            ];
            let value = match choices.below(5) {
                0 => Value::Null,
                1 => json!(choices.number()),
                2 => json!([choices.number(), choices.number()]),
                3 => json!(-(i64::from(choices.byte()))),
                _ => json!(choices.byte() % 2 == 0),
            };
            row.insert(choices.of(&keys).into(), value);
        }
        rows.insert(name.clone(), Value::Object(row));
        for tensor in weight.tensors(&name) {
            let section = if tensor.dtype == "F16" { &mut halves } else { &mut bytes };
            section.push(tensor);
        }
        weights.push((name, dense));
    }
    halves.push(Tensor::new("bias", "F16", &[2], vec![0, 0x3c, 0, 0xbc]));
    let mut tensors = halves;
    tensors.extend(bytes);
    if lies && choices.rarely(4) {
        let other = Tensor::any(choices, &["0.weight", "0.weight.mask", "0.weight.scales", "norm"]);
        match choices.below(3) {
            0 => drop(tensors.pop()),
            1 => tensors.push(other),
            _ => tensors.insert(0, other),
        }
    }
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.data.iter().copied()).collect();
    let mut metadata = Map::new();
    let is_new = rows.values().any(|row| row.get("vector_length").is_some() || row.get("scale_block").is_some());
    let version = if is_new != (lies && choices.rarely(16)) { "2" } else { "1" };
    for (key, value) in
        [("format", "sdxl-squeeze"), ("version", version), ("unet_config", "{}"), ("recipe", "null"), ("sources", "[]")]
    {
        metadata.insert(key.into(), value.into());
    }
    metadata.insert("weights".into(), Value::Object(rows).to_string().into());
    // The table sorts tensors by place and then by name. A tensor without data has the place at
    // which the next tensor begins.
    let mut places = Vec::new();
    let mut begin = 0;
    for tensor in &tensors {
        let end = begin + tensor.data.len();
        places.push(((begin, end), &tensor.name, line(&json!(tensor.dtype), &json!(tensor.shape))));
        begin = end;
    }
    places.sort();
    let table: String = places.iter().map(|(_, name, line)| format!("{name}={line}\n")).collect();
    seal(&mut metadata, &table, &data);
    (layout::file(Some(&Value::Object(metadata)), &tensors), weights)
}

fn to_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The parts of a compressed weight.
struct Weight {
    shape: Vec<u64>,
    keep: Option<Vec<bool>>,
    /// The bits, the axis and the group size, if the weight has palettes.
    palette: Option<(u32, usize, usize)>,
    /// The output channels that share an index and a bit of the mask.
    length: usize,
    /// The palettes, or the kept values of a weight without palettes.
    values: Vec<f16>,
    /// The index of each kept element or vector; empty without palettes.
    indices: Vec<u8>,
    /// One for each row, or for each block of a row.
    scales: Option<Vec<f16>>,
    scale_block: Option<usize>,
}

impl Weight {
    fn any(choices: &mut Choices, lies: bool) -> Self {
        // Vectors lie along the output channels and have no scales.
        let length = [1, 1, 2, 3, 4, 16][choices.below(6)];
        let group_size = length * (1 + choices.below(4));
        let grouped = group_size * (1 + choices.below(4));
        let other = 1 + choices.below(9);
        let axis = if length == 1 { choices.below(2) } else { 0 };
        let mut shape = if axis == 0 { vec![grouped as u64, other as u64] } else { vec![other as u64, grouped as u64] };
        if choices.below(2) == 1 {
            shape.extend([1 + choices.below(3) as u64, 1 + choices.below(3) as u64]);
        }
        let palettized = length > 1 || choices.below(4) != 3;
        let numel = shape.iter().product::<u64>() as usize / length;
        // A compressed weight has a mask, palettes, or both.
        let masked = !palettized || choices.below(2) == 1;
        let bits = choices.of(&[1, 2, 3, 4, 6, 8]);
        let keep = masked.then(|| {
            let bytes = choices.bytes(numel.div_ceil(8));
            (0..numel).map(|i| bytes[i / 8] >> (i % 8) & 1 == 1).collect::<Vec<_>>()
        });
        let kept = keep.as_ref().map_or(numel, |keep| keep.iter().filter(|kept| **kept).count());
        let halves = |choices: &mut Choices, count: usize| {
            let bytes = choices.bytes(2 * count);
            bytes.chunks(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect::<Vec<_>>()
        };
        let (values, indices) = if palettized {
            let indices = choices.bytes(kept).iter().map(|index| index & (0xff >> (8 - bits))).collect();
            (halves(choices, (grouped / group_size * length) << bits), indices)
        } else {
            (halves(choices, kept), Vec::new())
        };
        let scaled = palettized && length == 1 && choices.below(2) == 1;
        // A block is shorter than a row.
        let columns = shape[1..].iter().product::<u64>() as usize;
        let scale_block = (scaled && columns > 1 && choices.below(2) == 1).then(|| 1 + choices.below(columns - 1));
        let in_row = scale_block.map_or(1, |block| columns.div_ceil(block));
        let scales = scaled.then(|| halves(choices, shape[0] as usize * in_row));
        let palette = palettized.then_some((bits, axis, group_size));
        let mut weight = Weight { shape, keep, palette, length, values, indices, scales, scale_block };
        if lies && choices.rarely(4) {
            let at = choices.below(weight.shape.len());
            weight.shape[at] = choices.number();
        }
        if lies && choices.rarely(8) {
            weight.values.truncate(choices.below(9));
        }
        weight
    }

    /// Decodes the weight. An element whose value or index is missing because of a fault becomes
    /// zero. Infinite and NaN entries and scales are appended, because the library refuses them
    /// even if no element uses them.
    fn decode(&self) -> Vec<f16> {
        let numel = self.shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n)).filter(|numel| *numel < 1 << 16);
        let numel = numel.unwrap_or(0) as usize;
        let inner = self.shape[2..].iter().fold(1u64, |product, n| product.saturating_mul(*n)).max(1);
        let columns = (inner as usize).saturating_mul(self.shape[1].max(1) as usize);
        let is_kept = |vector: usize| self.keep.as_ref().is_none_or(|keep| keep.get(vector).copied().unwrap_or(false));
        // The number of the index or value of each vector, if it is kept.
        let numbers: Vec<usize> = (0..numel)
            .scan(0, |kept, vector| {
                let number = *kept;
                *kept += usize::from(is_kept(vector));
                Some(number)
            })
            .collect();
        (0..numel)
            .map(|e| {
                let (row, column) = (e as u64 / inner / self.shape[1].max(1), e as u64 / inner % self.shape[1].max(1));
                // Each vector has a bit of the mask, and an index or value if it is kept.
                let vector = row as usize / self.length * columns + e % columns;
                if !is_kept(vector) {
                    return f16::ZERO;
                }
                let k = numbers[vector];
                let entry = match self.palette {
                    None => k,
                    Some((bits, axis, group_size)) => {
                        let group = if axis == 0 { row } else { column } as usize / group_size;
                        let entry = (group << bits) + usize::from(self.indices.get(k).copied().unwrap_or(0));
                        entry * self.length + row as usize % self.length
                    }
                };
                let value = self.values.get(entry).copied().unwrap_or(f16::ZERO);
                match &self.scales {
                    None => value,
                    Some(scales) => {
                        let at = match self.scale_block {
                            None => row as usize,
                            Some(block) => {
                                (row as usize).saturating_mul(columns.div_ceil(block)).saturating_add(e % columns / block)
                            }
                        };
                        let scale = scales.get(at).copied().unwrap_or(f16::ZERO);
                        f16::from_f32(value.to_f32() * scale.to_f32())
                    }
                }
            })
            .chain(self.values.iter().chain(self.scales.iter().flatten()).copied().filter(|value| !value.is_finite()))
            .collect()
    }

    fn row(&self) -> Map<String, Value> {
        let kept = self.keep.as_ref().map_or(self.shape.iter().fold(1u64, |product, n| product.wrapping_mul(*n)), |keep| {
            (self.length * keep.iter().filter(|kept| **kept).count()) as u64
        });
        let mut row = Map::new();
        row.insert("shape".into(), json!(self.shape));
        row.insert("kept".into(), json!(kept));
        row.insert("masked".into(), json!(self.keep.is_some()));
        if let Some((bits, axis, group_size)) = self.palette {
            row.extend(
                [("bits", json!(bits)), ("axis", json!(axis)), ("group_size", json!(group_size))].map(|(k, v)| (k.into(), v)),
            );
        }
        if self.scales.is_some() {
            row.insert("scaled".into(), json!(true));
        }
        if let Some(block) = self.scale_block {
            row.insert("scale_block".into(), json!(block));
        }
        if self.length > 1 {
            row.insert("vector_length".into(), json!(self.length));
        }
        row
    }

    fn tensors(&self, name: &str) -> Vec<Tensor> {
        let half =
            |part: &str, shape: &[u64], values: &[f16]| Tensor::new(format!("{name}.{part}"), "F16", shape, to_bytes(values));
        let packed = |part: &str, bytes: Vec<u8>| Tensor::new(format!("{name}.{part}"), "U8", &[bytes.len() as u64], bytes);
        let mut tensors = Vec::new();
        if let Some(keep) = &self.keep {
            tensors.push(packed("mask", pack(keep.iter().map(|kept| u8::from(*kept)), 1)));
        }
        match self.palette {
            None => tensors.push(half("values", &[self.values.len() as u64], &self.values)),
            Some((bits, ..)) => {
                tensors.push(packed("indices", pack(self.indices.iter().copied(), bits)));
                let length = self.length as u64;
                let shape = [(self.values.len() as u64 / length) >> bits, 1 << bits, length];
                tensors.push(half("palettes", if length > 1 { &shape } else { &shape[..2] }, &self.values));
            }
        }
        if let Some(scales) = &self.scales {
            let rows = self.shape[0].max(1);
            let shape = [rows, scales.len() as u64 / rows];
            let all = [scales.len() as u64];
            tensors.push(half("scales", if self.scale_block.is_some() { &shape } else { &all }, scales));
        }
        tensors
    }
}

/// Packs numbers of `bits` bits each into bytes, lowest bit first.
fn pack(numbers: impl ExactSizeIterator<Item = u8>, bits: u32) -> Vec<u8> {
    let mut bytes = vec![0; (numbers.len() * bits as usize).div_ceil(8)];
    for (number, value) in numbers.enumerate() {
        for bit in 0..bits as usize {
            let k = number * bits as usize + bit;
            bytes[k / 8] |= (value >> bit & 1) << (k % 8);
        }
    }
    bytes
}
