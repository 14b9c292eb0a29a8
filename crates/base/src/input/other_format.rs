//! Formats that people have in the place of the file that is wanted, told by their first bytes.

/// The bytes at the start of a file that tell its format.
pub const START: usize = 64;

/// What a file is that begins with `start`, and what to do, as the end of a sentence that begins
/// with its path; `None` for files of no such format.
#[must_use]
pub fn other_format(start: &[u8]) -> Option<&'static str> {
    placeholder(start).or_else(|| {
        // A pickle begins with its protocol, 2 to 5; since PyTorch 1.6 it lies in a ZIP archive.
        let is_pickle = matches!(start, [0x80, 2..=5, b'}' | b']' | b'c' | b'(' | 0x8a, ..]);
        if start.starts_with(b"GGUF") {
            Some("is a GGUF file, whose weights are quantized already; take the fp16 safetensors that it was made from")
        } else if is_pickle || start.starts_with(b"PK\x03\x04") {
            Some(
                "is a pickle (.ckpt, .pt) or another ZIP archive. A pickle can run any code when it is read: convert it to \
                 safetensors with a tool that you trust, such as A1111's checkpoint merger or diffusers' from_single_file and \
                 save_pretrained; unpack an archive of a model's folder",
            )
        } else {
            None
        }
    })
}

/// As [`other_format`], for the texts alone that stand in the place of a file of any kind: those of
/// git-lfs and of web servers.
#[must_use]
pub(super) fn placeholder(start: &[u8]) -> Option<&'static str> {
    let text = start.trim_ascii_start().to_ascii_lowercase();
    if text.starts_with(b"version https://git-lfs") {
        Some(
            "is a pointer of git-lfs, which stands for the file until it is downloaded; run `git lfs pull` in the model's folder, \
             or download the model with `hf download`",
        )
    } else if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") {
        Some(
            "is a web page, as a server sends one in the place of a file that it does not give; download the file again, signed \
             in where the model asks for it (`hf auth login`)",
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::other_format;

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        let told: [(&[u8], &str); 8] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa", "git lfs pull"),
            (b"<!DOCTYPE html><html><title>401</title>", "web page"),
            (b"\n  <HTML>", "web page"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"PK\x03\x04\x14\0", "save_pretrained"),
            (b"\x80\x02}q\0", "save_pretrained"),
            (b"\x80\x02\x8a\x0a", "save_pretrained"),
            (b"\x80\x05]", "save_pretrained"),
        ];
        for (start, expected) in told {
            assert!(other_format(start).is_some_and(|said| said.contains(expected)), "{start:?}");
        }
        // A safetensors header of 32,770 bytes begins like a pickle but for its third byte.
        for start in [&b"\x02\x80\0\0\0\0\0\0{\""[..], b"\x80\x02\0\0\0\0\0\0{\"", b"", b"{}", b"version: 1"] {
            assert_eq!(other_format(start), None, "{start:?}");
        }
    }
}
