//! The sizes of a sweep.

use std::str::FromStr;

use crate::compress::MeanBits;

/// A range of mean bits a compressed weight: `2.0..4.0:0.5` is 2.0, 2.5, 3.0, 3.5 and 4.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sweep {
    /// All three in thousandths of a bit, so that sums are exact.
    low: u32,
    high: u32,
    step: u32,
}

impl Sweep {
    /// The most sizes.
    const MOST: u32 = 100;
    /// The step of a range that names none.
    const STEP: u32 = 500;

    /// The sizes, ascending. The end of the range is one of them if steps lead to it.
    pub fn sizes(self) -> impl Iterator<Item = MeanBits> {
        (self.low..=self.high).step_by(self.step as usize).map(MeanBits::of_thousandths)
    }
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (range, step) = text.split_once(':').map_or((text, None), |(range, step)| (range, Some(step)));
        let ends = range.split_once("..").and_then(|(low, high)| Some((thousandths(low)?, thousandths(high)?)));
        let step = step.map_or(Some(Self::STEP), thousandths);
        let (Some((low, high)), Some(step)) = (ends, step) else {
            return Err("is not LOW..HIGH or LOW..HIGH:STEP in bits, such as 2.0..4.0:0.5, with at most three decimals".into());
        };
        if low == 0 || step == 0 || low > high || high > 16_000 {
            return Err("needs 0 < LOW <= HIGH <= 16 and a STEP above 0".into());
        }
        let sizes = (high - low) / step + 1;
        if sizes > Self::MOST {
            return Err(format!("has {sizes} sizes, more than {}; take a larger step", Self::MOST));
        }
        Ok(Sweep { low, high, step })
    }
}

/// A decimal number of at most two digits before the point and three after it, times 1000.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit());
    if whole.is_empty() || whole.len() > 2 || decimals.len() > 3 || !is_number(whole) || !is_number(decimals) {
        return None;
    }
    let decimals: u32 = format!("{decimals:0<3}").parse().ok()?;
    Some(1000 * whole.parse::<u32>().ok()? + decimals)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(text: &str) -> Vec<String> {
        text.parse::<Sweep>().unwrap().sizes().map(|size| size.to_string()).collect()
    }

    #[test]
    fn a_range_has_its_ends_and_exact_steps() {
        assert_eq!(sizes("2.0..4.0"), ["2.0", "2.5", "3.0", "3.5", "4.0"]);
        assert_eq!(sizes("2..3:0.25"), ["2.0", "2.25", "2.5", "2.75", "3.0"]);
        assert_eq!(sizes("2.1..2.4:0.1"), ["2.1", "2.2", "2.3", "2.4"]);
        assert_eq!(sizes("3..3"), ["3.0"]);
        // Steps that do not lead to the end stop before it.
        assert_eq!(sizes("2.0..3.2:0.5"), ["2.0", "2.5", "3.0"]);
        assert_eq!(sizes("1.125..16:14.875"), ["1.125", "16.0"]);
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "2",
            "2..",
            "..4",
            "4..2",
            "0..4",
            "2..17",
            "2..4:0",
            "2..4:",
            "2..4:x",
            "-1..4",
            "2.0005..4",
            "2..4:0.01",
            "1e0..4",
        ] {
            assert!(text.parse::<Sweep>().is_err(), "{text}");
        }
    }
}
