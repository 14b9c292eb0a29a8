//! Safetensors files that are built from tensors, with or without wrong entries in their headers.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::choices::Choices;

/// All dtypes of safetensors files with their bits, and some names that are not dtypes.
pub const DTYPES: [(&str, u64); 14] = [
    ("F16", 16),
    ("U8", 8),
    ("F32", 32),
    ("BF16", 16),
    ("F64", 64),
    ("I64", 64),
    ("BOOL", 8),
    ("I8", 8),
    ("F8_E4M3", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("C64", 64),
    ("f16", 16),
    ("", 0),
];

/// A tensor that is to be written to a file.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The tensor's name.
    pub name: String,
    /// The name of the tensor's dtype.
    pub dtype: String,
    /// The tensor's shape.
    pub shape: Vec<u64>,
    /// The tensor's data.
    pub data: Vec<u8>,
    /// Numbers that are added to the begin and the end of the data in the header; zero if the
    /// header is to be correct.
    pub lie: [i64; 2],
}

impl Tensor {
    /// Creates a tensor whose offsets in the header are correct.
    pub fn new(name: impl Into<String>, dtype: &str, shape: &[u64], data: Vec<u8>) -> Self {
        Tensor { name: name.into(), dtype: dtype.into(), shape: shape.to_vec(), data, lie: [0, 0] }
    }

    /// Creates a tensor, mostly with one of `names` and with as many bytes as its dtype and shape
    /// require.
    pub fn any(choices: &mut Choices, names: &[&str]) -> Self {
        let name = match choices.rarely(8) {
            true => String::from_utf8_lossy(&choices.bytes(3)).into_owned(),
            false => choices.of(names).to_owned(),
        };
        let (dtype, bits) = choices.of(&DTYPES);
        let shape: Vec<u64> =
            (0..choices.below(6)).map(|_| if choices.rarely(8) { choices.number() } else { choices.below(7) as u64 }).collect();
        let bytes = shape.iter().try_fold(bits, |product, n| product.checked_mul(*n)).map_or(0, |bits| bits / 8);
        let data = choices.bytes(bytes.min(1 << 12) as usize);
        let mut tensor = Tensor::new(name, dtype, &shape, data);
        if choices.rarely(16) {
            tensor.lie = [choices.number() as i64, choices.number() as i64];
        }
        tensor
    }
}

/// Builds a safetensors file that contains `tensors` in this order.
pub fn file(metadata: Option<&Value>, tensors: &[Tensor]) -> Vec<u8> {
    let mut header = String::from("{");
    if let Some(metadata) = metadata {
        let _ = write!(header, "\"__metadata__\":{metadata},");
    }
    let mut data: Vec<u8> = Vec::new();
    for Tensor { name, dtype, shape, data: content, lie } in tensors {
        let begin = data.len() as i64;
        data.extend(content);
        let offsets = [begin.wrapping_add(lie[0]) as u64, (data.len() as i64).wrapping_add(lie[1]) as u64];
        // The header is written by hand, because names may occur twice in it.
        let _ = write!(header, "{}:{},", json!(name), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
    }
    if header.ends_with(',') {
        header.pop();
    }
    header.push('}');
    with_header(header.as_bytes(), &data)
}

/// Builds a safetensors file from a header and data. The length of the header is correct.
pub fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Splits a file into header and data. Returns `None` if the length of the header is wrong or the
/// header is not JSON.
pub fn taken_apart(file: &[u8]) -> Option<(Value, &[u8])> {
    let (length, rest) = file.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (header, data) = rest.split_at_checked(length)?;
    Some((serde_json::from_slice(header).ok()?, data))
}
