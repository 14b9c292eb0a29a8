//! The memory of this process, on systems that report it (Linux, macOS), and sizes as text.

use crate::error::{Error, Result};
use crate::shorten::shorten;

#[cfg(target_os = "linux")]
#[path = "linux.rs"]
mod system;
#[cfg(target_os = "macos")]
#[path = "macos.rs"]
mod system;
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
#[path = "unknown.rs"]
mod system;

/// Peak resident bytes since the start of the process or the last [`reset_peak`]; none if the
/// system does not report them.
#[must_use]
pub fn peak() -> Option<u64> {
    system::peak()
}

/// Resets the peak to the bytes that are resident now; returns whether the system allowed it.
#[must_use]
pub fn reset_peak() -> bool {
    system::reset_peak()
}

/// Bytes that this process can still allocate without swapping. Linux: the least of the system's
/// available memory and the remainder of the process's control group. macOS: the pages that are
/// free or inactive. None if the system does not report them.
#[must_use]
pub fn available() -> Option<u64> {
    system::available()
}

/// Parses a size: a number of bytes, or a number with the unit KiB, MiB, GiB or TiB (`8GiB`, `512
/// MiB`, `1.5GiB`).
///
/// # Errors
/// [`Error::Argument`] for any other text. KB, MB and GB are refused because they are ambiguous.
pub fn parse_size(text: &str) -> Result<u64> {
    parse(text, |unit| match unit {
        "K" | "KB" | "M" | "MB" | "G" | "GB" => Err("use KiB, MiB or GiB"),
        _ => Err("the units are KiB, MiB, GiB and TiB"),
    })
}

/// Parses the largest size of a file: as [`parse_size`], or with the unit kB, MB or GB (`1GB`),
/// which count by thousands as those of disks and of app stores. That is the smaller one of their
/// two meanings, so that a file within it is within the other one too.
///
/// # Errors
/// [`Error::Argument`] for any other text.
pub fn parse_file_size(text: &str) -> Result<u64> {
    parse(text, |unit| match unit {
        "kB" | "KB" => Ok(1e3),
        "MB" => Ok(1e6),
        "GB" => Ok(1e9),
        _ => Err("the units are MB and GB, KiB, MiB, GiB and TiB"),
    })
}

/// Parses a number with a unit. `other` gives the bytes of units that do not count by 1,024, or a
/// reason to refuse them.
fn parse(text: &str, other: impl FnOnce(&str) -> Result<f64, &'static str>) -> Result<u64> {
    let wrong = |why: &str| Error::Argument(format!("`{}` is not a size: {why}", shorten(text)));
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| wrong("sizes begin with a number, as in 8GiB"))?;
    let binary = |shift: u32| (1u64 << shift) as f64;
    let of_unit = match unit.trim() {
        "" | "B" => 1.0,
        "KiB" => binary(10),
        "MiB" => binary(20),
        "GiB" => binary(30),
        "TiB" => binary(40),
        unit => other(unit).map_err(wrong)?,
    };
    let bytes = number * of_unit;
    if bytes < 1.0 || bytes > (1u64 << 50) as f64 { Err(wrong("the range is 1 byte to 1024 TiB")) } else { Ok(bytes as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [("8GiB", 8 << 30), ("1.5 GiB", 3 << 29), ("933MiB", 933 << 20), ("4096", 4096), ("1 TiB", 1 << 40)]
        {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "GiB", "-1GiB", "8GB", "8 G", "0", "8gib", "1e99", "99999999TiB", "..", "8 GiB x"] {
            assert!(parse_size(bad).unwrap_err().is_bad_input(), "{bad}");
        }
    }

    #[test]
    fn files_may_be_counted_by_thousands() {
        for (text, bytes) in [("1GB", 1_000_000_000), ("3.5 MB", 3_500_000), ("10kB", 10_000), ("1GiB", 1 << 30), ("7", 7)] {
            assert_eq!(parse_file_size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "GB", "1G", "1gb", "1 TB", "0MB", "1e9GB"] {
            assert!(parse_file_size(bad).unwrap_err().is_bad_input(), "{bad}");
        }
    }

    #[test]
    fn there_is_some_memory() {
        if let Some(bytes) = available() {
            assert!((1 << 20..1 << 50).contains(&bytes), "{bytes}");
        }
    }

    #[test]
    fn a_large_block_shows() {
        let Some(before) = super::peak() else { return };
        let block = vec![1u8; 256 << 20];
        assert!(super::peak().is_some_and(|after| after >= before.max(256 << 20)), "{before}");
        assert_eq!(block[block.len() - 1], 1);
    }
}
