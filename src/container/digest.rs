//! SHA-256 as the container's hashes are written.

use std::fmt::Write;
use std::io::Read;

use half::f16;
use sha2::{Digest, Sha256};

use super::half_bytes;

/// A finished hash as 64 lower-case hex digits.
fn hex(hash: Sha256) -> String {
    hash.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The hash of fp16 values as little-endian bytes.
pub(super) fn of_values(values: &[f16]) -> String {
    let mut hash = Sha256::new();
    half_bytes::for_each_block(values, |bytes| hash.update(bytes));
    hex(hash)
}

/// The hash and the number of the bytes that `input` gives until its end.
pub(super) fn of_reader(input: &mut dyn Read) -> std::io::Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok((hex(hash), length)),
            Ok(count) => {
                hash.update(buffer.get(..count).unwrap_or_default());
                length += count as u64;
            }
            Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
}

/// The hash of `key=value` lines, in the order given.
pub(super) fn of_entries<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut hash = Sha256::new();
    for (key, value) in entries {
        for piece in [key.as_bytes(), b"=", value.as_bytes(), b"\n"] {
            hash.update(piece);
        }
    }
    hex(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2's example.
    #[test]
    fn abc() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_reader(&mut &b"abc"[..]).unwrap(), (expected.to_owned(), 3));
        let values = [f16::from_le_bytes(*b"ab"), f16::from_le_bytes(*b"c\0")];
        let (whole, _) = of_reader(&mut &b"abc\0"[..]).unwrap();
        assert_eq!(of_values(&values), whole);
    }
}
