//! The largest magnitude among stored values, and whether all are finite.
//!
//! Without their sign, floating-point numbers are ordered as the integers of their bits, with
//! infinity and then NaN at the end. One maximum over integers therefore finds the largest
//! magnitude and whether all values are finite.

use safetensors::Dtype;

/// The floating-point types that weights come in.
#[derive(Debug, Clone, Copy)]
enum Float {
    F64,
    F32,
    F16,
    BF16,
}

/// The magnitudes of the part of a tensor that has been read so far.
#[derive(Debug, Clone)]
pub struct Magnitudes {
    float: Float,
    seen: u64,
    /// The bits of the largest magnitude.
    largest: u64,
    not_finite: Option<u64>,
}

impl Magnitudes {
    /// No values yet; `None` if `dtype` is not a floating-point type of weights.
    #[must_use]
    pub fn new(dtype: Dtype) -> Option<Self> {
        let float = match dtype {
            Dtype::F64 => Float::F64,
            Dtype::F32 => Float::F32,
            Dtype::F16 => Float::F16,
            Dtype::BF16 => Float::BF16,
            _ => return None,
        };
        Some(Magnitudes { float, seen: 0, largest: 0, not_finite: None })
    }

    /// Adds the next values; `bytes` ends with a whole one.
    pub fn add(&mut self, bytes: &[u8]) {
        match self.float {
            Float::F64 => self.look(bytes, |value| u64::from_le_bytes(value) & (u64::MAX >> 1)),
            Float::F32 => self.look(bytes, |value| u32::from_le_bytes(value) & (u32::MAX >> 1)),
            Float::F16 | Float::BF16 => self.look(bytes, |value| u16::from_le_bytes(value) & (u16::MAX >> 1)),
        }
    }

    fn look<const N: usize, T: Ord + Copy + Default + Into<u64>>(&mut self, bytes: &[u8], magnitude: impl Fn([u8; N]) -> T) {
        let values = bytes.as_chunks::<N>().0;
        let largest = values.iter().fold(T::default(), |largest, value| largest.max(magnitude(*value))).into();
        if largest >= self.infinity() && self.not_finite.is_none() {
            let first = values.iter().position(|value| magnitude(*value).into() >= self.infinity());
            self.not_finite = first.map(|first| self.seen + first as u64);
        }
        self.largest = self.largest.max(largest);
        self.seen += values.len() as u64;
    }

    /// The bits of infinity.
    fn infinity(&self) -> u64 {
        match self.float {
            Float::F64 => f64::INFINITY.to_bits(),
            Float::F32 => f32::INFINITY.to_bits().into(),
            Float::BF16 => half::bf16::INFINITY.to_bits().into(),
            Float::F16 => half::f16::INFINITY.to_bits().into(),
        }
    }

    /// The largest magnitude, if all values are finite.
    #[must_use]
    pub fn largest(&self) -> f64 {
        match self.float {
            Float::F64 => f64::from_bits(self.largest),
            Float::F32 => f32::from_bits(self.largest as u32).into(),
            Float::BF16 => half::bf16::from_bits(self.largest as u16).to_f64(),
            Float::F16 => half::f16::from_bits(self.largest as u16).to_f64(),
        }
    }

    /// Checks that all values are finite in `dtype`.
    ///
    /// # Errors
    /// A sentence that continues the tensor's name.
    pub fn check(&self, dtype: Dtype) -> Result<(), String> {
        if let Some(first) = self.not_finite {
            return Err(format!("has NaN or infinite values (first at index {first})"));
        }
        let largest = self.largest();
        if dtype == Dtype::F16 && largest >= FIRST_BEYOND_FP16 {
            return Err(format!(
                "has values of up to {largest:e}, but fp16 ends at 65504: compute with --dtype f32 or bf16; containers and Core ML packages \
                 hold fp16, so for them scale the rows of this layer down first, and what reads its output up"
            ));
        }
        if dtype == Dtype::F32 && largest > f64::from(f32::MAX) {
            return Err(format!("has values of up to {largest:e}, which fp32 does not hold"));
        }
        Ok(())
    }
}

/// The least number that is rounded to infinity in fp16; its largest finite one is 65504.
const FIRST_BEYOND_FP16: f64 = 65_520.0;

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn of(dtype: Dtype, bytes: &[u8]) -> Magnitudes {
        let mut all = Magnitudes::new(dtype).unwrap();
        all.add(bytes);
        all
    }

    /// The bytes of `values` in each dtype.
    fn in_all(values: &[f64]) -> [(Dtype, Vec<u8>); 4] {
        [
            (Dtype::F64, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            (Dtype::F32, values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()),
            (Dtype::F16, values.iter().flat_map(|value| f16::from_f64(*value).to_le_bytes()).collect()),
            (Dtype::BF16, values.iter().flat_map(|value| bf16::from_f64(*value).to_le_bytes()).collect()),
        ]
    }

    #[test]
    fn the_largest_magnitude_and_the_first_that_is_none() {
        for (dtype, bytes) in in_all(&[0.0, -3.0, 2.5, -0.0]) {
            let found = of(dtype, &bytes);
            assert_eq!((found.largest(), found.not_finite, found.check(Dtype::F16)), (3.0, None, Ok(())), "{dtype:?}");
        }
        for bad in [f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for (dtype, bytes) in in_all(&[1.0, 2.0, 3.0, bad, f64::NAN]) {
                let mut found = Magnitudes::new(dtype).unwrap();
                // Piece by piece, as a file is read.
                bytes.chunks(bytes.len() / 5).for_each(|piece| found.add(piece));
                assert_eq!(found.not_finite, Some(3), "{dtype:?} {bad}");
                assert!(found.check(Dtype::F32).unwrap_err().contains("NaN or infinite values (first at index 3)"));
            }
        }
        assert!(Magnitudes::new(Dtype::I64).is_none());
    }

    #[test]
    fn what_fp16_cannot_hold_is_what_it_would_round_to_infinity() {
        for value in [65_504.0, 65_519.99, 65_520.0, 7e4, 1e30] {
            let bytes = (value as f32).to_le_bytes();
            let fits = f16::from_f32(value as f32).is_finite();
            assert_eq!(of(Dtype::F32, &bytes).check(Dtype::F16).is_ok(), fits, "{value}");
            assert!(of(Dtype::F32, &bytes).check(Dtype::BF16).is_ok());
        }
        let said = of(Dtype::BF16, &bf16::from_f32(-7e4).to_le_bytes()).check(Dtype::F16).unwrap_err();
        assert!(said.contains("up to 7.0144e4") && said.contains("--dtype"), "{said}");
        assert!(of(Dtype::F64, &1e39f64.to_le_bytes()).check(Dtype::F32).is_err());
    }
}
