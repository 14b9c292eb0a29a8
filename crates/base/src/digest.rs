//! SHA-256, written as 64 lower-case hex digits.

use std::io::Read;

use sha2::{Digest, Sha256};

/// A finished hash as hex digits.
#[must_use]
pub fn hex(hash: Sha256) -> String {
    hex::encode(hash.finalize())
}

/// The hash of `bytes`.
#[must_use]
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

/// The hash and the number of the bytes that `input` gives until its end.
pub fn of_reader(input: &mut dyn Read) -> std::io::Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok((hex(hash), length)),
            Ok(count) => {
                hash.update(&buffer[..count]);
                length += count as u64;
            }
            Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
}

/// The hash of `key=value` lines, in the order given.
pub fn of_entries<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> String {
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

    #[test]
    fn hashes_are_those_of_fips_180_2() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_reader(&mut &b"abc"[..]).unwrap(), (expected.to_owned(), 3));
        assert_eq!(of_bytes(b"abc"), expected);
        assert_eq!(of_entries([("a", "b")].into_iter()), of_bytes(b"a=b\n"));
    }
}
