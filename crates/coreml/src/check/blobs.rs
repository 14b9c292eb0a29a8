//! Reads `weight.bin` once, front to back, and keeps the facts about each record.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use half::f16;
use sha2::{Digest, Sha256};
use squeeze_base::error::{Error, Result};
use squeeze_base::input;

use crate::blob::{SENTINEL, UNIT, VERSION};
use crate::element::{ArrayType, Element};

/// A blob file whose every record is whole.
pub(super) struct Blobs {
    /// The records by their offset.
    pub records: BTreeMap<u64, Record>,
    /// The file's length.
    pub bytes: u64,
    /// SHA-256 of everything after the header.
    pub sha256: String,
}

/// A record's header, and facts about its data.
pub(super) struct Record {
    pub element: Element,
    pub bytes: u64,
    pub unused_bits: u64,
    /// The number of set bits of its data.
    pub ones: u64,
    /// Whether all values are finite, if it is of a floating-point type.
    pub finite: bool,
}

impl Blobs {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = input::open(path)?;
        let bytes = file.metadata().map_err(Error::read(path))?.len();
        let mut walk = Walk { file: BufReader::with_capacity(1 << 20, file), path, bytes, at: 0, hash: Sha256::new() };
        let records = walk.records()?;
        Ok(Blobs { records, bytes, sha256: squeeze_base::digest::hex(walk.hash) })
    }

    /// The record at `offset`, which must be of the type `array`.
    pub(super) fn record(&self, offset: u64, array: &ArrayType) -> Result<&Record, String> {
        let record = self.records.get(&offset).ok_or_else(|| format!("there is no record at {offset} in weight.bin"))?;
        let Record { element, bytes, unused_bits, finite, .. } = record;
        let bits = bytes.checked_mul(8).and_then(|bits| bits.checked_sub(*unused_bits));
        let wanted = array.numel().and_then(|numel| numel.checked_mul(array.element.bits()));
        if *element != array.element || bits.is_none() || bits != wanted {
            return Err(format!("the record at {offset} has {bytes} bytes of {element}, which are not {array}"));
        }
        if !finite {
            return Err(format!("the record at {offset} has NaN or infinite values"));
        }
        Ok(record)
    }
}

struct Walk<'a> {
    file: BufReader<File>,
    path: &'a Path,
    bytes: u64,
    at: u64,
    hash: Sha256,
}

impl Walk<'_> {
    fn wrong(&self, problem: impl Into<String>) -> Error {
        Error::bad_file(self.path, problem)
    }

    fn records(&mut self) -> Result<BTreeMap<u64, Record>> {
        let header = self.unit("the header")?;
        self.hash = Sha256::new();
        let (count, version) = (u32_at(&header, 0), u32_at(&header, 4));
        if version != VERSION {
            return Err(self.wrong(format!("blob storage of version {version}; {VERSION} is read")));
        }
        if header.iter().skip(8).any(|byte| *byte != 0) {
            return Err(self.wrong("the header's reserved bytes are not zero"));
        }
        let mut records = BTreeMap::new();
        while self.at < self.bytes {
            let offset = self.at.next_multiple_of(UNIT);
            self.zeros(offset - self.at)?;
            let record = self.record(offset)?;
            records.insert(offset, record);
        }
        if records.len() as u64 != u64::from(count) {
            return Err(self.wrong(format!("the header says {count} records, but there are {}", records.len())));
        }
        Ok(records)
    }

    fn record(&mut self, offset: u64) -> Result<Record> {
        let what = format!("the record at {offset}");
        let unit = self.unit(&what)?;
        let (sentinel, code) = (u32_at(&unit, 0), u32_at(&unit, 4));
        let (bytes, start, unused_bits) = (u64_at(&unit, 8), u64_at(&unit, 16), u64_at(&unit, 24));
        if sentinel != SENTINEL {
            return Err(self.wrong(format!("{what} begins with {sentinel:#x}, not {SENTINEL:#x}")));
        }
        let element = Element::all().find(|element| element.blob_code() == Some(code));
        let Some(element) = element else { return Err(self.wrong(format!("{what} is of the unknown dtype {code}"))) };
        if start != offset + UNIT {
            return Err(self.wrong(format!("{what} says that its data begins at {start}")));
        }
        if unused_bits > 7 || (unused_bits > 0 && bytes == 0) {
            return Err(self.wrong(format!("{what} says that {unused_bits} bits are unused")));
        }
        if unit.iter().skip(32).any(|byte| *byte != 0) {
            return Err(self.wrong(format!("{what} has reserved bytes that are not zero")));
        }
        if bytes > self.bytes - self.at {
            return Err(self.wrong(format!("{what} has {bytes} bytes of data, beyond the end of the file")));
        }
        let mut record = Record { element, bytes, unused_bits, ones: 0, finite: true };
        let mut left = bytes;
        let mut block = vec![0; 1 << 16];
        let mut last = 0;
        while left > 0 {
            let length = left.min(block.len() as u64) as usize;
            let part = &mut block[..length];
            self.fill(part)?;
            record.add(part);
            last = part[length - 1];
            left -= length as u64;
        }
        if unused_bits > 0 && last >> (8 - unused_bits) != 0 {
            return Err(self.wrong(format!("{what} has bits set after its last number")));
        }
        Ok(record)
    }

    fn zeros(&mut self, count: u64) -> Result<()> {
        let mut fill = vec![0; count as usize];
        let at = self.at;
        self.fill(&mut fill)?;
        if fill.iter().any(|byte| *byte != 0) {
            return Err(self.wrong(format!("the bytes from {at} on are not zero")));
        }
        Ok(())
    }

    fn unit(&mut self, what: &str) -> Result<[u8; UNIT as usize]> {
        if self.bytes - self.at < UNIT {
            return Err(self.wrong(format!("{what} is cut off")));
        }
        let mut unit = [0; UNIT as usize];
        self.fill(&mut unit)?;
        Ok(unit)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 > self.bytes - self.at {
            return Err(self.wrong("is cut off between two records"));
        }
        self.file.read_exact(bytes).map_err(Error::read(self.path))?;
        self.hash.update(&*bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }
}

impl Record {
    /// Counts and checks a part of the data, which begins and ends at whole numbers.
    fn add(&mut self, part: &[u8]) {
        match self.element {
            Element::BIT => self.ones += part.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>(),
            Element::F16 => {
                self.finite &= part.as_chunks::<2>().0.iter().all(|pair| f16::from_le_bytes(*pair).is_finite());
            }
            Element::F32 => {
                self.finite &= part.as_chunks::<4>().0.iter().all(|quad| f32::from_le_bytes(*quad).is_finite());
            }
            Element::Unsigned(_) | Element::I32 | Element::Bool | Element::Text => {}
        }
    }
}

fn u32_at(unit: &[u8; UNIT as usize], at: usize) -> u32 {
    u32::from_le_bytes(unit[at..at + 4].try_into().expect("the range has four bytes"))
}

fn u64_at(unit: &[u8; UNIT as usize], at: usize) -> u64 {
    u64::from_le_bytes(unit[at..at + 8].try_into().expect("the range has eight bytes"))
}
