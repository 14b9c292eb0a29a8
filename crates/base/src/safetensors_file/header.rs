//! Writes the header of a safetensors file.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::MAX_HEADER;
use crate::error::{Error, Result};

/// The header of a file whose data is written by the caller, in the order in which the tensors are
/// added here.
///
/// The safetensors library would write `__metadata__` in the random order of a `HashMap`; here all
/// keys are sorted, so that equal tensors give equal bytes.
#[derive(Debug)]
pub struct Header {
    entries: BTreeMap<String, Value>,
    end: u64,
}

impl Header {
    /// A header without tensors.
    #[must_use]
    pub fn new(metadata: &BTreeMap<String, String>) -> Self {
        Header { entries: BTreeMap::from([("__metadata__".to_owned(), json!(metadata))]), end: 0 }
    }

    /// Adds a tensor of `bytes` bytes, which follow the data of the tensors added before.
    pub fn push(&mut self, name: &str, dtype: Dtype, shape: &[i64], bytes: u64) {
        let start = self.end;
        self.end += bytes;
        let entry = json!({ "data_offsets": [start, self.end], "dtype": dtype.to_string(), "shape": shape });
        self.entries.insert(name.to_owned(), entry);
    }

    /// All bytes before the data: the header's length, the header, and blanks up to a multiple of 8
    /// bytes, so that the data is aligned.
    ///
    /// # Errors
    /// [`Error::Argument`] if the header is longer than safetensors readers accept.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut header = serde_json::to_vec(&self.entries).expect("maps of text and numbers can be written as JSON");
        header.resize(header.len().next_multiple_of(8), b' ');
        let length = header.len() as u64;
        if length > MAX_HEADER {
            let problem = format!("a safetensors header of {length} bytes is too long; readers accept {MAX_HEADER}");
            return Err(Error::Argument(problem));
        }
        header.splice(0..0, length.to_le_bytes());
        Ok(header)
    }
}
