//! A safetensors file that is put together from tensors, right or with lies in its header.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::choices::Choices;

/// Every dtype that has a name in a safetensors file, its bits, and some that have none.
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

/// A tensor of a file that is to be written.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its dtype's name.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its data.
    pub data: Vec<u8>,
    /// What is added to the offsets where it says that its data begins and ends.
    pub lie: [i64; 2],
}

impl Tensor {
    /// A tensor without a lie.
    pub fn new(name: impl Into<String>, dtype: &str, shape: &[u64], data: Vec<u8>) -> Self {
        Tensor { name: name.into(), dtype: dtype.into(), shape: shape.to_vec(), data, lie: [0, 0] }
    }

    /// A tensor of the UNet's or nobody's name, whose data mostly is as long as its shape says.
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

/// The bytes of a file of `tensors`, in their order.
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
        // Written by hand: a name may come twice.
        let _ = write!(header, "{}:{},", json!(name), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
    }
    if header.ends_with(',') {
        header.pop();
    }
    header.push('}');
    with_header(header.as_bytes(), &data)
}

/// The bytes of a file with this header and this data.
pub fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Header and data of a file whose header's length is right and whose header is JSON.
pub fn taken_apart(file: &[u8]) -> Option<(Value, &[u8])> {
    let (length, rest) = file.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (header, data) = rest.split_at_checked(length)?;
    Some((serde_json::from_slice(header).ok()?, data))
}
