//! Numbers for people. A number that was not measured or is not finite is a dash.

/// Stands for a number that is missing.
pub const NONE: &str = "–";

/// A number of bytes in MiB, with two decimals.
#[must_use]
pub fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A number of bytes in GiB, with three decimals.
#[must_use]
pub fn gib(bytes: u64) -> String {
    format!("{:.3} GiB", bytes as f64 / f64::from(1 << 30))
}

/// A number of bytes in MiB, or in GiB from 1000 MiB on.
#[must_use]
pub fn size(bytes: u64) -> String {
    if bytes < 1000 << 20 { mib(bytes) } else { gib(bytes) }
}

/// A number with commas between its thousands.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut spaced = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            spaced.push(',');
        }
        spaced.push(digit);
    }
    spaced
}

/// A text with `#` in the place of each number: texts that differ in their numbers alone give the
/// same.
#[must_use]
pub fn masked(text: &str) -> String {
    let mut masked = String::new();
    for character in text.chars() {
        let of_number = character.is_ascii_digit() || (masked.ends_with('#') && matches!(character, '.' | ','));
        match of_number {
            true if masked.ends_with('#') => {}
            true => masked.push('#'),
            false => masked.push(character),
        }
    }
    masked
}

/// A number with `decimals` decimals.
#[must_use]
pub fn fixed(number: f64, decimals: usize) -> String {
    if number.is_finite() { format!("{number:.decimals$}") } else { NONE.into() }
}

/// A share of 1 as percent, with two decimals.
#[must_use]
pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.2}%", 100.0 * share) } else { NONE.into() }
}

/// A share of 1 as percent, or a dash if it is missing.
pub fn maybe_percent(share: Option<f64>) -> String {
    share.map_or_else(|| NONE.into(), percent)
}

/// A duration given in seconds: in seconds below 100, then in minutes, then in hours.
#[must_use]
pub fn time(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => NONE.into(),
        s if s < 99.95 => format!("{s:.1} s"),
        s if s.round() < 6000.0 => format!("{:.0} min {:02.0} s", (s.round() / 60.0).floor(), s.round() % 60.0),
        s => format!("{:.0} h {:02.0} min", ((s / 60.0).round() / 60.0).floor(), (s / 60.0).round() % 60.0),
    }
}

/// A shape as its sizes with `x` between them.
pub fn shape(sizes: &[i64]) -> String {
    sizes.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_counts_and_shares_read_well() {
        assert_eq!(count(2_567_463_684), "2,567,463,684");
        assert_eq!(count(12), "12");
        assert_eq!(size(5_134_927_368), "4.782 GiB");
        assert_eq!(size(978_321_408), "933.00 MiB");
        assert_eq!(percent(0.0371), "3.71%");
        assert_eq!(fixed(f64::NAN, 2), NONE);
        assert_eq!(maybe_percent(None), NONE);
        assert_eq!(shape(&[320, 4, 3, 3]), "320x4x3x3");
        assert_eq!(masked("16 of 1,152 inputs: 0.029, not 1e-2"), "# of # inputs: # not #e-#");
    }

    #[test]
    fn durations_change_units_as_they_grow() {
        assert_eq!(time(7.04), "7.0 s");
        assert_eq!(time(119.7), "2 min 00 s");
        assert_eq!(time(125.0), "2 min 05 s");
        assert_eq!(time(7_199.0), "2 h 00 min");
        assert_eq!(time(f64::INFINITY), NONE);
    }
}
