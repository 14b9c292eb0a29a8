//! Mean bits of a compressed weight, in steps that are exact.

use std::fmt::{self, Display};

/// A mean of bits a compressed weight in thousandths. It is shown with at least one and at most
/// three decimals: `3.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MeanBits(u32);

impl MeanBits {
    /// The mean of `thousandths` thousandths of a bit.
    #[must_use]
    pub const fn of_thousandths(thousandths: u32) -> Self {
        MeanBits(thousandths)
    }

    /// Thousandths of a bit.
    #[must_use]
    pub const fn thousandths(self) -> u32 {
        self.0
    }

    /// The number of bits.
    #[must_use]
    pub fn bits(self) -> f64 {
        f64::from(self.0) / 1000.0
    }
}

impl Display for MeanBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        let decimals = format!("{rest:03}");
        let shown = decimals.trim_end_matches('0');
        write!(f, "{whole}.{}", if shown.is_empty() { "0" } else { shown })
    }
}
